"""code: agent 0 writes a helper aux(...), agent 1 the function that a problem asks for.

Problems are those of tests/problems.jsonl, or --train-file's, as HumanEval and MBPP are published.
What the agents write runs in processes of its own (code_process.py), under limits that bound
accidents and are no wall against an attacker. Needs Linux. Source: arXiv 2601.21972.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from common import Prompt, Task, require

PROCESS = Path(__file__).resolve().with_name("code_process.py")
PROBLEMS = Path(__file__).resolve().parent.parent / "problems.jsonl"
SECONDS, ASSERT_SECONDS = 5, 1  # for a program and its tests; for one assert
SHIFT = -4.0  # added to every reward, so that the best is 0
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # all of it; numpy may have no other thread
IMPORT = r"^(?:import|from) [\w., *]+\r?$"
REQUESTS = (
    """Another programmer writes the Python function {name} for this problem, and calls in it a
function aux(...) of yours, unseen. Write aux, which does a part of the work, and nothing else.""",
    """Write the Python function {name} for this problem, and nothing else. Call in it aux(...),
which another programmer writes, unseen, and do more than return its result.""",
)


def problem(item: dict) -> tuple[str, str, str]:
    """An item's text, the function it asks for and its test, in HumanEval's form or MBPP's."""
    text = "\n".join(filter(None, [item.get("text"), item.get("prompt")]))
    if "test_list" not in item:
        name = item["entry_point"]
        return text, name, f"{item['test']}\ncheck({name})"
    tests = item["test_list"]
    names = re.findall(r"def\s+(\w+)", item["code"])
    names = [name for name in names if re.search(rf"\b{name}\b", tests[0])]
    require(names, "its test_list calls no function of its code")
    setup = [item.get("test_setup_code", ""), *item.get("test_imports", [])]
    return f"{text}\nExample: {tests[0]}", names[0], "\n".join([*setup, *tests])


def function(text: str, name: str) -> str:
    """The function in an agent's text, without fences and what else is there; "" if there is
    none of that name, or it has no return."""
    found = re.search(rf"^def {name}\b.*(?:\n(?:[ \t\r)#].*)?)*", text, re.MULTILINE)
    code = found[0] if found else ""
    return code if re.search(r"(?:^|[:;])[ \t]*return\b", code, re.MULTILINE) else ""


def run(opening: list[str], code: str, name: str, test: str) -> list[str]:
    """What a process of its own finds out about the code: see code_process.py."""
    token = os.urandom(16).hex()
    job = [token, SECONDS, ASSERT_SECONDS, opening, code, name, test]
    folder = TemporaryDirectory(ignore_cleanup_errors=True)
    with folder, TemporaryFile("w+") as given, TemporaryFile("w+b") as found:
        json.dump(job, given)
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", PROCESS], stdin=given, stdout=found,
            stderr=subprocess.DEVNULL, cwd=folder.name, env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found.seek(0)
        lines = found.read().decode(errors="replace").splitlines()
    return [line[len(token) + 1 :] for line in lines if line.startswith(token)]


def judge(item: dict, texts: Sequence[str]) -> tuple[float, str]:
    """What a joint completion is paid, from 0 to 4, and the levels that it reached, in words.

    0.4 for an aux with a return, 0.6 for the main function with one, or it ends here; 0.5 if
    both together are Python, or it ends here; the share of the test's asserts that pass. If one
    does and the main function calls aux, 0.5, 1 more if it does more than hand the call through,
    and 0.5 less if it ignores a result.
    """
    _, name, test = problem(item)
    aux, main = function(texts[0], "aux"), function(texts[1], name)
    prompt = item.get("prompt") or ""
    imports = re.findall(IMPORT, "\n".join([prompt, *texts]), re.MULTILINE)
    found = run([*imports, prompt], f"{aux}\n{main}", name, test) if main else []
    require("tests 0" not in found, f"the test of {name} has no assert")
    count = sum(int(word[6:]) for word in found if word.startswith("tests "))
    marks = Counter(found)  # an assert in a loop begins, and has to pass, several times
    ends = [marks[f"pass {k}"] == marks[f"begin {k}"] > 0 for k in range(count)]
    valid, calls, more, ignores = (
        word in found for word in ("valid", "calls", "more", "ignores")
    )
    reward = 0.4 * bool(aux) + 0.6 * bool(main) + 0.5 * valid
    reward += sum(ends) / max(count, 1)
    if aux and any(ends) and calls:
        reward += 0.5 + more - 0.5 * ignores
    levels = {
        "aux is defined and returns": aux,
        f"{name} is defined and returns": main,
        "both together are valid Python": valid,
        f"all tests pass ({sum(ends)} of {count} do)": ends and all(ends),
        f"{name} calls aux": calls,
        f"{name} does more than return aux's result": more,
        f"{name} uses each result of aux": calls and not ignores,
    }
    said = [f"{'' if levels[x] else 'not '}reached: {x}" for x in levels]
    return reward, "\n".join(said)


def ask(item: dict, agent: int) -> Prompt:
    """An agent's prompt: the problem, what the transition tells, and the request."""
    text, name, _ = problem(item)
    request = REQUESTS[agent].format(name=name)
    return [{"role": "user", "content": f"{text}\n\n{request}"}]


def make_task(args) -> Task:
    """The task for two agents; InputError for another number, or where no code can be run."""
    require(args.num_agents == 2, "code is for two agents: num_agents must be 2")
    works = "pass 0" in run([], "def f(): return 1", "f", "assert f() == 1")
    require(works, "code cannot run programs here: it needs Linux, with seccomp")
    notes = {}  # what to tell of a joint completion

    def reward(*completions, batch_items: list[dict], prompts: list) -> list[float]:
        texts, asked = list(zip(*completions)), list(zip(*prompts))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            verdicts = list(pool.map(partial(judge, batch_items[0]), texts))
        for k, (_, note) in enumerate(verdicts):
            notes[hash(str([*asked[k], *texts[k]]))] = note
        return [paid for paid, _ in verdicts]

    def tell(prompt, agent_completions, prompt_history_per_agent, **_) -> list[str]:
        asked = [prompts[-1] for prompts in prompt_history_per_agent]
        note = notes[hash(str([*asked, *agent_completions]))]
        news = [f"{note}\nYour last answer:\n{text}" for text in agent_completions]
        return [f"{prompt or ''}\n\n{text}" for text in news]

    items = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    formatters = [partial(ask, agent=agent) for agent in (0, 1)]
    shift = lambda paid: paid + SHIFT
    return Task(items[:9], reward, items[9:], shift, formatters, tell)
