"""Bad input never reaches a model: one sentence on standard error, exit status 2."""

import math
import random
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from functools import reduce

import numpy as np
import pytest
from conftest import ROOT, save_model, small_task, tiny_args
from transformers import AutoTokenizer

import common
import iac_separate
import maac
from common import InputError

ITEM = "Task([{'prompt': 'x'}]"
CASES = {  # flags, a task file's text (--task names it), what the sentence says
    "num_agents": ("--num-agents 0", "", "num_agents must be above 0, got 0"),
    "agents": ("--agents tiny tiny tiny", "", "agents lists 3, expected 2"),
    "critic_type": ("--critic-type z", "", "critic_type must be v or q, got 'z'"),
    "top_p 0": ("--top-p 0", "", "top_p must be above 0 and at most 1, got 0.0"),
    "top_p 1.1": ("--top-p 1.1", "", "top_p must be above 0 and at most 1, got 1.1"),
    "top_k": ("--top-k 0", "", "top_k must be above 0, got 0"),
    "temperature": ("--temperature 0", "", "temperature must be above 0, got 0.0"),
    "discount": ("--discount 1.1", "", "discount must be from 0 to 1, got 1.1"),
    "save_interval": ("--save-interval -1", "", "save_interval must be at least 0, got -1"),
    "dtype": ("--dtype float16", "", "dtype must be float32 or bfloat16, got 'float16'"),
    "meta": ("--device meta", "", "device 'meta' cannot be used: it is no cpu and no cuda"),
    "device": ("--device abacus", "", "device 'abacus' cannot be used: RuntimeError: Expected"),
    "no device": ("--device", "", "device must name one device or more"),
    "no model": ("--agent-model /no/model", "", "tokenizer '/no/model' cannot be used"),
    "no weights": ("--agent-model /no/model --tokenizer tiny", "", "model '/no/model' cannot be"),
    "model_config": ("--model-config [1]", "", "model_config takes a JSON object, got '[1]'"),
    "heads": ("--model-config '{\"num_attention_heads\": 5}'", "", "model 'tiny' cannot be used"),
    "half": ("--model-config '{\"dtype\": \"bfloat16\"}'", "", "weights must be float32: see --dtype"),
    "wandb_config": ("--wandb-config [1]", "", "wandb_config takes a JSON object, got '[1]'"),
    "wandb": ("--wandb-config '{\"projct\": \"x\"}'", "", "got an unexpected keyword argument 'projct'"),
    "resume": ("--resume nowhere", "", "'nowhere' is no run of this script: FileNotFoundError"),
    "output_dir": ("--output-dir /dev/null", "", "Not a directory"),
    "chess": ("--task chess", "", "no task 'chess': give sum_to_target, or a .py file"),
    "no file": ("--task nowhere.py", "", "no task 'nowhere.py': give sum_to_target, or a .py file"),
    "no task": ("", "x = 1", "it must define `task`, a common.Task, or `make_task(args)`"),
    "number": ("", "task = 5", "that returns one, got int"),
    "exit": ("", "raise SystemExit(3)", "bad_task.py': SystemExit: 3 at "),
    "syntax": ("", "task = = 1", "bad_task.py': SyntaxError: invalid syntax"),
    "turns": ("--num-turns 2", "task = " + ITEM + ", print)", "no external_transition, which num_turns 2 needs"),
    "formatters": ("", "task = " + ITEM + ", print, formatters=[str])", "cannot be used: it needs one formatter for all, or 2"),
    "no items": ("", "task = Task([], print)", "cannot be used: its train_dataset is empty"),
    "a stream": ("", "task = Task(iter([]), print)", "cannot be used: TypeError: object of type 'list_iterator' has no len()"),
    "one agent": ("--num-agents 1 --task tests/tasks/length_ratio.py", "", "compares agents: num_agents must be 2 or more"),
    "tldr": ("--num-agents 1 --task tests/tasks/tldr.py", "", "task tldr is for two agents: num_agents must be 2"),
    "code": ("--num-agents 3 --task tests/tasks/code.py", "", "code is for two agents: num_agents must be 2"),
    "str_build": ("--num-agents 3 --task tests/tasks/str_build.py", "", "str_build is for two agents: num_agents must be 2"),
    "no item": ("", "task = Task(['x'], print)", "item 'x': prompt of agent 0: an item must be a dict"),
    "a dict": ("", "task = Task({'prompt': 'x'}, print)", "a dataset's item cannot be read: KeyError: 0"),
    "a loop": ("", "x = {'prompt': 'x'}\nx['x'] = x\ntask = Task([x], lambda *t: [1], [x])", "a line of samples.jsonl cannot be written: ValueError: Circular"),
    "long": ("", "task = Task([{'prompt': 'x' * 1024}], print)", "is to read 1024 tokens, with room for 1 more: its model takes 1024"),
    "no reward": ("", "task = " + ITEM + ", None)", "item {'prompt': 'x'}: 2 agents' reward_func: TypeError: None is not a callable"),
    "callback": ("", "task = " + ITEM + ", lambda *t: [1], metrics_callback=len)", "metrics_callback: AttributeError"),
}  # fmt: skip


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call a script as from the command line: the one sentence of its refusal."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(module, arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            common.main(module.Args, module.train)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in err
        (found,) = re.findall(r"^error: (.+)$", err, re.MULTILINE)
        assert err.rstrip("\n").endswith(found)
        return found

    return call


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(script, case, tmp_path, refused, monkeypatch):
    words, text, expected = CASES[case]
    if case == "wandb":  # the sentence of the real package
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ["--output-dir", str(tmp_path / "runs"), *shlex.split(words)]
    if text:
        (tmp_path / "bad_task.py").write_text(f"from common import Task\n{text}\n")
        arguments += ["--task", str(tmp_path / "bad_task.py")]
    monkeypatch.setattr(script, "step", lambda *_: 1 / 0)  # no optimizer takes one
    assert expected in refused(script, arguments)


def test_every_number_has_a_limit(script):
    kinds = (int, float, int | None, float | None)
    for name in (flag.name for flag in fields(script.Args) if flag.type in kinds):
        wrong = [math.nan, math.inf, -math.inf]  # a threshold may be infinite
        for value in wrong[:1] if name == "early_termination_threshold" else wrong:
            with pytest.raises(InputError, match=f"^{name} must be .*, got {value}$"):
                common.setup(script.Args(**{name: value}), None)


@pytest.mark.parametrize("module, count", [(maac, 1), (iac_separate, 2)])
def test_wrong_critics(module, count, tmp_path, refused):
    """iac_shared.py knows no flag for them: test_structure.py."""
    flags = ["--output-dir", str(tmp_path), "--critics", *["tiny"] * 3]
    assert refused(module, flags) == f"critics lists 3, expected {count}"


def test_a_tokenizer_without_pad_and_end(script, tmp_path, refused):
    name = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(name)
    found = refused(script, ["--agent-model", name])
    assert found.endswith("it has neither a pad nor an end token")


def test_as_a_process(tmp_path):
    """The exit status and the single line, as a shell sees them."""
    command = [sys.executable, str(ROOT / "maac.py"), "--top-k", "0"]
    streams = {"capture_output": True, "text": True}
    done = subprocess.run(command, check=False, cwd=tmp_path, **streams)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "\nerror: top_k must be above 0, got 0\n"


DEEP = reduce(lambda inside, _: [inside], range(3000), [])
LOOP = {"prompt": "x"}
LOOP["loop"] = LOOP
VALUES = [
    None, "", " ", "x" * 3000, 10**400, 0, -1.5, math.nan, b"x", -math.inf, print, object(),
    "1", "\ud800", "\0é", [], {}, (), {1}, True, 1j, iter([]), np.zeros(2), DEEP, LOOP,
]  # fmt: skip
PLACES = [field.name for field in fields(common.Task) if field.name != "name"]


def odd(chance, depth=0):
    """A value of a wrong type or size, nested at random."""
    if depth == 3 or chance.random() < 0.4:
        return chance.choice(VALUES)
    a, b = odd(chance, depth + 1), odd(chance, depth + 1)
    chats = [{"role": a, "content": b}], [{"role": "user", "content": a}] * 2
    return chance.choice([[a, b], (a,), [a] * 2, {"prompt": a, "target": b}, *chats])


@pytest.mark.parametrize("seed", range(42))
def test_odd_values_train_or_are_refused(script, seed, tmp_path, monkeypatch):
    """As a dataset, as its items and their prompts, or as what a function of the task's returns,
    always or sometimes; a refusal is one line."""
    monkeypatch.setattr(common, "draw_curves", lambda folder: None)
    chance = random.Random(f"{script.__name__} {seed}")
    place, value, rate = (
        PLACES[seed % len(PLACES)],
        odd(chance),
        chance.choice([0.3, 1.0]),
    )
    own = {"formatters": lambda item: item["prompt"], "reward_processor": float}
    own["reward_func"] = lambda *texts, **_: [1.0] * len(texts[0])
    task = small_task(8, metrics_callback=lambda samples: {}, **own)
    valid = getattr(task, place)

    def returns(*given, **more):
        return value if chance.random() < rate else valid(*given, **more)

    items = chance.choice([value, [value] * 8, [{"prompt": value, "target": 1}] * 8])
    task = replace(task, **{place: returns if callable(valid) else items})
    try:
        script.train(tiny_args(script, tmp_path, num_turns=2, critic_type="q"), task)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
