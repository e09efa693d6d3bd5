"""Kinds of input on which trainers failed. Others stand in test_pitfalls.py (22 and 26), test_runs.py
(100,000 items, heads of another width), test_tasks.py (task files), test_pictures.py (W&B)."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, save_model, tiny_args
from test_pitfalls import load, team
from tokenizers import normalizers, processors
from transformers import set_seed

import common
from common import InputError, Task

CALLS = {  # of the users' functions, in an update of four episodes of two turns
    "formatters": 16, "reward_func": 8, "reward_processor": 8, "external_transition": 4,
    "metrics_callback": 1,
}  # fmt: skip
ONE, ZERO = torch.tensor([1.0, 0.0])
READER = common.tiny_tokenizer()  # puts nothing around a text
CHAT = "<unk>{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}:"
AROUND = {"begins": "<unk> $A", "both": "<unk> $A <eos>", "ends": "$A <eos>"}
ODD = {"plain": 64, "short": 24, "strip": 64, **dict.fromkeys(AROUND, 256)}  # contexts


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
        gap = " " if name == "strip" else "<pad>"
        made.backend_tokenizer.normalizer = normalizers.Replace(gap, "")
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


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))]


def say(count, **changes):
    items = [{"prompt": f"say {k}", "k": k} for k in range(count)]
    task = Task(items, lambda *texts, **_: [float(x.isalpha()) for x in texts[1]])
    return replace(task, **changes)


def chats(spoil):
    """A task of two turns; its functions give `spoil` their name, arguments and result."""

    def grow(agent_completions, prompt_history_per_agent, **_):
        nexts = [history[-1] for history in prompt_history_per_agent]
        for chat, text in zip(nexts, agent_completions, strict=True):
            chat.append({"role": "assistant", "content": text})  # the usual way
        return nexts

    def pay(*texts, completion_ids, **_):
        return [ids.count(98) for ids in completion_ids[1]]

    def wrap(name, function):
        def wrapped(*given, **named):
            result = function(*given, **named)
            return spoil(name, [*given, *named.values()], result)

        return wrapped

    def watch(samples):
        return {"messages": max(len(s.prompts[0]) - s.turn for s in samples)}

    functions = [lambda item: item["prompt"], pay, float, grow, watch]
    pairs = zip(CALLS, functions, strict=True)
    items = [{"prompt": [{"role": "user", "content": "go"}]} for _ in range(12)]
    return Task(items, eval_dataset=items[:2], **{k: wrap(k, f) for k, f in pairs})


def change(name, given, result):
    """Seed, and empty the lists, dicts and samples that were given, and all in them."""
    set_seed(42)
    kept = copy.deepcopy(result)
    while given:
        thing = given.pop()
        thing = vars(thing) if isinstance(thing, common.Sample) else thing
        if isinstance(thing, dict | list):
            given += thing.values() if isinstance(thing, dict) else thing
            thing.clear()
    return kept


def test_users_functions_change_nothing(script, odd, tmp_path):
    """Neither items nor what is read, drawn and trained on: the run is, to the bit, that of
    functions that leave all alone. Special tokens are paid by their ids, and not in texts."""
    flags = {"agent_model": str(odd / "plain"), "num_turns": 2, "num_train_epochs": 2}
    args = tiny_args(script, tmp_path, max_new_tokens=6, log_samples=99, **flags)
    ends = []
    for spoil in (lambda name, given, result: copy.deepcopy(result), change):
        task = chats(spoil)
        before = copy.deepcopy(task.train_dataset)
        folder = script.train(args, task)
        assert task.train_dataset == before
        assert {line.get("rollout/messages", 1) for line in lines(folder)} == {1}
        ends.append((weights(folder), lines(folder, "samples.jsonl")))
    assert ends[0] == ends[1]
    trained = [x for x in ends[0][1] if x["phase"] == "train"]
    for turn in (0, 1):  # twelve random characters each: as good as never the same
        texts = [str(x["completions"]) for x in trained if x["turn"] == turn]
        assert len(set(texts)) == len(texts) == 24 and "~" not in str(texts)
    assert sum(x["reward"] for x in trained) > 0


@pytest.mark.parametrize("place", CALLS)
def test_a_failing_function_leaves_a_checkpoint(place, script, tmp_path, capsys):
    """Of the last whole update; the run that goes on from it is the run, to the bit."""
    calls = []

    def fail(name, given, result):
        calls.append(name)
        if name == place and calls.count(place) == 8 * CALLS[place] + 1:
            raise TimeoutError("the judge did not answer")
        return result

    task = replace(chats(fail), eval_dataset=None)
    flags = {"num_turns": 2, "num_train_epochs": 3, "save_interval": 0}
    args = tiny_args(script, tmp_path / "a", **flags)
    with pytest.raises(InputError, match="TimeoutError: the judge did not answer"):
        script.train(args, task)
    (folder,) = (tmp_path / "a").iterdir()
    assert f"--resume {folder}" in capsys.readouterr().out
    counts = torch.load(folder / "checkpoint.pt", weights_only=True)["counts"]
    assert counts["updates"] == 8
    resumed = script.train(replace(args, resume=str(folder)), task)
    task = replace(task, eval_dataset=[])  # is no evaluation
    whole = script.train(replace(args, output_dir=str(tmp_path / "b")), task)
    assert weights(resumed) == weights(whole)
    assert not any("eval/return" in line for line in lines(whole))


@pytest.mark.parametrize("rewards", [
    [np.bool_(True), np.bool_(False)], [True, 0], [np.float16(1), 0], np.array([True, False]),
    [np.array(1.0), np.array(0)], [ONE, ZERO], [ONE.bool(), ZERO.bool()], torch.tensor([1, 0]),
    [ONE.bfloat16(), ZERO.bfloat16()], [ONE.clone().requires_grad_(), ZERO],
])  # fmt: skip
def test_rewards_of_many_types(rewards):
    samples = [common.Sample({}, 0, 0, ["a"], completions=["b"])] * 2
    paid = Task([], lambda texts: rewards).pay(samples)
    process = {"reward_processor": lambda k: rewards[int(k)]}
    for found in (paid, Task([], lambda texts: [0, 1], **process).pay(samples)):
        assert found == [1.0, 0.0] and {type(reward) for reward in found} == {float}


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
    ("ends", "ab", "ab", "ab"), ("begins", [HI], "<unk>uhi<eos>:", "hi"),
    ("begins", [PARTS], f"<unk>u{PARTS['content']}<eos>:", "say 1"),
    ("begins", [NONE, HI], "<unk>a<eos>uhi<eos>:", "\nhi"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["v", "q"])
@pytest.mark.parametrize(("model", "prompt", "read", "shown"), TEXTS)
def test_special_tokens_around_texts(script, odd, kind, model, prompt, read, shown):
    """One that begins a text, once; an end only where the agent ended, or a template says so."""
    args = script.Args(device="cpu", critic_type=kind, max_new_tokens=3)
    actors, critics = team(script, args, *[[str(odd / model)] * 2] * 2)
    items, by_hand = [{"prompt": prompt}] * 20, lambda text: READER(text).input_ids
    for s in script.play(actors, critics, say(1), items, torch.Generator(), args):
        assert s.prompt_ids == [by_hand(read)] * 2
        wrote = [x + "<eos>" * e for x, e in zip(s.completions, s.ended, strict=True)]
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


UNREADABLE = {  # prompt, the actors' model, the critics' type and model where they cannot read
    "empty": ("", "plain"), "nothing": (" ", "strip"), "no_room": ("x" * 61, "plain"),
    "maac_v": ("x" * 50, "plain", "v", "plain"), "maac_q": ("x" * 15, "plain", "q", "plain"),
    "iac_separate_v": ("x" * 30, "plain", "v", "short"),
    "iac_separate_q": ("x" * 21, "plain", "q", "short"),
}  # fmt: skip
PAIRS = [(x, k) for k, v in UNREADABLE.items() for x in SCRIPTS if not v[2:] or x in k]


@pytest.mark.parametrize(("script", "kind"), PAIRS, indirect=["script"])
def test_a_turn_that_cannot_be_read(kind, script, odd, tmp_path, capsys):
    """A second turn ends its episode, here that of every odd item; a first one is refused."""
    bad, model, *critic = UNREADABLE[kind]
    flags = {"agent_model": str(odd / model), "num_turns": 2, "log_samples": 99}
    if critic:
        flags |= {"critic_type": critic[0], "critic_model": str(odd / critic[1])}
    args = tiny_args(script, tmp_path, max_new_tokens=4, **flags)
    who = f"critic_{int(kind[0] == 'i')}" if critic else "agent_1"
    task = say(16, formatters=[lambda item: "go", lambda item: item["prompt"]])
    nexts = {f"say {k}": ["go", bad if k % 2 else "go"] for k in range(16)}
    task.external_transition = lambda prompt, **_: nexts[prompt]
    folder = script.train(replace(args, rollout_buffer_size=32), task)
    turns = [(x["item"]["k"] % 2, x["turn"]) for x in lines(folder, "samples.jsonl")]
    assert sorted(turns) == [(0, 0)] * 8 + [(0, 1)] * 8 + [(1, 0)] * 8
    metrics = lines(folder)[-1]
    assert metrics["rollout/unreadable"] == 0.5 and metrics["rollout/turns"] == 1.5
    told = r"an episode ends before turn 1 of .*'prompt': 'say .*: (\w+) is to read"
    told = re.findall(told, capsys.readouterr().err)  # of each learner its first
    assert who in told and len(set(told)) == len(told)
    task.train_dataset[3]["prompt"] = bad
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
    parts = [critics, task, list(range(4)), torch.Generator(), args]
    played = (
        script.collect(actors, *parts),
        script.evaluate(actors, critics, task, args),
    )
    ends = kind == "q" and script.__name__ == "maac"  # 56 tokens of 64, but up to 66
    for samples in played:
        assert {len(ids) for s in samples for ids in s.completion_ids} == {1}
        assert [s.turn for s in samples] == ([0] * 4 if ends else [0, 1] * 4)
        assert {bool(s.cut) for s in samples if s.turn == 0} == {ends}


@pytest.mark.parametrize("folder", ["wandb", "tensorboard", "matplotlib"])
def test_a_folder_of_a_packages_name(folder, script, tmp_path, monkeypatch):
    """Its import gives an empty module. W&B, told through TensorBoard, cannot start: a sentence
    before the first update. Where W&B is not asked for, the other two are left out."""
    monkeypatch.undo()
    assert pytest.importorskip("matplotlib") and pytest.importorskip("tensorboard")
    start = lambda **_: SimpleNamespace(finish=lambda exit_code: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start))
    monkeypatch.setitem(sys.modules, folder, ModuleType(folder))
    for name in ("torch.utils.tensorboard", "matplotlib.figure"):
        if folder in name:
            monkeypatch.delitem(sys.modules, name, raising=False)
    files = script.train(tiny_args(script, tmp_path), say(8)).iterdir()
    left = {path.name[:6] for path in files} & {"events", "curves"}
    gone = {"tensorboard": "events", "matplotlib": "curves"}.get(folder)
    assert left == {"events", "curves"} - {gone}
    if folder != "matplotlib":
        with pytest.raises(InputError, match="^wandb_config"):
            script.train(tiny_args(script, tmp_path / "w", wandb_config="{}"), say(8))
        assert not any(x.stat().st_size for x in tmp_path.glob("w/*/metrics.jsonl"))
