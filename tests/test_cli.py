"""Bad input never reaches a model: one sentence on standard error, exit status 2."""

import importlib
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT, SCRIPTS
from test_pitfalls import save_model
from transformers import AutoTokenizer

import common

GOOD = "task = Task([{'prompt': 'x'}] * 4, lambda *texts: [0.0] * len(texts[0])"
CASES = {
    "num_agents 0": (["--num-agents", "0"], "num_agents must be at least 1, got 0"),
    "agents": (
        ["--agents", "tiny", "tiny", "tiny"],
        "agents lists 3 models for num_agents 2",
    ),
    "no transition": (
        ["--num-turns", "2", "--task", "length_ratio"],
        "no external_transition",
    ),
    "formatters": (
        ["--task", "F:" + GOOD + ", formatters=[str])"],
        "1 formatters for 2 agents",
    ),
    "unknown task": (["--task", "chess"], "unknown task 'chess'"),
    "no file": (["--task", "nowhere.py"], "'nowhere.py' does not exist"),
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
    "device": (["--device", "abacus"], "device 'abacus' cannot be loaded"),
    "empty": (["--task", "F:task = Task([], print)"], "empty train_dataset"),
    "a stream": (["--task", "F:task = Task(iter([]), print)"], "with a length"),
    "empty evaluation": (["--task", "F:" + GOOD + ", [])"], "empty eval_dataset"),
    "nothing to evaluate": (
        ["--eval-only", "--task", "F:" + GOOD + ")"],
        "no eval_dataset",
    ),
    "no prompt": (["--task", "F:task = Task([{'q': 1}], print)"], "item has no prompt"),
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
    "one agent": (
        ["--task", "length_ratio", "--num-agents", "1"],
        "num_agents must be 2",
    ),
}


def run(module, arguments):
    """What `python script.py arguments` does, in this process."""
    with common.one_sentence_errors():
        return module.train(tyro.cli(module.Args, args=arguments))


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
    cases += [["--critic-model", "tiny"]] if shared else []
    for arguments in cases:
        with pytest.raises(SystemExit) as stop:
            run(module, [*arguments, "--output-dir", str(tmp_path)])
        assert stop.value.code == 2
        expected = "value heads on the actors" if shared else "critics lists 3 models"
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
