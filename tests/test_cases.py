"""Kinds of input on which trainers failed. Others stand in test_pitfalls.py (22 and 26), test_runs.py
(100,000 items, heads of another width), test_tasks.py (task files), test_pictures.py (W&B)."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain, repeat
from types import ModuleType
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from benchmarks.survival import same, weights
from conftest import ROOT, SCRIPTS, save_model, tiny_args
from test_pitfalls import load, team
from tokenizers import processors

import common
import maac
from common import InputError, Task

CALLS = {  # of users' functions, in an update of four episodes of two turns
    "formatters": 16, "reward_func": 8, "reward_processor": 8, "external_transition": 4,
    "metrics_callback": 1,
}  # fmt: skip
READER = common.tiny_tokenizer()  # puts nothing around a text
CHAT = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}:"
AROUND = {"begins": "<unk> $A", "both": "<unk> $A <eos>", "ends": "$A <eos>"}
ODD = {"plain": 64, "short": 24, **dict.fromkeys(AROUND, 256)}  # contexts


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """A folder of random models with odd tokenizers, for which ~ is a special token."""
    folder, special = tmp_path_factory.mktemp("odd"), [("<unk>", 2), ("<eos>", 1)]
    torch.manual_seed(0)
    for name, context in ODD.items():
        save_model(folder / name, max_position_embeddings=context)
        made, around = common.tiny_tokenizer(), AROUND.get(name, "$A")
        frame = processors.TemplateProcessing(single=around, special_tokens=special)
        made.backend_tokenizer.post_processor = frame
        made.add_special_tokens({"additional_special_tokens": ["~"]})
        made.chat_template = CHAT if name == "begins" else None
        made.save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(common, "draw_curves", lambda folder: None)


def lines(folder, name="metrics.jsonl"):
    """The lines of a file of a run, which are JSON to the letter."""
    text = (folder / name).read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def say(count, **changes):
    items = [{"prompt": f"say {k}", "k": k} for k in range(count)]
    task = Task(items, lambda *texts, **_: [float(x.isalpha()) for x in texts[1]])
    return replace(task, **changes)


@pytest.mark.parametrize("place", CALLS)
def test_a_failing_function_leaves_a_checkpoint(place, script, tmp_path, capsys):
    """Of the last whole update; the run that goes on from it is the run, to the bit."""
    functions = {"formatters": lambda item: item["prompt"], "reward_processor": float}
    functions["external_transition"] = lambda prompt, **_: [prompt, prompt]
    functions["metrics_callback"] = lambda samples: {}
    calls = repeat(DEFAULT, 8 * CALLS[place]), [TimeoutError("no answer")]
    task = say(12, **functions)
    fails = Mock(wraps=getattr(task, place), side_effect=chain(*calls, repeat(DEFAULT)))
    task = replace(task, **{place: fails})
    args = tiny_args(script, tmp_path / "a", num_turns=2, num_train_epochs=3)
    with pytest.raises(InputError, match="TimeoutError: no answer"):
        script.train(args, task)
    (folder,) = (tmp_path / "a").iterdir()
    assert f"--resume {folder}" in capsys.readouterr().out
    counts = torch.load(folder / "checkpoint.pt", weights_only=True)["counts"]
    assert counts["updates"] == 8
    resumed = script.train(replace(args, resume=str(folder)), task)
    whole = script.train(replace(args, output_dir=str(tmp_path / "b")), task)
    assert same(weights(resumed), weights(whole))


def test_what_is_not_finite_and_what_is_the_callers(script, tmp_path, capsys):
    """Files are JSON whatever metrics and items hold; Task and arguments stay as they are; a log
    gets a line of progress every half minute: here the first, the last, perhaps one more."""
    (tmp_path / "posts.jsonl").write_text('{"prompt": "go", "k": NaN}\n' * 10)
    values = {"a": np.nan, "b": torch.tensor(-torch.inf), "c": torch.tensor(1)}
    task = say(8, metrics_callback=lambda samples: values)
    flags = {"train_file": str(tmp_path / "posts.jsonl"), "eval_interval": 3}
    args = tiny_args(script, tmp_path, num_train_epochs=6, **flags)
    before, parts = copy.deepcopy((args, task.train_dataset)), dict(vars(task))
    folder = script.train(args, task)
    assert all(getattr(task, name) is part for name, part in parts.items())
    assert (args, task.train_dataset) == before
    assert len(re.findall(r"\d+/54 \[", capsys.readouterr().err)) in (1, 2, 3)
    assert lines(folder)[-1]["eval/c"] == 1 and "eval/a" not in lines(folder)[-1]
    assert {x["item"]["prompt"] for x in lines(folder, "samples.jsonl")} == {"go"}


def test_a_terminal_without_the_prompts_letters(tmp_path):
    own = "from common import Task\nitems = [{'prompt': 'café 你好'}] * 8\n"
    own += "task = Task(items, lambda *texts: [0.0], items)\n"
    (tmp_path / "own.py").write_text(own, "utf-8")
    flags = f"--task {tmp_path}/own.py --num-train-epochs 1 --output-dir {tmp_path}"
    command = [sys.executable, str(ROOT / "iac_shared.py"), *flags.split()]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert "café ??" in done.stdout.decode("cp1252") and b"run folder" in done.stdout


HI, NONE = {"role": "user", "content": "hi"}, {"role": "assistant", "content": None}
PARTS = {"role": "user", "content": [{"text": "say "}, {"type": "text", "text": "1"}]}
TEXTS = [  # model, prompt, what is read, what is shown
    ("begins", "ab", "<unk>ab", "ab"), ("begins", "<unk>ab", "<unk>ab", "<unk>ab"),
    ("both", "ab", "<unk>ab", "ab"), ("both", "<unk>", "<unk>", "<unk>"),
    ("ends", "ab", "ab", "ab"), ("begins", [HI], "uhi<eos>:", "hi"),
    ("begins", [PARTS], f"u{PARTS['content']}<eos>:", "say 1"),
    ("begins", [NONE, HI], "a<eos>uhi<eos>:", "\nhi"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["v", "q"])
@pytest.mark.parametrize(("model", "prompt", "read", "shown"), TEXTS)
def test_special_tokens_around_texts(script, odd, kind, model, prompt, read, shown):
    """One that begins a text, once; an end only where the agent ended, or a template says so. No
    agent's text has one."""
    args = script.Args(device="cpu", critic_type=kind, max_new_tokens=3)
    actors, critics = team(script, args, *[[str(odd / model)] * 2] * 2)
    items, by_hand = [{"prompt": prompt}] * 20, lambda text: READER(text).input_ids
    for s in script.play(actors, critics, say(1), items, torch.Generator(), args):
        assert s.prompt_ids == [by_hand(read)] * 2
        drawn = [map(READER.decode, ids) for ids in s.completion_ids]
        plain = ["".join(x for x in row if len(x) == 1 and x != "~") for row in drawn]
        assert s.completions == plain
        wrote = [x + "<eos>" * e for x, e in zip(plain, s.ended, strict=True)]
        texts = [by_hand(read + text * (kind == "q")) for text in wrote]
        if script.__name__ == "maac":
            joint = [f"Agent {k}: {shown}\n" for k in (0, 1)]
            joint += [f"\nAgent {k}: {wrote[k]}" for k in (0, 1) if kind == "q"]
            texts = [by_hand("<unk>" * (model != "ends") + "".join(joint))]
        elif script.__name__ == "iac_shared" and kind == "q":
            texts = [by_hand(read) + ids for ids in s.completion_ids]
        assert s.critic_ids == texts
        assert f"agent 1 reads:\n{shown}\n" in common.dialogue(s)


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_the_probe_of_a_head_that_never_writes_a_token(odd, least):
    """The model is taken, and refused where a batch changes what it writes."""
    actor = load(str(odd / "plain"))
    cut = lambda m, i, scores: scores.index_fill(-1, torch.tensor([0]), least)
    actor.model.lm_head.register_forward_hook(cut)
    common.probe(actor, writes=True)
    actor.model.lm_head.register_forward_hook(lambda m, i, scores: scores + len(scores))
    with pytest.raises(InputError, match="left-padded"):
        common.probe(actor, writes=True)


UNREADABLE = [  # letters of a prompt, who cannot read it, critic_type, the critics' model
    *[(name, (61, "agent_1", "v", "plain")) for name in SCRIPTS],
    ("maac", (50, "critic_0", "v", "plain")), ("maac", (15, "critic_0", "q", "plain")),
    ("iac_separate", (30, "critic_1", "v", "short")),
    ("iac_separate", (21, "critic_1", "q", "short")),
]  # fmt: skip


@pytest.mark.parametrize("script, case", UNREADABLE, indirect=["script"])
def test_a_turn_that_cannot_be_read(script, case, odd, tmp_path, capsys):
    """A second turn ends its episode, here that of every odd item; a first one is refused."""
    letters, who, kind, critic = case
    flags = {"agent_model": str(odd / "plain"), "num_turns": 2, "log_samples": 99}
    if script.__name__ != "iac_shared":
        flags |= {"critic_type": kind, "critic_model": str(odd / critic)}
    args = tiny_args(script, tmp_path, max_new_tokens=4, **flags)
    formatters = [lambda item: "go", lambda item: item["prompt"]]
    task = say(16, formatters=formatters, eval_dataset=[])  # empty: no evaluation
    nexts = {f"say {k}": ["go", "x" * letters if k % 2 else "go"] for k in range(16)}
    task.external_transition = lambda prompt, **_: nexts[prompt]
    folder = script.train(replace(args, rollout_buffer_size=32), task)
    turns = [(x["item"]["k"] % 2, x["turn"]) for x in lines(folder, "samples.jsonl")]
    assert sorted(turns) == [(0, 0)] * 8 + [(0, 1)] * 8 + [(1, 0)] * 8
    metrics = lines(folder)[-1]
    assert metrics["rollout/unreadable"] == 0.5 and metrics["rollout/turns"] == 1.5
    told = r"an episode ends before turn 1 of .*'prompt': 'say .*: (\w+) is to read"
    told = re.findall(told, capsys.readouterr().err)  # of each learner its first
    assert who in told and len(set(told)) == len(told)
    task.train_dataset[3]["prompt"] = "x" * letters
    with pytest.raises(InputError, match=f"'k': 3.*{who}"):
        script.train(replace(args, num_turns=1), task)


@pytest.mark.parametrize("kind", ["v", "q"])
def test_a_turn_hangs_on_its_prompts_alone(kind, script, odd, tmp_path):
    """Not on what is written: a critic of actions must have room for the longest, though here
    every action is of one token. An evaluation plays the turns that training plays."""
    args = tiny_args(script, tmp_path, max_new_tokens=6, critic_type=kind, num_turns=2)
    actors, critics = team(script, args, ["tiny"] * 2, [str(odd / "plain")] * 2)
    for actor in actors:
        actor.end_ids = list(range(99))  # whatever is written ends it
    task = say(4, external_transition=lambda **_: ["go", "x" * 12])
    task = replace(task, eval_dataset=task.train_dataset)
    parts = [actors, critics, task, list(range(4)), torch.Generator(), args]
    evaluated = script.evaluate(actors, critics, task, args)
    ends = kind == "q" and script.__name__ == "maac"  # 56 tokens of 64, but up to 66
    for samples in (script.collect(*parts), evaluated):
        assert {len(ids) for s in samples for ids in s.completion_ids} == {1}
        assert [s.turn for s in samples] == ([0] * 4 if ends else [0, 1] * 4)
        assert {bool(s.cut) for s in samples if s.turn == 0} == {ends}


@pytest.mark.parametrize("folder", ["wandb", "tensorboard"])
def test_a_folder_of_a_packages_name(folder, tmp_path, monkeypatch):
    """Its import gives an empty module. W&B, told through TensorBoard, cannot start: a sentence
    before the first update. Where W&B is not asked for, TensorBoard is left out."""
    pytest.importorskip("tensorboard")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", Mock())
    monkeypatch.setitem(sys.modules, folder, ModuleType(folder))
    files = maac.train(tiny_args(maac, tmp_path), say(8)).glob("events*")
    assert any(files) == (folder == "wandb")
    with pytest.raises(InputError, match="^wandb_config"):
        maac.train(tiny_args(maac, tmp_path / "w", wandb_config="{}"), say(8))
    assert not any(x.stat().st_size for x in tmp_path.glob("w/*/metrics.jsonl"))
