"""Targets, advantages, losses and steps, against values worked out by hand."""

import pytest
import torch
from conftest import (
    assert_same_gradients,
    logprobs_of,
    micro_learner,
    sample,
    update_actor,
)

PROMPTS = [[2, 3], [3], [2, 2, 4], [4, 3]]
COMPLETIONS = [[4, 1], [3], [2, 2, 1], [1]]
SAMPLES = [sample([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def test_td_targets_by_hand(script):
    """Two episodes: three turns with rewards 1, 2, 3, then one turn with reward 4."""
    done = [False, False, True, True]
    samples = [
        sample([[2]], [[3]], r, done=d) for r, d in zip([1.0, 2.0, 3.0, 4.0], done)
    ]
    values = torch.tensor([10.0, 20.0, 30.0, 40.0])
    targets = script.td_targets(samples, values, script.Args(discount=0.5))
    assert targets.tolist() == [1 + 0.5 * 20, 2 + 0.5 * 30, 3.0, 4.0]


def test_advantages_by_hand(script):
    targets, values = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 3.0, 2.0])
    plain = script.Args(advantage_normalization=False)
    assert script.advantages(targets, values, plain).tolist() == [1.0, -1.0, 4.0]
    q = script.Args(advantage_normalization=False, critic_type="q")
    assert script.advantages(targets, values, q).tolist() == [0.0, 3.0, 2.0]
    white = script.advantages(targets, values, script.Args())
    expected = (torch.tensor([1.0, -1.0, 4.0]) - 4 / 3) / torch.tensor(
        [1.0, -1.0, 4.0]
    ).std()
    torch.testing.assert_close(white, expected)


def test_policy_loss_is_that_of_the_equation(script):
    args = script.Args(temperature=0.9, entropy_coef=0.0)
    actor = micro_learner(script)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    logprobs = logprobs_of(script, actor, PROMPTS, COMPLETIONS, args)
    losses = update_actor(script, actor, SAMPLES, 0, weights, args)
    assert losses[f"policy_loss/{actor.name}"] == pytest.approx(
        -(logprobs * weights).mean().item(), abs=1e-6
    )


def test_entropy_is_the_mean_over_tokens(script):
    """Four possible tokens of equal logits: log 4 nats each, however long the completions."""
    args = script.Args(top_k=4, temperature=2.0)
    actor = micro_learner(script)
    with torch.no_grad():
        for name, parameter in actor.model.named_parameters():
            parameter.zero_() if "lm_head" in name else None
    logits = actor.model.lm_head.weight
    assert logits.abs().sum() == 0
    args = script.Args(top_k=None)
    losses = update_actor(script, actor, SAMPLES, 0, torch.zeros(4), args)
    assert losses[f"entropy/{actor.name}"] == pytest.approx(
        torch.log(torch.tensor(5.0)).item(), abs=1e-5
    )


def test_entropy_gradient_is_finite_where_tokens_are_cut(script):
    args = script.Args(top_k=2, entropy_coef=1.0)
    actor = micro_learner(script)
    update_actor(script, actor, SAMPLES, 0, torch.ones(4), args)
    gradients = [g for g in actor.optimizer.gradients[0] if g is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_give_the_same_gradient(script, size):
    whole, parts = [
        script.Args(micro_batch_size=m, max_grad_norm=0.0, entropy_coef=0.3)
        for m in (None, size)
    ]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    losses, gradients = [], []
    for args in (whole, parts):
        actor = micro_learner(script, head=script.__name__ == "iac_shared")
        if script.__name__ == "iac_shared":  # the critic's part included
            columns = torch.stack([weights, torch.zeros(4), 2 * weights])
            losses.append(script.update_actor(actor, SAMPLES, 0, columns, args))
        else:
            losses.append(update_actor(script, actor, SAMPLES, 0, weights, args))
        gradients.append(actor.optimizer.gradients[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_gradients(*gradients)


@pytest.mark.parametrize("name", ["maac", "iac_separate"])
def test_critic_loss_and_its_micro_batches(name):
    script = __import__(name)
    targets = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients = []
    for size in (None, 3):
        args = script.Args(
            micro_batch_size=size, max_grad_norm=0.0, value_loss_coef=0.6
        )
        critic = micro_learner(script, head=True)
        values = script.estimate_values(critic, PROMPTS, args)
        losses = script.update_critic(critic, PROMPTS, targets, args)
        expected = ((targets - values) ** 2).mean().item()
        assert losses[f"value_loss/{critic.name}"] == pytest.approx(expected, rel=1e-5)
        gradients.append(critic.optimizer.gradients[0])
    bias = gradients[0][-1]  # d/db of 0.6 · mean (y − V)²
    torch.testing.assert_close(bias, 0.6 * -2 * (targets - values).mean()[None])
    assert_same_gradients(*gradients)


def test_value_clipping_by_hand():
    """y = 1; V moved from 0 to 0.5 within reach 0.2: the worse of 0.5² and 0.8² counts."""
    import iac_shared

    args = iac_shared.Args(value_clip_range=0.2)
    values, old = torch.tensor([0.5, 0.1, 3.0]), torch.zeros(3)
    errors = iac_shared.value_errors(values, old, torch.ones(3), args)
    torch.testing.assert_close(errors, torch.tensor([0.64, 0.81, 4.0]))
    free = iac_shared.Args(value_clip_range=None)
    errors = iac_shared.value_errors(values, old, torch.ones(3), free)
    torch.testing.assert_close(errors, torch.tensor([0.25, 0.81, 4.0]))


def test_value_gradient_with_and_without_clipping_is_the_plain_one_at_first():
    """Before the first step V = V_old: both ways give the gradient of (y − V)²."""
    import iac_shared

    for reach in (0.2, None):
        values = torch.tensor([0.5, -1.0], requires_grad=True)
        args = iac_shared.Args(value_clip_range=reach)
        errors = iac_shared.value_errors(values, values.detach(), torch.ones(2), args)
        errors.sum().backward()
        torch.testing.assert_close(values.grad, torch.tensor([-1.0, -4.0]))


def test_gradient_clipping(script):
    norms = []
    for limit in (0.0, 1e-3):
        args = script.Args(max_grad_norm=limit)
        actor = micro_learner(script)
        losses = update_actor(script, actor, SAMPLES, 0, torch.ones(4), args)
        squares = [
            g.square().sum() for g in actor.optimizer.gradients[0] if g is not None
        ]
        norms.append(torch.stack(squares).sum().sqrt().item())
        free_norm = losses[f"actor_grad_norm/{actor.name}"]
    assert norms[0] == pytest.approx(free_norm, rel=1e-4) and norms[0] > 0.01
    assert norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_warp_cuts_by_hand(script):
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()  # probabilities .4 .3 .2 .1
    cases = [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
    ]
    for flags, expected in cases:
        warped = script.warp(logits, script.Args(**flags)).softmax(-1)
        torch.testing.assert_close(
            warped, torch.tensor(expected).float(), msg=str(flags)
        )
