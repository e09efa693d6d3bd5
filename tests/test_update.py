"""Advantages, losses and steps, against values worked out by hand."""

import math
from contextlib import nullcontext

import pytest
import torch
from conftest import assert_same_gradients, micro_learner, sample, update_actor
from transformers import AutoModelForCausalLM, masking_utils

import common
import iac_shared

PROMPTS = [[2, 3], [3], [2, 2, 4], [4, 3]]
COMPLETIONS = [[4, 1], [3], [2, 2, 1], [1]]
SAMPLES = [sample([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0])
# Losses are sums of four float32 terms of a few roundings each, 6e-8 of at most 30: below 1e-5
ATOL = 3e-5


def test_08_advantages_by_hand(script):
    """With an exact Q, y − Q is zero at the last turn, and yet the policy must learn: by Q."""
    targets, values = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 3.0, 2.0])
    plain = script.Args(advantage_normalization=False)
    assert script.advantages(targets, values, plain).tolist() == [1.0, -1.0, 4.0]
    q = script.Args(advantage_normalization=False, critic_type="q")
    assert script.advantages(targets, values, q).tolist() == [0.0, 3.0, 2.0]
    # mean 4/3; deviations -1/3, -7/3, 8/3; squares 114/9, over n - 1: a deviation of √(19/3)
    white = script.advantages(targets, values, script.Args())
    expected = torch.tensor([-1.0, -7.0, 8.0]) / 3 / math.sqrt(19 / 3)
    torch.testing.assert_close(white, expected)


def test_the_entropy_and_its_gradient_by_hand(script):
    """H(p) is a mean over tokens, however long the completions. With respect to a logit z_k its
    gradient is -p_k (log p_k + H); cut tokens have none."""
    actor = micro_learner(script)
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0], requires_grad=True)
    actor.model.lm_head.register_forward_hook(lambda m, i, o: 0 * o + logits)
    args = script.Args(top_k=3, entropy_coef=0.7)
    samples = [sample([[2, 3]], [[0, 1]]), sample([[4]], [[2]])]
    losses = update_actor(script, actor, samples, 0, torch.zeros(2), args)
    p = logits.detach()[:3].softmax(0)
    entropy = -(p * p.log()).sum()
    found = losses[f"losses/entropy/{actor.name}"]
    assert found == pytest.approx(entropy.item(), abs=ATOL)
    expected = torch.cat([-p * (p.log() + entropy), torch.zeros(2)])
    torch.testing.assert_close(logits.grad, -0.7 * expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("script", ["maac", "iac_separate"], indirect=True)
def test_critic_loss_and_its_micro_batches(script):
    gradients = []
    for size in (None, 3):
        args = script.Args(micro_batch_size=size, max_grad_norm=0.0)
        critic = micro_learner(script, head=True)
        values = script.estimate_values(critic, PROMPTS, args)
        losses = script.update_critic(critic, PROMPTS, WEIGHTS, args)
        expected = ((WEIGHTS - values) ** 2).mean().item()
        found = losses[f"losses/value_loss/{critic.name}"]
        assert found == pytest.approx(expected, rel=1e-5)
        gradients.append(critic.optimizer.gradients[0])
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("reach, first", [(0.2, 0.64), (None, 0.25)])
def test_value_clipping_by_hand(reach, first):
    """y = 1; V moved from 0 to 0.5 within reach 0.2: the worse of 0.5² and 0.8² counts. Before
    the first step V = V_old: both ways give the gradient of (y − V)²."""
    args = iac_shared.Args(value_clip_range=reach)
    values, old = torch.tensor([0.5, 0.1, 3.0]), torch.zeros(3)
    errors = iac_shared.value_errors(values, old, torch.ones(3), args)
    torch.testing.assert_close(errors, torch.tensor([first, 0.81, 4.0]))
    values = torch.tensor([0.5, -1.0], requires_grad=True)
    errors = iac_shared.value_errors(values, values.detach(), torch.ones(2), args)
    errors.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([-1.0, -4.0]))


@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_the_value_loss_of_a_shared_model_by_autograd(critic_type):
    """Where advantages and entropy weigh nothing, a step's gradient is that of (5), of each text
    by itself."""
    flags = {"value_loss_coef": 0.7, "entropy_coef": 0.0, "max_grad_norm": 0.0}
    args = iac_shared.Args(critic_type=critic_type, micro_batch_size=3, **flags)
    actor, zeros = micro_learner(iac_shared), torch.zeros(4)
    errors = []
    for prompt, completion, target in zip(PROMPTS, COMPLETIONS, WEIGHTS, strict=True):
        text = prompt + completion if critic_type == "q" else prompt
        output = actor.model.base_model(torch.tensor([text])).last_hidden_state
        value = actor.value_head(output[:, -1].float())
        clipped = value.clamp(-0.2, 0.2)  # V_old = 0
        errors.append(torch.maximum((target - value) ** 2, (target - clipped) ** 2))
    (0.7 * torch.cat(errors).mean()).backward()
    expected = [weight.grad for weight in actor.parameters()]
    actor.zero_grad()
    iac_shared.update_actor(actor, SAMPLES, 0, zeros, zeros, WEIGHTS, args)
    pairs = zip(actor.optimizer.gradients[0], expected, strict=True)
    found, expected = zip(*[(x, y) for x, y in pairs if y is not None], strict=True)
    assert_same_gradients(expected, found)


def test_gradients_are_clipped_or_refused(script):
    norms, told = [], []
    for limit in (0.0, 1e-3):
        args = script.Args(max_grad_norm=limit)
        actor = micro_learner(script)
        losses = update_actor(script, actor, SAMPLES, 0, torch.ones(4), args)
        gradients = [g for g in actor.optimizer.gradients[0] if g is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        told.append(losses[f"losses/actor_grad_norm/{actor.name}"])
    assert told[0] == told[1] == pytest.approx(norms[0], rel=1e-4) and norms[0] > 0.01
    assert norms[1] == pytest.approx(1e-3, rel=2e-3)  # torch adds 1e-6 to the norm
    with pytest.raises(common.InputError, match="agent_0: the gradient is not finite"):
        update_actor(script, actor, SAMPLES, 0, WEIGHTS * math.nan, args)
    assert len(actor.optimizer.gradients) == 1  # no second step


WARPED = [  # test_exactness.py has the library's warpers beside the usual settings
    ({"top_p": 0.39}, [1, 0, 0, 0]),
    ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ({"top_k": 3, "top_p": 0.42}, [1, 0, 0, 0]),  # of what top_k leaves: 4 / 9
    ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
]


@pytest.mark.parametrize("flags, expected", WARPED, ids=str)
def test_warp_cuts_by_hand(script, flags, expected):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    actor = micro_learner(script)
    given = logits.clone()
    warped = script.warp(actor, given, script.Args(**flags)).softmax(-1)
    torch.testing.assert_close(warped, torch.tensor(expected).float())
    assert torch.equal(given, logits)  # a caller's tensor is its own


def test_tensors_meet_on_one_device(script, monkeypatch):
    """As on a GPU: the model lies on torch's device `meta`, which has shapes and no numbers, and
    on which a tensor that was left on the CPU raises. What asks for a number is taken out."""
    monkeypatch.setattr(common, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: False)
    monkeypatch.setattr(torch.Tensor, "item", lambda number: 0.0)
    monkeypatch.setattr(script, "step", lambda learner, sums, args: sums)
    monkeypatch.setattr(script, "int", lambda number: 3, raising=False)
    model = common.load_model("tiny", AutoModelForCausalLM, {}).to("meta")
    learner = common.Learner("agent_0", "tiny", model, common.tiny_tokenizer())
    learner.value_head = script.value_head(learner, 8)
    samples = [sample([[5, 6]], [[8, 9, 1]]), sample([[7]], [[10]])]
    cuts = {"top_k": 5, "top_p": 0.9, "critic_type": "q"}
    args = script.Args(max_new_tokens=3, micro_batch_size=1, **cuts)
    columns = [torch.ones(2)] * (3 if script.__name__ == "iac_shared" else 1)
    script.update_actor(learner, samples, 0, *columns, args)
    if script.__name__ != "iac_shared":
        script.update_critic(learner, [[5, 6], [7]], torch.ones(2), args)
    assert {weight.grad.device.type for weight in learner.parameters()} == {"meta"}
    values = script.critic_values(learner, [[5, 6], [7], [5, 6]], args)
    assert values.device.type == "meta" and values.shape == (3,)
    with pytest.raises(NotImplementedError, match="nonzero"):  # at last, for the texts
        script.generate(learner, [[5, 6], [7], [5, 6]], torch.Generator(), args)
