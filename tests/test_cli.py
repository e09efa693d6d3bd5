"""Bad input never reaches a model: one sentence on standard error, exit status 2."""

import importlib
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS
from test_pitfalls import save_model
from transformers import AutoTokenizer

import common

GOOD = "task = Task([{'prompt': 'x'}] * 4, lambda *texts: [0.0] * len(texts[0])"
CASES = {
    "num_agents 0": (["--num-agents", "0"], "num_agents must be at least 1, got 0"),
    "agents": (
        ["--agents", "tiny", "tiny", "tiny"],
        "agents lists 3, expected 2",
    ),
    "no transition": (
        ["--num-turns", "2", "--task", "length_ratio"],
        "no external_transition",
    ),
    "formatters": (
        ["--task", "F:" + GOOD + ", formatters=[str])"],
        "formatters lists 1, expected 2",
    ),
    "unknown task": (
        ["--task", "chess"],
        "no task 'chess': give sum_to_target, hidden_cards, ",
    ),
    "no file": (["--task", "nowhere.py"], "no task 'nowhere.py'"),
    "no task": (["--task", "F:x = 1"], "must define `task`"),
    "wrong task": (["--task", "F:task = 5"], "must define `task`"),
    "no model": (["--agent-model", "/no/such/model"], "cannot be loaded"),
    "critic_type": (["--critic-type", "z"], "critic_type must be v or q, got 'z'"),
    "top_p 0": (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
    "top_p 2": (["--top-p", "2"], "top_p must be above 0 and at most 1"),
    "top_k 0": (["--top-k", "0"], "top_k must be at least 1"),
    "temperature 0": (["--temperature", "0"], "temperature must be above 0, got 0.0"),
    "nan": (["--temperature", "nan"], "temperature must be above 0, got nan"),
    "dtype": (["--dtype", "float16"], "dtype must be float32 or bfloat16"),
    "meta": (["--device", "meta"], "device 'meta' is no cpu and no cuda"),
    "device": (["--device", "abacus"], "device 'abacus' cannot be used"),
    "empty": (
        ["--task", "F:task = Task([], print)"],
        "train_dataset must be a list, or a dataset with a length, of one",
    ),
    "a stream": (
        ["--task", "F:task = Task(iter([]), print)"],
        "train_dataset must be a list, or a dataset with a length",
    ),
    "empty evaluation": (
        ["--task", "F:" + GOOD + ", [])"],
        "eval_dataset must be a list, or a dataset with a length, of one",
    ),
    "nothing to evaluate": (
        ["--eval-only", "--task", "F:" + GOOD + ")"],
        "eval_dataset must be a list, or a dataset with a length, of one",
    ),
    "no prompt": (
        ["--task", "F:task = Task([{'q': 1}], print)"],
        "without a formatter: expected a prompt",
    ),
    "empty prompt": (
        ["--task", "F:task = Task([{'prompt': ''}], print)"],
        "empty prompt",
    ),
    "number prompt": (
        ["--task", "F:task = Task([{'prompt': 1}], print)"],
        "expected a prompt",
    ),
    "long": (
        ["--task", "F:task = Task([{'prompt': 'x' * 2000}], print)"],
        "2000 tokens",
    ),
    "no reward": (
        ["--task", "F:task = Task([{'prompt': 'x'}], None)"],
        "no callable reward_func",
    ),
    "bad reward": (
        ["--task", "F:task = Task([{'prompt': 'x'}], lambda *t: [])"],
        "list of 1",
    ),
    "model_config": (["--model-config", "[1]"], "model_config takes a JSON object"),
    "half weights": (["--model-config", '{"dtype": "bfloat16"}'], "cannot set a dtype"),
    "wandb": (["--wandb-config", "{}"], "pip install wandb"),
    "save_interval": (["--save-interval", "-1"], "save_interval must be at least 0"),
    "nothing to resume": (
        ["--resume", "nowhere"],
        "'nowhere' is no run of this script: [Errno 2] No such file",
    ),
    "devices": (
        ["--agent-devices", "cpu", "cpu", "cpu"],
        "agent_devices lists 3, expected 2",
    ),
    "one agent": (
        ["--task", "length_ratio", "--num-agents", "1"],
        "num_agents must be 2",
    ),
}


def run(module, arguments):
    """What `python script.py arguments` does, in this process."""
    with common.one_sentence_errors():
        return module.train(common.parse_args(module.Args, arguments))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(script, case, tmp_path, capsys):
    arguments, expected = CASES[case]
    if case == "wandb" and common.importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    if any(a.startswith("F:") for a in arguments):
        path = tmp_path / "bad_task.py"
        path.write_text("from common import Task\n" + arguments[-1][2:] + "\n")
        arguments = [*arguments[:-1], str(path)]
    with pytest.raises(SystemExit) as stop:
        run(script, [*arguments, "--output-dir", str(tmp_path)])
    message = capsys.readouterr().err.strip().split("\n")[-1]
    assert stop.value.code == 2
    assert message.startswith("error: ") and expected in message
    if case != "bad reward":  # the others are known before there is a run
        assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize("script_name", SCRIPTS)
def test_wrong_critics(script_name, tmp_path, capsys):
    module = importlib.import_module(script_name)
    shared = script_name == "iac_shared"
    cases = [["--critics", "tiny", "tiny", "tiny"]]
    cases += [["--critic-model", "tiny"], ["--critic-devices", "cpu"]] * shared
    for arguments in cases:
        with pytest.raises(SystemExit) as stop:
            run(module, [*arguments, "--output-dir", str(tmp_path)])
        assert stop.value.code == 2
        expected = (
            "value heads on the actors" if shared else "critics lists 3, expected "
        )
        assert expected in capsys.readouterr().err


def test_a_tokenizer_without_pad_and_end(script, tmp_path, capsys):
    name = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(name)
    with pytest.raises(SystemExit) as stop:
        run(script, ["--agent-model", name, "--output-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "neither a pad nor an end-of-sequence token" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(script, tmp_path, capsys):
    """A tokenizer with more tokens than the model embeds would index out of range."""
    name = save_model(tmp_path / "model", vocab_size=50)
    with pytest.raises(SystemExit):
        run(script, ["--agent-model", name, "--output-dir", str(tmp_path)])
    assert "more tokens than model" in capsys.readouterr().err


def test_as_a_process(tmp_path):
    """The exit status and the single line, as a shell sees them."""
    command = [sys.executable, str(ROOT / "iac_shared.py"), "--critic-model", "tiny"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: iac_shared.py takes no critic_model")
    assert done.stderr.count("\n") == 1


VALID_TASK = """
from common import Task


def reward(firsts, seconds, batch_items, prompts):
    wanted = batch_items[0]["number"]
    pairs = zip(firsts, seconds)
    return [1.0 / (1 + abs(len(a) + len(b) - wanted)) for a, b in pairs]


def ask(item):
    return [{"role": "user", "content": f"{item['prompt']} {item['number']}"}]


def go_on(prompt, agent_completions, num_agents, **_):
    return [f"{prompt} {agent_completions[k]}" for k in range(num_agents)]


def count(samples):
    return {"texts": len(samples), "longest": max(len(s.completions[0]) for s in samples)}


def make_task(args):
    items = [{"prompt": "write", "number": n} for n in range(6)]
    return Task(
        train_dataset=items,
        eval_dataset=items[:3],
        reward_func=reward,
        reward_processor=lambda reward: 2 * reward - 1,
        formatters=[ask, ask],
        external_transition=go_on,
        metrics_callback=count,
    )
"""
VALID_FLAGS = shlex.split(
    "--num-agents 2 --num-turns 2 --num-generations 2 --num-train-epochs 1 --top-k 20"
    " --rollout-buffer-size 8 --train-batch-size 3 --max-new-tokens 3 --temperature 0.9"
    " --top-p 0.9 --discount 0.9 --early-termination-threshold 0.5 --critic-type q"
    " --agent-learning-rate 1e-3 --critic-learning-rate 1e-3 --value-loss-coef 0.5"
    " --entropy-coef 0.1 --max-grad-norm 1 --micro-batch-size 2 --seed 3 --dtype float32"
    " --eval-interval 3 --eval-num-samples 3 --eval-batch-size 2 --logging-steps 2"
    " --save-interval 2 --log-samples 1 --agents tiny tiny --model-config '{}'"
    " --no-advantage-normalization --device cpu"
)
ODD = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "x",
    "None",
    "[]",
    "{}",
    '"',
    "1.5",
    "--",
    "é",
]


def mutate(parts, chance):
    """Leave one of the parts out, repeat, swap or replace it, or change a character of it."""
    parts = list(parts)
    at, other = chance.randrange(len(parts)), chance.randrange(len(parts))
    kind = chance.randrange(5)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, parts[other])
    elif kind == 2:
        parts[at], parts[other] = parts[other], parts[at]
    elif kind == 3:
        parts[at] = chance.choice(ODD)
    else:
        where = chance.randrange(len(parts[at]) + 1)
        character = chance.choice("({[]})',:;=.x0é \"")
        parts[at] = parts[at][:where] + character + parts[at][where + 1 :]
    return parts


def too_long(*_):
    raise TimeoutError("a mutated input hangs")


@pytest.mark.parametrize("seed", range(70))
def test_mutated_task_files_and_flags(script, seed, tmp_path, capsys):
    """210 in all: each trains, or is refused with status 2 and no traceback of ours."""
    chance = random.Random(f"{script.__name__} {seed}")
    words, text = VALID_FLAGS, VALID_TASK
    if seed > 0:  # the unchanged one trains, as it should
        if chance.random() < 0.5:
            words = mutate(words, chance)
        else:
            text = "".join(mutate(re.findall(r"\w+|\s+|[^\w\s]", text), chance))
    path = tmp_path / "mutated.py"
    path.write_text(text)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        where = ["--task", str(path), "--output-dir", str(tmp_path / "runs")]
        run(script, [*words, *where])
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    finally:
        signal.alarm(0)
    out = capsys.readouterr()
    assert ended == 2 or "run folder: " in out.out
    if ended == 2:
        boxed = " --help" in out.err  # tyro's own answer to a flag that it cannot read
        assert boxed or re.search(r"^error: .+", out.err, re.MULTILINE)
        assert "Traceback" not in out.err
    assert ended == 0 or seed > 0
