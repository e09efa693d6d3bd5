"""The task code: its levels by hand, hostile programs, published problems."""

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from tasks import code

import common

TASK = code.make_task(SimpleNamespace(num_agents=2))
ASSERTS = "".join(f"    assert candidate({n}) == {n}\n" for n in range(5))
ITEM = {"prompt": "", "entry_point": "f", "test": f"def check(candidate):\n{ASSERTS}"}
AUX = "def aux(n):\n    return n\n"
CHATTY = (  # with an import, a signature of several lines, and what is not taken
    "Sure, `aux`:\n```python\nimport math\n\n\ndef aux(\n    n,\n):\n    # as it is\n"
    "\n    return math.floor(n)\n\nprint(1)\n```\ndef aux(n): return 7"
)


def f(body):
    """A function f(n) with this body, of which a ; ends a line."""
    return f"def f(n):\n    {body}\n".replace(";", "\n    ")


@pytest.mark.parametrize("aux, main, expected", [
    ("", "", 0), (AUX, "", 0.4), (AUX, f("pass"), 0.4), (AUX, "def g(n): return n", 0.4),
    ("aux = 3", f("return n"), 0.6 + 0.5 + 1), ("def aux(n): pass", f("'return'"), 0),
    (AUX, f("return (n"), 1), ("def aux(n): return (n", f("return n"), 1),
    (AUX, f("return -1"), 1.5), (AUX, "def f(n, m=exit()): return n", 1.5),
    (AUX, f("return aux(n) - 9"), 1.5), (AUX, f("return n if n < 2 else 0"), 1.5 + 2 / 5),
    (AUX, f("return n"), 2.5), ("", f("return n if n + 1 else aux(n)"), 2.5 - 0.4),
    (AUX, f("return aux(n)"), 2.5 + 0.5), (AUX, f("m = aux(n);return m"), 2.5 + 0.5),
    (AUX, f("'Just aux.';return aux(n)"), 2.5 + 0.5),
    (AUX, f("return aux(n) + 0"), 4), (AUX, f("m = aux(n);return n and m"), 4),
    (AUX, f("return aux(n) + 0 if n == 1 else 0"), 1.5 + 2 / 5 + 1.5),
    (AUX, f("aux(n);return n"), 4 - 0.5), (AUX, f("m = aux(n);return n"), 4 - 0.5),
    (AUX, "def aux(n): return 9\n" + f("return aux(n) + 0"), 4),  # agent 0's counts
    (CHATTY, f"I call aux.\n```\n{f('return aux(n) + 0')}```", 4),
])  # fmt: skip
def test_rewards_by_hand(aux, main, expected):
    paid = TASK.reward_func([aux], [main], batch_items=[ITEM], prompts=[["p"], ["q"]])
    assert paid == pytest.approx([expected])
    assert TASK.reward_processor(paid[0]) == pytest.approx(expected - 4)


DETACHED = "subprocess.Popen(['sleep', '7654321'], start_new_session=True)"
HOSTILE = {  # the body of f, and how many of the five asserts pass
    "infinite loop": ("while n == 2: pass;return n", 4),
    "fork bomb": ("import os;[os.fork() for _ in range(12 * (n == 2))];return n", 4),
    "detached child": (f"import subprocess;n == 2 and {DETACHED};return n", 4),
    "10 GB of memory": ("bytearray(10**10 * (n == 2));return n", 4),
    "1 GB of output": ("import os;[os.write(1, bytes(10**7)) for _ in range(100)];return n", 5),
    "large file": ("open('x', 'wb').write(bytes(10**7 * (n == 2)));return n", 4),
    "deletes its folder": ("import os, shutil;n or shutil.rmtree(os.getcwd());return n", 5),
    "deep folder": ("import os;while n == 2: os.mkdir('x'), os.chdir('x');return n", 4),
    "sys.exit": ("import sys;return n if n < 2 else sys.exit()", 2),
    "SystemExit": ("if n == 2: raise SystemExit;return n", 4),
    "os._exit": ("import os;return n if n < 2 else os._exit(0)", 2),
    "overwrites check": ("global check;def check(candidate): pass;return -1", 0),
    "kills its parent": ("import os;n == 2 and os.kill(os.getppid(), 9);return n", 4),
    "reads the environment": ("import os;return -1 if 'PATH' in os.environ else n", 5),
}  # fmt: skip


def alive(*marks):
    """The command lines of the processes that have one of these texts there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            line = path.read_text(errors="replace")
            found += [line] * any(mark in line for mark in marks)
    return found


@pytest.fixture
def process(tmp_path, monkeypatch):
    """The path of a code_process.py that only this test runs."""
    monkeypatch.setattr(code, "PROCESS", Path(shutil.copy(code.PROCESS, tmp_path)))
    return str(code.PROCESS)


@pytest.mark.parametrize("body, passes", HOSTILE.values(), ids=HOSTILE)
def test_hostile_code_is_paid_and_leaves_no_process(body, passes, process):
    start = time.monotonic()
    assert code.judge(ITEM, (AUX, f(body)))[0] == pytest.approx(1.5 + passes / 5)
    assert time.monotonic() - start < code.SECONDS + 1
    assert not alive(process, "7654321")


def test_a_program_that_catches_everything_is_stopped_in_the_end(process, monkeypatch):
    monkeypatch.setattr(code, "SECONDS", 2)
    sleep = "while n == 2:;    try: time.sleep(9);    except BaseException: pass"
    start = time.monotonic()
    texts = AUX, f(f"import time;{sleep};return n")
    assert code.judge(ITEM, texts)[0] == pytest.approx(1.5 + 2 / 5)
    assert 2 <= time.monotonic() - start < 4 and not alive(process)


def test_a_program_does_not_outlive_the_trainer(process):
    job = ["token", 60, 60, [], "def f(): return sum(iter(int, 1))", "f", "assert f()"]
    run = "import subprocess, sys; subprocess.run([sys.executable, '-I', sys.argv[1]])"
    line, pipe = [sys.executable, "-c", run, process], subprocess.PIPE
    trainer = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True)
    print(json.dumps(job), file=trainer.stdin)
    trainer.stdin.close()
    while trainer.stdout.readline() != "token begin 0\n":
        assert trainer.poll() is None
    trainer.kill()
    start = time.monotonic()
    assert trainer.stdout.read() == "" and time.monotonic() - start < 9  # it has ended
    trainer.wait()


def test_sixteen_completions_of_5_asserts_take_3_seconds():
    texts, prompts = [[AUX] * 16, [f("return aux(n) + 0")] * 16], [["p"] * 16] * 2
    start = time.monotonic()
    paid = TASK.reward_func(*texts, batch_items=[ITEM], prompts=prompts)
    assert paid == [4.0] * 16 and time.monotonic() - start < 3


def test_the_solutions_of_our_problems_earn_the_most():
    items = [*TASK.train_dataset, *TASK.eval_dataset]
    assert len(items) == 12 and len(TASK.eval_dataset) == 3
    for item in items:
        aux, main = item["solution"]["aux"], item["solution"]["main"]
        assert code.judge(item, (aux, main))[0] == 4
        assert code.judge(item, ("def aux(*x): return None", main))[0] < 4


HUMANEVAL = {  # with a helper that the test calls, an assert of nothing, and a loop
    "task_id": "HumanEval/999", "entry_point": "decode", "canonical_solution": "    ...",
    "prompt": "import math\n\n\ndef encode(n: int):\n    return n + math.floor(1.5)\n\n\n"
    'def decode(n: int):\n    """ Takes what encode gives back. """\n',
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert True, 'nothing'\n"
    "    for n in range(9):\n        assert candidate(encode(n)) == n\n"
    "    assert candidate(0) == -1, 'zero'\n",
}  # fmt: skip
MBPP = {
    "task_id": 999, "text": "Write a function to add one.", "test_setup_code": "one = 1",
    "code": "def a(n):\r\n  return n\r\ndef plus(n):\r\n  return a(n) + 1",
    "test_list": ["assert set([plus(1)]) == {1 + one}", "assert plus(2) == 3"],
}  # fmt: skip
SANITIZED = {"prompt": MBPP["text"], "code": MBPP["code"], "test_imports": ["one = 1"]}
SANITIZED["test_list"] = MBPP["test_list"]


@pytest.mark.parametrize("item, right, half", [
    (HUMANEVAL, "return n - 1", "return n - 1 if n < 5 else -1"),  # right at first
    (MBPP, "return n + 1", "return 2"), (SANITIZED, "return n + 1", "return 2"),
])  # fmt: skip
def test_published_problems_and_what_is_told(item, right, half):
    name = "decode" if item is HUMANEVAL else "plus"
    turn = common.Sample(item, 0, 0, [TASK.format(item, agent) for agent in (0, 1)])
    for body, share in ((right, 1), (half, 1 / 2)):
        turn.completions = [AUX, f"def {name}(n): {body}"]
        assert TASK.pay([turn]) == [1.5 + share - 4]
    for agent, (told,) in enumerate(TASK.transition(turn, False)):
        text, begun = told["content"], turn.prompts[agent][0]["content"]
        begun, _, request = begun.rpartition("\n\n")
        begun, _, example = begun.partition("\nExample: ")
        assert f"function {name}" in request and text.endswith(request)
        assert example == (name == "plus") * MBPP["test_list"][0]
        assert text.startswith(begun) and f"not reached: {name} calls aux\n" in text
        assert "Python\nnot reached: all tests pass (1 of 2 do)\n" in text
        assert f"Your last answer:\n{turn.completions[agent]}" in text
        assert turn.completions[1 - agent] not in text


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(common.InputError, match="the test of f has no assert"):
        code.judge({**ITEM, "test": "def check(f): 1"}, (AUX, f("return n")))
    with pytest.raises(common.InputError, match="calls no function of its code"):
        TASK.format({**MBPP, "code": "x = 1"}, 0)
