"""Whole runs: what they write, that they learn, that they can be repeated and combined."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    micro_learner,
    sample,
    small_task,
    tiny_args,
    update_actor,
)
from test_pitfalls import save_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import common

MEMORY = ("THP_MEM", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
CLEAN = {k: value for k, value in os.environ.items() if not k.startswith(MEMORY)}


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_folder_holds_all(script, tmp_path, capsys):
    args = tiny_args(script, tmp_path, seed=7)
    folder = script.train(args, small_task(16))
    assert folder.name.startswith(f"{script.__name__}__task__7__")
    assert json.loads((folder / "args.json").read_text())["seed"] == 7
    metrics = lines(folder)
    assert [m["step"] for m in metrics] == [0, 8, 16, 16]
    assert {"rollout/reward", "losses/policy_loss", "losses/value_loss"} <= set(
        metrics[1]
    )
    assert "eval/reward" in metrics[0] and "eval/reward" in metrics[-1]
    samples = lines(folder, "samples.jsonl")
    assert {s["phase"] for s in samples} == {"train", "eval"}
    for one in samples:
        assert len(one["prompts"]) == len(one["completions"]) == 2
        assert math.isfinite(one["reward"])
    for agent in ("agent_0", "agent_1"):
        model = AutoModelForCausalLM.from_pretrained(folder / agent)
        tokenizer = AutoTokenizer.from_pretrained(folder / agent)
        out = model.generate(
            **tokenizer("target 3\n", return_tensors="pt"), max_new_tokens=1
        )
        assert out.shape == (1, 10)
    critics = {"maac": ["critic_0"], "iac_separate": ["critic_0", "critic_1"]}
    for critic in critics.get(script.__name__, ["agent_0", "agent_1"]):
        assert (folder / critic / "value_head.pt").is_file()
    assert str(folder) in capsys.readouterr().out


def test_shares_of_the_time_are_those_of_training(script, tmp_path, monkeypatch):
    """By a clock of our own: phases, the rest, and evaluations, which are no training time."""
    now = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    actor = micro_learner(script)

    @common.timed("generation")
    def generate(learner):
        now[0] += 3

    @common.timed("update")
    def update(learner, seconds=0):
        now[0] += seconds

    samples = [sample([[2]], [[3]], episode=k) for k in range(4)]
    args = tiny_args(script, tmp_path, num_train_epochs=2, logging_steps=4)
    with common.Run(args, small_task(4), "clock", [actor, actor]) as run:
        now[0] += 50  # loading
        generate(actor)
        now[0] += 100
        run.log_evaluation(samples)
        generate(actor)
        update(actor, seconds=6)
        now[0] += 1
        run.log_update(samples, {})
        update(actor, seconds=2)
        run.log_update(samples, {})
    first, second = [m for m in lines(run.folder) if "rollout/reward" in m]
    shares = [
        first[f"time/{phase}_share"] for phase in ("generation", "update", "rest")
    ]
    assert shares == pytest.approx([0.3, 0.6, 0.1])
    assert second["time/update_share"] == 1 and "time/generation_share" not in second
    assert second["time/samples_per_second"] == pytest.approx(8 / 12)


def test_the_phases_of_the_time(script):
    """What each timed function counts as."""
    args = script.Args(device="cpu", max_new_tokens=2)
    actor = micro_learner(script)
    script.generate(actor, [[2]], args)
    assert set(actor.seconds) == {"generation"}
    critic = micro_learner(script, head=True)
    script.estimate_values(critic, [[2, 3]], args)
    assert set(critic.seconds) == {"values"}
    actor.seconds.clear()
    update_actor(script, actor, [sample([[2]], [[3]])], 0, torch.ones(1), args)
    assert set(actor.seconds) == {"update"}
    if script.__name__ != "iac_shared":
        critic.seconds.clear()
        script.update_critic(critic, [[2]], torch.ones(1), args)
        assert set(critic.seconds) == {"update"}


def test_a_reward_function_may_be_a_plain_object(script, tmp_path):
    """One that cannot be hashed, and takes a keyword."""

    @dataclass
    class Reward:
        worth: float

        def __call__(self, firsts, seconds, batch_items):
            return [self.worth * len(batch_items) for _ in firsts]

    folder = script.train(
        tiny_args(script, tmp_path), replace(small_task(8), reward_func=Reward(0.5))
    )
    assert lines(folder)[1]["rollout/reward"] == 0.5


def test_minibatches_are_drawn_at_random_and_stand_by_length(script, tmp_path):
    """Every sample once, minibatches of the asked size, those of each by length."""
    lengths = [5, 1, 9, 3, 7, 2, 8, 4, 6, 10, 11]
    samples = [sample([[2] * n], [[1]]) for n in lengths]
    args = tiny_args(script, tmp_path, train_batch_size=4)
    torch.manual_seed(0)
    batches = common.minibatches(samples, args)
    assert [len(batch) for batch, _ in batches] == [4, 4, 3]
    assert [share for _, share in batches] == [4 / 11, 4 / 11, 3 / 11]
    assert sorted(k for batch, _ in batches for k in batch) == list(range(11))
    for batch, _ in batches:
        sizes = [lengths[k] for k in batch]
        assert sizes == sorted(sizes)
    assert batches != common.minibatches(samples, args)


def huge_pages_on_request():
    """Whether this system has 4 KB pages and gives huge ones to who asks, as usual."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked = setting.is_file() and "[madvise]" in setting.read_text()
    return asked and os.sysconf("SC_PAGE_SIZE") == 4096


@pytest.mark.skipif(not huge_pages_on_request(), reason="no huge pages on request")
def test_freed_memory_is_kept_and_comes_in_huge_pages():
    """Page faults of a tensor of 200 MB, taken three times: 48,829 each time without."""
    code = (
        "import common, resource, torch\n"
        "for _ in range(3):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(50_000_000)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=CLEAN)
    first, _, third = map(int, out.split())
    assert first < 5_000 and third < 50


def test_critics_go_on_where_a_run_left_them(script, tmp_path):
    """Models and value heads of a run can be given to the next one."""
    folder = script.train(tiny_args(script, tmp_path), small_task(16))
    agents = tuple(str(folder / f"agent_{k}") for k in range(2))
    heads = {
        "maac": {"critics": (str(folder / "critic_0"),)},
        "iac_separate": {
            "critics": tuple(str(folder / f"critic_{k}") for k in range(2))
        },
    }.get(script.__name__, {})
    args = tiny_args(script, tmp_path, agents=agents, **heads)
    names = heads.get("critics", agents)
    role = "agent" if script.__name__ == "iac_shared" else "critic"
    auto_class = AutoModelForCausalLM if role == "agent" else AutoModel
    learners = common.load_learners(role, auto_class, list(names), args)
    for learner in learners:
        learner.value_head = script.value_head(learner, None)
    common.restore_heads(learners, args)
    assert all(learner.value_head[0].weight.abs().sum() > 0 for learner in learners)
    script.train(args, small_task(8))


def test_eval_only_trains_nothing(script, tmp_path):
    folder = script.train(tiny_args(script, tmp_path), small_task(16))
    agents = tuple(str(folder / f"agent_{k}") for k in range(2))
    args = tiny_args(script, tmp_path, agents=agents, eval_only=True)
    again = script.train(args, small_task(16))
    metrics = lines(again)
    assert len(metrics) == 1 and "eval/reward" in metrics[0]
    assert metrics[0]["eval/reward"] == lines(folder)[-1]["eval/reward"]
    assert not (again / "agent_0").exists()


def test_the_same_seed_gives_the_same_run(script, tmp_path):
    runs = []
    for seed in (1, 1, 2):
        args = tiny_args(
            script, tmp_path, seed=seed, train_batch_size=3, temperature=0.9
        )
        folder = script.train(args, small_task(24))
        metrics = lines(folder)
        runs.append([{k: v for k, v in m.items() if "time/" not in k} for m in metrics])
    assert runs[0] == runs[1] != runs[2]


COMBINATIONS = [
    {"num_agents": 1},
    {"num_agents": 3, "critic_type": "q"},
    {"num_agents": 5, "num_turns": 2, "num_generations": 2},
    {
        "num_turns": 3,
        "num_generations": 3,
        "critic_type": "q",
        "early_termination_threshold": 0.4,
    },
    {"num_turns": 2, "discount": 0.5, "external_prompt_passthrough": True, "top_k": 20},
    {"max_new_tokens": 3, "top_p": 0.9, "micro_batch_size": 3, "train_batch_size": 5},
    {
        "dtype": "bfloat16",
        "value_loss_coef": 0.5,
        "max_grad_norm": 0.0,
        "entropy_coef": 0.0,
    },
    {"advantage_normalization": False, "logging_steps": 1000, "eval_interval": 0},
    {"rollout_buffer_size": 1, "advantage_normalization": False},
    {"rollout_buffer_size": 1000, "num_train_epochs": 3, "eval_batch_size": 3},
]


@pytest.mark.parametrize("flags", COMBINATIONS, ids=str)
def test_combinations_of_flags(script, flags, tmp_path):
    """Every combination trains: the weights move, the metrics are finite, all items count."""
    head = {"value_head_hidden_dim": 8} if script.__name__ == "iac_shared" else {}
    head = head or {"critic_value_head_hidden_dim": 8}
    args = tiny_args(script, tmp_path, **{**head, **flags})
    task = small_task(12)
    folder = script.train(args, task)
    metrics = lines(folder)
    values = [v for m in metrics for v in m.values()]
    assert all(math.isfinite(v) for v in values)
    assert metrics[-1]["step"] == 12 * args.num_train_epochs
    generations = args.num_generations
    turns = [m["rollout/turns"] for m in metrics if "rollout/turns" in m]
    assert all(1 <= t <= args.num_turns for t in turns)
    if args.early_termination_threshold is None:
        assert turns == [args.num_turns] * len(turns)
    if (
        flags.get("rollout_buffer_size", 8) == 8
        and args.early_termination_threshold is None
    ):
        samples = 12 * generations * args.num_turns
        per_update = (
            math.ceil(8 / (generations * args.num_turns)) * generations * args.num_turns
        )
        assert metrics[-1]["update"] == math.ceil(samples / per_update)
    actors = common.load_learners(
        "agent", AutoModelForCausalLM, common.model_names(args), args
    )
    for actor in actors:
        trained = AutoModelForCausalLM.from_pretrained(folder / actor.name)
        pairs = zip(actor.model.parameters(), trained.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


def test_llama_beside_gpt2_with_other_critics(script, tmp_path):
    """Heterogeneous agents and critics, each with its own tokenizer."""
    gpt2 = save_model(tmp_path / "gpt2", "gpt2", n_positions=256)
    critics = {"maac": (gpt2,), "iac_separate": (gpt2, "tiny")}.get(script.__name__, ())
    args = tiny_args(
        script, tmp_path, agents=("tiny", gpt2), critics=critics, critic_type="q"
    )
    folder = script.train(args, small_task(16))
    kinds = [
        json.loads((folder / f"agent_{k}" / "config.json").read_text())["model_type"]
        for k in (0, 1)
    ]
    assert kinds == ["llama", "gpt2"]


def test_a_buffer_fills_over_early_ends(script, tmp_path):
    """With early ends the buffer takes more items, until it holds enough samples."""
    counts = []
    task = small_task(
        24, metrics_callback=lambda samples: {"n": counts.append(len(samples)) or 0}
    )
    task.reward_func = lambda a, b, batch_items: (
        [float(batch_items[0]["target"] % 2)] * len(a)
    )
    args = tiny_args(
        script, tmp_path, num_turns=4, early_termination_threshold=0.5, rollout_buffer_size=16,
        eval_interval=0, eval_num_samples=1,
    )  # fmt: skip
    folder = script.train(args, task)
    updates = counts[1:-1]
    assert all(16 <= count < 16 + 4 for count in updates[:-1])
    assert sum(updates) == 12 * 1 + 12 * 4 == 60
    assert lines(folder)[-1]["step"] == 24


def test_every_script_learns(script, tmp_path):
    """In a minute's fraction the team writes numbers and is paid several times the start."""
    args = tiny_args(
        script,
        tmp_path,
        num_train_epochs=4,
        rollout_buffer_size=64,
        logging_steps=200,
        eval_interval=0,
    )
    folder = script.train(args, common.sum_to_target(args))
    rewards = [m["rollout/reward"] for m in lines(folder) if "rollout/reward" in m]
    assert rewards[0] < 0.1
    assert np.mean(rewards[-5:]) > 0.2


def test_metrics_callback_reaches_the_metrics(script, tmp_path):
    task = small_task(8, metrics_callback=lambda samples: {"mine": float(len(samples))})
    metrics = lines(script.train(tiny_args(script, tmp_path), task))
    assert metrics[0]["eval/mine"] == 4.0 and metrics[1]["rollout/mine"] == 8.0
