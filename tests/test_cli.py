"""Bad input never reaches a model: one sentence on standard error, exit status 2."""

import importlib
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, save_model
from transformers import AutoTokenizer

import common

ITEM = "Task([{'prompt': 'x'}]"
CASES = {  # flags, a task file's text (--task names it), what the sentence says
    "num_agents": ("--num-agents 0", "", "num_agents must be above 0, got 0"),
    "agents": ("--agents tiny tiny tiny", "", "agents lists 3, expected 2"),
    "critic_type": ("--critic-type z", "", "critic_type must be v or q, got 'z'"),
    "top_p 0": ("--top-p 0", "", "top_p must be above 0 and at most 1, got 0.0"),
    "top_p 2": ("--top-p 2", "", "top_p must be above 0 and at most 1, got 2.0"),
    "top_k": ("--top-k 0", "", "top_k must be above 0, got 0"),
    "temperature": ("--temperature 0", "", "temperature must be above 0, got 0.0"),
    "nan": ("--temperature nan", "", "temperature must be above 0, got nan"),
    "inf": ("--entropy-coef inf", "", "entropy_coef must be at least 0, got inf"),
    "discount": ("--discount 1.1", "", "discount must be from 0 to 1, got 1.1"),
    "threshold": ("--early-termination-threshold nan --num-train-epochs 1", "", "early_termination_threshold must"),
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
    "no prompt": ("", "task = Task([{'q': 1}], print)", "item {'q': 1}: prompt of agent 0: expected a prompt"),
    "no item": ("", "task = Task(['x'], print)", "item 'x': prompt of agent 0: an item must be a dict"),
    "empty": ("", "task = Task([{'prompt': ''}], print)", "item {'prompt': ''}: agent_0 is to read "),
    "long": ("", "task = Task([{'prompt': 'x' * 1024}], print)", "is to read 1024 tokens, with room for 1 more: its model takes 1024"),
    "no reward": ("", "task = " + ITEM + ", None)", "item {'prompt': 'x'}: 2 agents' reward_func: TypeError: None is not a callable"),
    "reward": ("", "task = " + ITEM + ", lambda *t: [])", "reward_func: expected a list of 1 finite numbers, got []"),
    "processor": ("", "task = " + ITEM + ", lambda *t: [1], None, str)", "reward_processor: expected a list of 1 finite"),
    "callback": ("", "task = " + ITEM + ", lambda *t: [1], metrics_callback=len)", "metrics_callback: AttributeError"),
}  # fmt: skip


@pytest.fixture
def refused(monkeypatch, capsys):
    """Call a script as from the command line: its exit status, and what it wrote to standard
    error. One that trains exits with 0."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(common, "draw_curves", lambda folder: None)  # most of the time

    def call(module, arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
        try:
            common.main(module.Args, module.train)
            status = 0
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        assert status or "\nrun folder: " in out.out
        return status, out.err

    return call


def sentence(status, err):
    """The one sentence of a refusal."""
    assert status == 2 and "Traceback" not in err
    (found,) = re.findall(r"^error: (.+)$", err, re.MULTILINE)
    assert err.rstrip("\n").endswith(found)
    return found


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
    assert expected in sentence(*refused(script, arguments))


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_critics(name, tmp_path, refused):
    """iac_shared.py's critics are value heads: it knows no flag for their models."""
    module, where = importlib.import_module(name), ["--output-dir", str(tmp_path)]
    three = refused(module, ["--critics", "tiny", "tiny", "tiny", *where])
    if name == "iac_shared":
        for status, err in (three, refused(module, ["--critic-model", "tiny"])):
            assert status == 2 and "nrecognized" in err and "--critic" in err
    else:
        expected = {"maac": 1, "iac_separate": 2}[name]
        assert sentence(*three) == f"critics lists 3, expected {expected}"


def test_a_tokenizer_without_pad_and_end(script, tmp_path, refused):
    name = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(name)
    found = sentence(*refused(script, ["--agent-model", name]))
    assert found.endswith("it has neither a pad nor an end token")


def test_as_a_process(tmp_path):
    """The exit status and the single line, as a shell sees them."""
    command = [sys.executable, str(ROOT / "maac.py"), "--top-k", "0"]
    streams = {"capture_output": True, "text": True}
    done = subprocess.run(command, check=False, cwd=tmp_path, **streams)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "\nerror: top_k must be above 0, got 0\n"


VALID_TASK = """
from functools import reduce
from random import random
import numpy
from common import Task

deep = reduce(lambda inside, _: [inside], range(3000), [])
loop = {"prompt": "x", "number": 1}
loop["loop"] = loop


def reward(firsts, seconds, batch_items, prompts):
    wanted = batch_items[0]["number"]
    pairs = zip(firsts, seconds)
    return [1.0 / (1 + abs(len(a) + len(b) - wanted)) for a, b in pairs]  # reward


def process(reward):
    return 2 * reward - 1  # reward


def ask(item):
    return [{"role": "user", "content": f"{item['prompt']} {item['number']}"}]  # prompt


def tell(item):
    return f"{item['prompt']} {item['number']}"  # prompt


def go_on(prompt, agent_completions, num_agents, **_):
    return [f"{prompt} {agent_completions[k]}" for k in range(num_agents)]  # prompt


def count(samples):
    return {"longest": max(len(s.completions[0]) for s in samples)}  # reward


def item(number):
    text = "write"  # prompt
    item = {"prompt": text, "number": number}  # prompt
    return item


def make_task(args):
    items = [item(n) for n in range(4)]  # prompt
    held_out = items[:2]  # reward
    formatters = [ask, tell]  # prompt
    return Task(items, reward, held_out, process, formatters, go_on, count)  # reward
"""
VALID_FLAGS = """--num-agents 2  --num-turns 2  --num-generations 2  --num-train-epochs 1  --top-k 20
  --rollout-buffer-size 8  --train-batch-size 5  --max-new-tokens 2  --temperature 0.9  --top-p 0.9
  --discount 0.9  --early-termination-threshold 0.5  --critic-type q  --agent-learning-rate 1e-3
  --critic-learning-rate 1e-3  --value-loss-coef 0.5  --entropy-coef 0.1  --max-grad-norm 1
  --micro-batch-size 3  --seed 3  --dtype float32  --eval-interval 3  --eval-num-samples 2
  --eval-batch-size 2  --logging-steps 2  --save-interval 2  --log-samples 1  --agents tiny tiny
  --tokenizer tiny  --no-advantage-normalization  --device cpu
  --model-config '{"num_hidden_layers": 1}'"""
FLAG_VALUES = ["''", "-1", "0", "1", "2", "3", "0.5", "1e-30", "1e30", "1e999", "nan", "inf",
               "x", "None", "[]", "{}", "é", "--"]  # fmt: skip
VALUES = ["None", "''", "' '", "'x' * 3000", "10**400", "0", "-1.5", "float('nan')", "b'x'",
          "-float('inf')", "print", "object()", "'1'", "'\\ud800'", "'\\0é'", "[]", "{}", "()",
          "{1}", "True", "1j", "iter([])", "numpy.zeros(2)", "deep", "loop"]  # fmt: skip


def odd(chance, depth=0):
    """A Python expression for a value of a wrong type or size, nested at random."""
    if depth == 3 or chance.random() < 0.4:
        return chance.choice(VALUES)
    a, b = odd(chance, depth + 1), odd(chance, depth + 1)
    kinds = f"[{a},{b}]  ({a},)  [{a}]*2  {{'prompt':{a},'number':{b}}}"
    kinds += f"  [{{'role':{a},'content':{b}}}]  [{{'role':'user','content':{a}}}]*2"
    return chance.choice(kinds.split("  "))


def mutate(parts, chance):
    """Leave one of the parts out, repeat or swap it, or change a character of it."""
    parts = list(parts)
    at, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    kind = chance.randrange(4)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, parts[other])
    elif kind == 2:
        parts[at], parts[other] = parts[other], parts[at]
    else:
        where = chance.randrange(len(parts[at]) + 1)
        character = chance.choice("({[]})',:;=.x0é \"")
        parts[at] = parts[at][:where] + character + parts[at][where + 1 :]
    return parts


def mutant(seed, chance):
    """Flags and a task file with one thing wrong: a flag or its value, the file's text, a prompt
    or what stands where one is made, a reward. Half of the last two only sometimes."""
    flags, text = re.split(r"\s\s+", VALID_FLAGS), VALID_TASK
    if seed % 5 == 1:
        at = chance.randrange(len(flags))
        name, *values = flags[at].split()
        flags[at] = " ".join([name, *(chance.choice(FLAG_VALUES) for _ in values)])
    elif seed % 5 == 2:
        return mutate(shlex.split(VALID_FLAGS), chance), text
    elif seed % 5 == 3:
        text = "".join(mutate(re.findall(r"\w+|\s+|[^\w\s]", text), chance))
    elif seed > 0:
        lines, kind = text.split("\n"), "  # prompt" if seed % 10 > 4 else "  # reward"
        at = chance.choice([k for k, line in enumerate(lines) if line.endswith(kind)])
        start, valid = re.match(r"( +(?:return|\w+ =) )(.+)  #", lines[at]).groups()
        sometimes = f" if random() < 0.3 else {valid}" if chance.random() < 0.5 else ""
        lines[at] = start + odd(chance) + sometimes
        text = "\n".join(lines)
    return shlex.split(" ".join(flags)), text


class Hangs(BaseException):
    """No Exception, which the scripts would take for one of the task's."""


def too_long(*_):
    raise Hangs


@pytest.mark.parametrize("seed", range(100))
def test_a_mutant_trains_or_is_refused(script, seed, tmp_path, refused):
    """300 in all: each trains, or is refused with one sentence and no traceback."""
    chance = random.Random(f"{script.__name__} {seed}")
    arguments, text = mutant(seed, chance)
    (tmp_path / "mutant.py").write_text(text)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        where = ["--task", str(tmp_path / "mutant.py"), "--output-dir", str(tmp_path)]
        status, err = refused(script, [*arguments, *where])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if seed == 0:  # the unchanged one trains, as it should
        assert status == 0
    elif status != 0 and "For full helptext, " not in err:  # tyro's own, of a flag
        sentence(status, err)
