"""The process that code.py starts for each program: it confines itself, then runs the tests.

Standard input is JSON: a token; the seconds for all and for an assert; what stands before the
code, of which what is no Python is left out; the code; its main function; the test. Each finding
is a line on standard output, behind the token, which the code is not given: valid, calls, more,
ignores, tests N, begin K, pass K.
"""

import ast
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def confine(seconds: int) -> None:
    """Bound this process's time, memory and files; refuse it other processes, threads, signals,
    network and folders; let it die with its parent. OSError or KeyError where that fails."""
    limits = {"CPU": seconds, "AS": 2**30, "FSIZE": 2**22, "NOFILE": 32, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    # RLIMIT_NPROC counts all of a user's processes and does not bind root. So a filter (seccomp)
    # refuses clone, fork, vfork, clone3, kill, tkill, tgkill, socket, mkdir and mkdirat.
    x86 = (56, 57, 58, 435, 62, 200, 234, 41, 83, 258)
    arm = (220, 435, 129, 130, 131, 198, 34)
    refused = {"x86_64": x86, "aarch64": arm}[os.uname().machine]
    rules = [(0x20, 0, 0, 0)]  # load the number of the system call
    for number in refused:  # if it is this one, fail with EPERM; else skip that rule
        rules += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
    rules += [(0x06, 0, 0, 0x7FFF0000)]  # allow it
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *r) for r in rules))
    program = struct.pack("HP", len(rules), ctypes.addressof(code))
    prctl = ctypes.CDLL(None).prctl  # PDEATHSIG, NO_NEW_PRIVS, SECCOMP of prctl.h
    if prctl(1, signal.SIGKILL) or prctl(38, 1, 0, 0, 0) or prctl(22, 2, program):
        raise OSError("prctl failed")


def parses(code: str) -> bool:
    """Whether it is Python."""
    with suppress(SyntaxError, ValueError):
        return bool(ast.parse(code))
    return False


def usage(function: ast.FunctionDef) -> list[str]:
    """What a function does with aux: calls it, does more than hand the call through, ignores a
    result (a statement of its own, or a name that is never read)."""

    def called(node: ast.AST | None) -> bool:
        return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "aux"

    nodes = list(ast.walk(function))
    if not any(map(called, nodes)):
        return []
    match function.body[ast.get_docstring(function) is not None :]:
        case [ast.Return(call)]:
            more = not called(call)
        case [ast.Assign([ast.Name(one)], call), ast.Return(ast.Name(two))]:
            more = not called(call) or one != two
        case _:
            more = True
    ignores, names = False, [node for node in nodes if isinstance(node, ast.Name)]
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.Expr | ast.Assign) and called(node.value):
            targets = [x for t in getattr(node, "targets", []) for x in ast.walk(t)]
            ignores |= not read & {getattr(x, "id", None) for x in targets}
    return ["calls"] + ["more"] * more + ["ignores"] * ignores


class Cases(ast.NodeTransformer):
    """Puts the asserts of a test into `with case(K):`, K = 0, 1, ...; not `assert True`."""

    count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        """An assert with its case around it."""
        if isinstance(node.test, ast.Constant):
            return node
        block = ast.parse(f"with case({self.count}): pass").body[0]
        block.body, self.count = [node], self.count + 1
        return block


def main() -> None:
    """Read the job, and write what is found."""
    token, seconds, for_assert, opening, code, name, test = json.load(sys.stdin)
    output, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    confine(seconds)
    # An assert's time is up: a KeyboardInterrupt, and another where that is caught.
    signal.signal(signal.SIGALRM, signal.default_int_handler)

    def tell(finding: str) -> None:
        os.write(output, f"{token} {finding}\n".encode())

    @contextmanager
    def case(number: int) -> Iterator[None]:
        tell(f"begin {number}")
        signal.setitimer(signal.ITIMER_REAL, for_assert, 0.1)
        with suppress(BaseException):  # a SystemExit is no more than a failed assert
            yield
            tell(f"pass {number}")
        signal.setitimer(signal.ITIMER_REAL, 0)

    cases = Cases()
    tests = ast.fix_missing_locations(cases.visit(ast.parse(test)))
    tell(f"tests {cases.count}")
    program = "\n".join([*filter(parses, opening), code])
    functions = [x for x in ast.parse(program).body if getattr(x, "name", "") == name]
    for finding in ["valid", *usage(functions[-1])]:
        tell(finding)
    scope = {"__name__": "program"}
    exec(program, scope)  # noqa: S102
    scope = {**scope, "case": case}  # the tests', which the program cannot overwrite
    exec(compile(tests, "tests", "exec"), scope)  # noqa: S102
    os._exit(0)  # without what the code registered for the end


if __name__ == "__main__":
    main()
