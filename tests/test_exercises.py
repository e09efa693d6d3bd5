"""The exercises: each patch applies, is short, runs, and computes what it says."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_gradients,
    logprobs_of,
    micro_learner,
    sample,
    small_task,
    tiny_args,
)

import iac_separate

FOLDER = ROOT / "tests" / "exercises"
OFF = {  # flags with which a patch changes nothing
    "critic_warmup": {"critic_warmup": 0},
    "parameter_sharing": {"num_agents": 1},
    "gae": {"gae_lambda": 0.0},
    "kl_penalty": {"kl_coef": 0.0},
    "ratio_clipping": {"ratio_clip_range": 1e9},
}


def changed_lines(name):
    lines = (FOLDER / f"{name}.patch").read_text().splitlines()
    return sum(x[:1] in "+-" and x[:3] not in ("+++", "---") for x in lines if x)


@pytest.fixture
def exercise(tmp_path, monkeypatch):
    """The module that a patch makes of iac_separate.py; runs draw no picture."""
    monkeypatch.setattr("common.draw_curves", lambda folder: None)

    def patched(name):
        copy = Path(shutil.copy(ROOT / "iac_separate.py", tmp_path))
        apply = ["git", "apply", FOLDER / f"{name}.patch"]
        subprocess.run(apply, check=True, cwd=tmp_path)
        copy.rename(tmp_path / f"{name}.py")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return patched


def metrics(module, folder, **flags):
    """The lines of a run of three updates with two turns, times aside."""
    args = tiny_args(module, folder, num_turns=2, rollout_buffer_size=16, **flags)
    made = module.train(args, small_task(24))
    lines = map(json.loads, (made / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]


@pytest.mark.parametrize("name", OFF)
def test_an_exercise_is_short_and_can_be_switched_off(name, exercise, tmp_path):
    """Its patch says where it comes from. With one minibatch for all, ratios are 1, and their
    gradient is that of (4), though the loss is another number. A charge of 0 and a ratio of 1
    are exact; GAE forms V + (y - V), off by 1e-7 in float32, which three steps of Adam can
    carry on a thousandfold."""
    assert OFF.keys() == {path.stem for path in FOLDER.glob("*.patch")}
    assert 0 < changed_lines(name) < 25
    assert "arXiv" in (FOLDER / f"{name}.patch").read_text().split("---")[0]
    module, folder = exercise(name), tmp_path / "runs"
    theirs = metrics(module, folder, **OFF[name])
    alone = OFF[name] if name == "parameter_sharing" else {}
    ours = metrics(iac_separate, folder, **alone)
    assert len(theirs) == len(ours) >= 4
    for one, other in zip(theirs, ours, strict=True):
        for key in one.keys() | other.keys():
            if name != "ratio_clipping" or "policy_loss" not in key:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-5), key
    small = {"train_batch_size": 8}
    assert metrics(module, folder, **small) != metrics(iac_separate, folder, **small)


def test_gae_by_hand(exercise):
    """γ = 0.5, λ = 0.5: δ = (1 + 0.5·4 − 2, 0 + 0.5·8 − 4, 3 − 8) = (1, 0, −5), so
    A = (1 + 0.25·A_2, 0 + 0.25·A_3, −5) = (0.6875, −1.25, −5), and y = V + A."""
    module = exercise("gae")
    samples = [sample([[2]], [[3]], reward) for reward in (7.0, 1.0, 0.0, 3.0)]
    samples[1].done = samples[2].done = False  # the first is another episode
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    args = module.Args(discount=0.5, gae_lambda=0.5)
    targets = module.td_targets(samples, values, args)
    assert targets.tolist() == [7.0, 2.6875, 2.75, 3.0]
    args = replace(args, gae_lambda=1.0)  # the returns: 1 + 0.25·3, 0.5·3, 3
    targets = module.td_targets(samples, values, args)
    assert targets.tolist() == [7.0, 1.75, 1.5, 3.0]


def test_ratios_are_clipped(exercise):
    """At a ratio of e: no gradient for what is worth more, the ratio's for what is worth less."""
    module = exercise("ratio_clipping")
    args = module.Args(entropy_coef=0.0, max_grad_norm=0.0)
    actor = micro_learner(module)
    now = logprobs_of(module, actor, [[2, 3]], [[4, 1]], args)
    for weight, old in ((1.0, now - 1), (-1.0, now - 1), (1.0, now)):
        columns = torch.stack([torch.tensor([weight]), old])
        samples = [sample([[2, 3]], [[4, 1]])]
        losses = module.update_actor(actor, samples, 0, columns, args)
        ratio = (now - old).exp().item()  # off by 1e-6: log π is some nats in float32
        expected = -min(ratio * weight, min(max(ratio, 0.8), 1.2) * weight)
        assert losses["losses/policy_loss/agent_0"] == pytest.approx(expected, rel=1e-5)
    clipped, unclipped, plain = actor.optimizer.gradients
    assert all(g.abs().max() == 0 for g in clipped)
    assert_same_gradients(unclipped, [-g * torch.e for g in plain])


@pytest.fixture
def episodes():
    """Two of a turn, with what the critic reads."""
    first = sample([[2, 3]], [[4, 1]], 1.0, critic_ids=[[2, 3]])
    return [first, sample([[4]], [[2, 2, 1]], -1.0, critic_ids=[[4]])]


def test_the_critics_learn_alone_at_first(exercise, episodes, tmp_path):
    """In an update of the warm-up the critic steps and the actor does not; it does after it."""
    module = exercise("critic_warmup")
    for left, steps in ((1, 0), (0, 1)):
        actor, critic = micro_learner(module), micro_learner(module, seed=3, head=True)
        args = module.Args(num_agents=1, critic_warmup=left)
        module.update([actor], [critic], episodes, torch.Generator(), args)
        assert [len(x.optimizer.gradients) for x in (actor, critic)] == [steps, 1]
    lines = metrics(module, tmp_path / "runs", critic_warmup=2, logging_steps=1)
    trained = [x for x in lines if "losses/value_loss" in x]
    found = ["losses/policy_loss" in x for x in trained]
    assert found == [False] * 2 + [True] * (len(found) - 2) and found[-1]


def test_one_step_of_the_shared_actor_is_the_mean_of_the_agents(exercise):
    """Of the gradients that each agent's own samples give, with each critic's advantages."""
    module, args = exercise("parameter_sharing"), iac_separate.Args(entropy_coef=0.0)
    args = replace(args, max_grad_norm=0.0, advantage_normalization=False)
    samples = [sample([[2, 3], [4]], [[4, 1], [3]], 1.0, critic_ids=[[2, 3], [4]])]
    samples += [sample([[4], [3, 3]], [[2, 1], [4]], -1.0, critic_ids=[[4], [3, 3]])]
    critics = [micro_learner(module, seed=k, head=True) for k in (3, 4)]
    shared = micro_learner(module)
    module.update([shared] * 2, critics, samples, torch.Generator(), args)
    (found,), own = shared.optimizer.gradients, []
    for agent, critic in enumerate(critics):
        actor, texts = micro_learner(module), [s.critic_ids[agent] for s in samples]
        values = iac_separate.estimate_values(critic, texts, args)
        weights = torch.tensor([1.0, -1.0]) - values
        iac_separate.update_actor(actor, samples, agent, weights, args)
        own += actor.optimizer.gradients
    means = [(a + b) / 2 for a, b in zip(*own, strict=True)]
    assert_same_gradients(found, means)


@pytest.mark.parametrize("size", [None, 1])
def test_ratios_are_to_the_policy_before_the_first_step(exercise, episodes, size):
    """In pieces or at once, and whatever the minibatches, each has its own sample's."""
    module, seen = exercise("ratio_clipping"), {}
    args = module.Args(num_agents=1, train_batch_size=1, micro_batch_size=size)
    actor, critic = micro_learner(module), micro_learner(module, seed=3, head=True)

    def note(actor, samples, agent, columns, args):
        seen[episodes.index(samples[0])] = columns[1].item()
        return {}

    module.update_actor = note
    module.update([actor], [critic], episodes, torch.Generator(), args)
    for k, s in enumerate(episodes):
        old = logprobs_of(module, actor, s.prompt_ids, s.completion_ids, args)
        assert seen[k] == pytest.approx(old.item(), rel=1e-5)


@pytest.mark.parametrize("size", [None, 1])
def test_the_kl_penalty_is_charged_to_the_targets(exercise, episodes, size):
    """By kl_coef times the difference of two log-probabilities, in pieces or at once."""
    module, targets = exercise("kl_penalty"), []
    args = module.Args(num_agents=1, kl_coef=0.5, micro_batch_size=size)
    actor, critic = micro_learner(module), micro_learner(module, seed=3, head=True)
    actor.start = micro_learner(module, seed=1)
    assert module.log_ratios(actor, [], 0, args).shape == (0,)
    module.update_critic = lambda c, texts, y, args: targets.extend(y.tolist()) or {}
    module.update([actor], [critic], episodes, torch.Generator(), args)
    charged = []
    for s in episodes:
        texts = s.prompt_ids, s.completion_ids
        ratio = logprobs_of(module, actor, *texts, args).item()
        ratio -= logprobs_of(module, actor.start, *texts, args).item()
        assert abs(ratio) > 0.1  # of some nats in float32: off by 1e-6
        charged.append(s.reward - 0.5 * ratio)
    assert sorted(targets) == pytest.approx(sorted(charged), rel=1e-4)


def test_the_kl_penalty_is_to_the_policy_at_the_start(exercise, tmp_path):
    """Nothing is charged in the first update, and something once the policy has moved."""
    module, seen = exercise("kl_penalty"), []
    whole = module.log_ratios
    module.log_ratios = lambda *given: seen.append(whole(*given)) or seen[-1]
    metrics(module, tmp_path / "runs")
    assert len(seen) == 6  # three updates, two agents
    assert [x.abs().max().item() < 1e-5 for x in seen] == [True] * 2 + [False] * 4
