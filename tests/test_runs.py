"""Whole runs: what they write, that they learn, that they can be repeated and combined."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from benchmarks.survival import outcome, same
from conftest import ROOT, sample, save_model, small_task, tiny_args
from test_resume import bare  # noqa: F401 - it is for every test here too
from transformers import AutoModelForCausalLM

import common


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_folder_holds_all(script, tmp_path):
    """Flags, lines, samples, and agents: without epochs they write what they wrote at its end."""
    args = tiny_args(script, tmp_path, seed=7, log_samples=4, adam_beta2=0.9)
    folder = script.train(args, small_task(16))
    assert folder.name.startswith(f"{script.__name__}__sum_to_target__7__")
    flags = json.loads((folder / "args.json").read_text())
    own = {"seed": 7, "train_items": 16, "ranks": 1, "script": f"{script.__name__}.py"}
    assert own.items() <= flags.items()
    metrics = lines(folder)
    assert [m["step"] for m in metrics] == [0, 8, 16, 16]
    losses = {"losses/policy_loss", "losses/value_loss", "rollout/reward"}
    assert [losses <= set(m) for m in metrics] == [False, True, True, False]
    assert ["eval/reward" in m for m in metrics] == [True, False, False, True]
    samples = lines(folder, "samples.jsonl")
    assert [s["phase"] for s in samples] == ["eval"] * 4 + ["train"] * 8 + ["eval"] * 4
    for one in samples:
        texts = [[text] for text in one["completions"]]
        paid = small_task().reward_func(*texts, batch_items=[one["item"]])
        assert [one["reward"]] == paid and one["prompts"] == [one["item"]["prompt"]] * 2
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizers"]
    shared = script.__name__ == "iac_shared"  # its value heads have a rate of their own
    for name, optimizer in state.items():
        found = [(group["lr"], group["betas"]) for group in optimizer["param_groups"]]
        rates = [2e-3, 1e-3] if shared else [2e-3 if "agent" in name else 1e-3]
        assert found == [(rate, (0.9, 0.9)) for rate in rates]
    agents = tuple(str(folder / f"agent_{k}") for k in range(2))
    args = replace(args, agents=agents, num_train_epochs=0)
    again = script.train(args, small_task(16))
    assert lines(again, "samples.jsonl") == [{**s, "step": 0} for s in samples[-4:]]
    assert [m["eval/reward"] for m in lines(again)] == [metrics[-1]["eval/reward"]]
    for name in ("agent_0/model.safetensors", "agent_1/model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_rate_is_that_of_training(script, tmp_path, monkeypatch):
    """By a clock of our own: 4 samples in 10 seconds, then in 2, without the evaluation's 100."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    samples = [sample([[2], [2]], [[3], [3]], episode=k) for k in range(4)]
    args = tiny_args(script, tmp_path, num_train_epochs=2, logging_steps=4)
    with common.Run(args, small_task(4), "clock.py", []) as run:
        now[0] += 100
        run.log_evaluation(samples)
        for seconds in (10, 2):
            now[0] += seconds
            run.begin_update(samples)
            run.log_update({})
    rates = [m.get("time/samples_per_second") for m in lines(run.folder)]
    assert rates == [None, 0.4, 2.0]
    assert [m["time/seconds"] for m in lines(run.folder)] == [100, 110, 112]


def test_minibatches_are_drawn_at_random_and_stand_by_length(script, tmp_path):
    """Every sample once, minibatches of the asked size, those of each by length."""
    lengths = [5, 1, 9, 3, 7, 2, 8, 4, 6, 10, 11]
    samples = [sample([[2] * n], [[1]]) for n in lengths]
    args = tiny_args(script, tmp_path, train_batch_size=4)
    generator = torch.Generator().manual_seed(0)
    dealt = script.minibatches(samples, generator, args)
    batches, shares = map(list, zip(*dealt, strict=True))
    assert sorted(k for batch in batches for k in batch) == list(range(11))
    assert shares == [len(batch) / 11 for batch in batches] == [4 / 11, 4 / 11, 3 / 11]
    assert all(batch == sorted(batch, key=lengths.__getitem__) for batch in batches)
    assert dealt != script.minibatches(samples, generator, args)


def test_freed_memory_is_kept_and_comes_in_huge_pages():
    """Page faults of a tensor of 200 MB, taken three times: 48,829 each time without."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give huge pages to who asks, as usual")
    code = """import common, resource, torch
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    memory = ("THP_MEM", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {k: value for k, value in os.environ.items() if not k.startswith(memory)}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=clean)
    first, _, third = map(int, out.split())
    assert first < 5_000 and third < 50


def test_the_same_seed_gives_the_same_run(script, tmp_path):
    runs = []
    for seed in (1, 1, 2):
        args = tiny_args(script, tmp_path, seed=seed, train_batch_size=3)
        runs.append(outcome(script.train(args, small_task(24))))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


COMBINATIONS = [
    {"num_agents": 1},
    {"num_agents": 5, "num_turns": 2, "num_generations": 2},
    {"num_agents": 3, "num_turns": 3, "num_generations": 3, "critic_type": "q", "early_termination_threshold": 0.4},
    {"num_turns": 2, "discount": 0.5, "external_prompt_passthrough": True, "top_k": 20},
    {"max_new_tokens": 3, "top_p": 0.9, "micro_batch_size": 3, "train_batch_size": 5},
    {"dtype": "bfloat16", "value_loss_coef": 0.5, "max_grad_norm": 0.0, "entropy_coef": 0.0},
    {"rollout_buffer_size": 1, "advantage_normalization": False, "eval_num_samples": 0},
    {"rollout_buffer_size": 1000, "num_train_epochs": 3, "logging_steps": 1000, "eval_interval": 0, "eval_batch_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("flags", COMBINATIONS, ids=str)
def test_combinations_of_flags(script, flags, tmp_path):
    """Every combination trains: weights move, metrics are finite, all items count. Products of
    float32 in less are for runs in bfloat16; the caller's setting comes back."""
    hidden = {f.name: 8 for f in fields(script.Args) if f.name.endswith("hidden_dim")}
    args, precision = tiny_args(script, tmp_path, **hidden, **flags), set()
    note = lambda _: precision.add(torch.get_float32_matmul_precision()) or {}
    folder = script.train(args, small_task(12, metrics_callback=note))
    assert precision == {"medium" if args.dtype == "bfloat16" else "highest"}
    assert torch.get_float32_matmul_precision() == "highest"
    metrics = lines(folder)
    assert all(math.isfinite(v) for m in metrics for v in m.values())
    assert metrics[-1]["step"] == 12 * args.num_train_epochs
    assert any("eval/reward" in m for m in metrics) == (args.eval_num_samples > 0)
    if args.early_termination_threshold is None:
        turns = {m["rollout/turns"] for m in metrics if "rollout/turns" in m}
        assert turns == {args.num_turns}
        episodes = args.num_turns * args.num_generations  # samples of an item
        items = math.ceil(args.rollout_buffer_size / episodes)  # of an update
        assert metrics[-1]["update"] == args.num_train_epochs * math.ceil(12 / items)
    names, count = ("tiny",) * args.num_agents, args.num_agents
    actors = common.load_learners("agent", AutoModelForCausalLM, names, count, args)
    for actor in actors:
        trained = AutoModelForCausalLM.from_pretrained(folder / actor.name)
        pairs = zip(actor.model.parameters(), trained.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


def test_llama_beside_gpt2_with_other_critics(script, tmp_path):
    """Heterogeneous agents and critics, each with its own tokenizer."""
    gpt2 = save_model(tmp_path / "gpt2", "gpt2", n_positions=256)
    critics = {"maac": (gpt2,), "iac_separate": (gpt2, "tiny")}.get(script.__name__, ())
    own = {"critics": critics} if critics else {}
    args = tiny_args(script, tmp_path, agents=("tiny", gpt2), critic_type="q", **own)
    folder = script.train(args, small_task(16))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
    found = [any(".wte." in key for key in weights) for weights in state.values()]
    assert found == [name == gpt2 for name in args.agents + critics]


def test_a_buffer_fills_over_early_ends(script, tmp_path):
    """With early ends the buffer takes more items, until it holds enough samples."""

    def reward(*texts, batch_items):
        return [float(batch_items[0]["target"] % 2)] * len(texts[0])

    count = lambda samples: {"count": len(samples)}
    task = small_task(24, reward_func=reward, metrics_callback=count)
    flags = {"num_turns": 4, "early_termination_threshold": 0.5, "logging_steps": 1}
    args = tiny_args(script, tmp_path, rollout_buffer_size=16, **flags)
    metrics = lines(script.train(args, task))
    counts = [m["rollout/count"] for m in metrics if "rollout/count" in m]
    assert len(counts) == 4 and all(16 <= count < 16 + 4 for count in counts[:-1])
    assert sum(counts) == 12 * 1 + 12 * 4 == 60  # the odd targets end at once
    assert metrics[-1]["step"] == 24


def test_the_first_update_does_not_wait_for_the_items(script, tmp_path, monkeypatch):
    """Of 100,000 items it reads its own eight."""
    items = MagicMock()
    items.__len__.return_value = 100_000
    items.__getitem__.side_effect = lambda k: {"prompt": f"{k}", "target": k}
    items.__iter__.side_effect = AssertionError("all items are read")
    monkeypatch.setattr(script, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.train(tiny_args(script, tmp_path), small_task(train_dataset=items))
    assert items.__getitem__.call_count == 8


def test_every_script_learns(script, tmp_path):
    """In seconds the team writes numbers, and is paid several times what it began with."""
    flags = {"num_train_epochs": 3, "rollout_buffer_size": 64, "logging_steps": 200}
    args = tiny_args(script, tmp_path, **flags)
    folder = script.train(args, common.sum_to_target(args))
    rewards = [m["rollout/reward"] for m in lines(folder) if "rollout/reward" in m]
    assert rewards[0] < 0.1 and np.mean(rewards[-5:]) > 0.15
