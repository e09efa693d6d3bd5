"""README's exercises: each patch applies, is short, runs, and computes what it says."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_gradients,
    micro_learner,
    sample,
    small_task,
    tiny_args,
)

import common
import iac_separate

PATCHES = sorted(path.stem for path in (ROOT / "tests" / "exercises").glob("*.patch"))


def changed_lines(name):
    lines = (ROOT / "tests" / "exercises" / f"{name}.patch").read_text().splitlines()
    return sum(x[:1] in "+-" and x[:3] not in ("+++", "---") for x in lines if x)


@pytest.fixture
def exercise(tmp_path, monkeypatch):
    """The module that a patch makes of iac_separate.py."""

    def patched(name):
        shutil.copy(ROOT / "iac_separate.py", tmp_path)
        patch = ROOT / "tests" / "exercises" / f"{name}.patch"
        subprocess.run(["git", "apply", str(patch)], check=True, cwd=tmp_path)
        path = tmp_path / "iac_separate.py"
        spec = importlib.util.spec_from_file_location(f"{name}_exercise", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return patched


def metrics(module, folder, **flags):
    """The lines of a run of three updates with two turns, times aside."""
    flags = {"num_turns": 2, "rollout_buffer_size": 16, **flags}
    args = tiny_args(module, folder, **flags)
    made = module.train(args, small_task(24))
    lines = map(json.loads, (made / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]


def test_there_are_three():
    assert PATCHES == ["gae", "kl_penalty", "ratio_clipping"]


@pytest.mark.parametrize("name", PATCHES)
def test_an_exercise_changes_under_20_lines_and_runs(name, exercise, tmp_path):
    assert 0 < changed_lines(name) < 20
    lines = metrics(exercise(name), tmp_path / "runs", train_batch_size=8)
    assert lines != metrics(iac_separate, tmp_path / "runs", train_batch_size=8)


NEUTRAL = {
    "gae": {"gae_lambda": 0.0},
    "kl_penalty": {"kl_coef": 0.0},
    "ratio_clipping": {"ratio_clip_range": 1e9},
}


@pytest.mark.parametrize("name", PATCHES)
def test_an_exercise_that_is_switched_off_changes_nothing(name, exercise, tmp_path):
    """With one minibatch for all, ratios are 1, and their gradient is that of (4), though the
    loss is another number."""
    theirs = metrics(exercise(name), tmp_path / "runs", **NEUTRAL[name])
    ours = metrics(iac_separate, tmp_path / "runs")
    assert len(theirs) == len(ours) >= 4
    for one, other in zip(theirs, ours, strict=True):
        for key in one:
            if name != "ratio_clipping" or "policy_loss" not in key:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key


def episode(*rewards):
    """The samples of an episode, and in front of it the last turn of another."""
    turns = [sample([[2]], [[3]], r, turn=t, done=False) for t, r in enumerate(rewards)]
    turns[-1].done = True
    return [sample([[2]], [[3]], 7.0), *turns]


def test_gae_by_hand(exercise):
    """γ = 0.5, λ = 0.5: δ = (1 + 0.5·4 − 2, 0 + 0.5·8 − 4, 3 − 8) = (1, 0, −5), so
    A = (1 + 0.25·A_2, 0 + 0.25·A_3, −5) = (0.6875, −1.25, −5), and y = V + A."""
    module = exercise("gae")
    args = module.Args(discount=0.5, gae_lambda=0.5)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    targets = module.td_targets(episode(1.0, 0.0, 3.0), values, args)
    assert targets.tolist() == [7.0, 2.6875, 2.75, 3.0]
    args = replace(args, gae_lambda=1.0)  # the returns: 1 + 0.25·3, 0.5·3, 3
    targets = module.td_targets(episode(1.0, 0.0, 3.0), values, args)
    assert targets.tolist() == [7.0, 1.75, 1.5, 3.0]


def test_ratios_are_clipped(exercise):
    """At a ratio of e: no gradient for what is worth more, the ratio's for what is worth less."""
    module = exercise("ratio_clipping")
    args = module.Args(entropy_coef=0.0, max_grad_norm=0.0)
    samples = [sample([[2, 3]], [[4, 1]])]
    actor = micro_learner(module)
    with torch.no_grad():
        now = module.sequence_logprobs(actor, [[2, 3]], [[4, 1]], args)[0]
    for weight, old in ((1.0, now - 1), (-1.0, now - 1), (1.0, now)):
        columns = torch.stack([torch.tensor([weight]), old])
        losses = module.update_actor(actor, samples, 0, columns, args)
        ratio = (now - old).exp().item()
        expected = -min(ratio * weight, min(max(ratio, 0.8), 1.2) * weight)
        assert losses["policy_loss/agent_0"] == pytest.approx(expected, rel=1e-5)
    clipped, unclipped, plain = actor.optimizer.gradients
    assert all(g is None or g.abs().max() == 0 for g in clipped)
    scaled = [None if g is None else -g * torch.e for g in plain]
    assert_same_gradients(unclipped, scaled)


def test_the_kl_penalty_is_charged_to_the_targets(exercise):
    """By kl_coef times the difference of two log-probabilities, in pieces or at once."""
    module = exercise("kl_penalty")
    args = module.Args(num_agents=1, kl_coef=0.5, entropy_coef=0.0)
    actor, critic = micro_learner(module), micro_learner(module, seed=3, head=True)
    actor.start = micro_learner(module, seed=1).model
    samples = [sample([[2, 3]], [[4, 1]], 1.0), sample([[4]], [[2, 2, 1]], -1.0)]
    start = replace(actor, model=actor.start)
    expected = []
    for one in samples:
        texts = one.prompt_ids, one.completion_ids
        with torch.no_grad():
            pair = [
                module.sequence_logprobs(x, *texts, args)[0] for x in (actor, start)
            ]
        expected.append((pair[0] - pair[1]).item())
    assert max(map(abs, expected)) > 0.1
    for size in (None, 1):
        found = module.log_ratios(
            actor, samples, 0, replace(args, micro_batch_size=size)
        )
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert module.log_ratios(actor, [], 0, args).shape == (0,)
    module.critic_texts = lambda critic, samples, agent, args: [[2, 3], [4]]
    seen = []
    module.update_critic = lambda c, texts, targets, args: seen.append(targets) or {}
    module.update([actor], [critic], samples, args)
    charged = [1.0 - 0.5 * expected[0], -1.0 - 0.5 * expected[1]]
    assert sorted(seen[0].tolist()) == pytest.approx(sorted(charged), rel=1e-4)


def test_the_kl_penalty_keeps_the_policy_near_its_start(exercise, tmp_path):
    """The charge is 0 at the start; a large one holds the policy where it was."""
    module = exercise("kl_penalty")
    moved = {}
    for coefficient in (0.0, 30.0):
        args = tiny_args(module, tmp_path, kl_coef=coefficient, num_train_epochs=12)
        seen = []

        def note(actor, samples, agent, args, whole=module.log_ratios, seen=seen):
            seen.append(whole(actor, samples, agent, args))
            return seen[-1]

        module.log_ratios, whole = note, module.log_ratios
        module.train(replace(args, advantage_normalization=False), small_task(24))
        module.log_ratios = whole
        assert seen[0].abs().max() < 1e-5
        moved[coefficient] = torch.cat(seen[-6:]).square().mean().item()
    assert moved[30.0] < 0.5 * moved[0.0]


def test_a_patch_is_of_the_script_as_it_stands(exercise):
    """It says where it comes from, and common.py needs no change for it."""
    for name in PATCHES:
        text = (ROOT / "tests" / "exercises" / f"{name}.patch").read_text()
        assert "arXiv" in text.split("---")[0]
        assert exercise(name).common is common
