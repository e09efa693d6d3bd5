"""The actor's gradient, averaged over all joint completions, is that of the expected reward.

Probabilities come from transformers' own logits warpers on unpadded sequences, one at a time:
a second method, which shares nothing with the scripts but the model.
"""

import itertools

import pytest
import torch
from conftest import micro_learner, sample, update_actor
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY, END = 5, 1
COMPLETIONS = [[END]] + [
    [a, b] for a in range(VOCABULARY) if a != END for b in range(VOCABULARY)
]
PROMPTS = ([2, 3, 4], [3])  # two histories of unequal length
SAMPLINGS = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
)


def probability(actor, prompt, completion, args):
    """π(a|h) with gradient, token by token."""
    warpers = [TemperatureLogitsWarper(args.temperature)]
    if args.top_k is not None:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(TopPLogitsWarper(args.top_p))
    logits = actor.model(torch.tensor([prompt + completion])).logits[0]
    product = torch.ones(())
    for k, token in enumerate(completion):
        scores = logits[None, len(prompt) - 1 + k]
        for warper in warpers:
            scores = warper(None, scores)
        product = product * scores.softmax(-1)[0, token]
    return product


def actor_gradients(actor):
    """The recorded gradient of the language model's parameters."""
    count = len(list(actor.model.parameters()))
    return actor.optimizer.gradients[-1][:count]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_expected_gradient_of_one_turn(script, critic_type, sampling):
    args = script.Args(
        **sampling,
        critic_type=critic_type,
        advantage_normalization=False,
        entropy_coef=0.0,
        max_grad_norm=0.0,
        max_new_tokens=2,
    )
    actors = [micro_learner(script, seed=seed) for seed in (1, 2)]
    torch.manual_seed(3)
    rewards = torch.randn(len(PROMPTS), len(COMPLETIONS), len(COMPLETIONS))
    tables = [
        torch.stack(
            [
                torch.stack([probability(actor, h, a, args) for a in COMPLETIONS])
                for h in PROMPTS
            ]
        )
        for actor in actors
    ]  # (H, A) each
    for table in tables:
        torch.testing.assert_close(table.sum(1), torch.ones(len(PROMPTS)))
    expected = torch.einsum("ha,hb,hab->", *tables, rewards) / len(PROMPTS)
    exact = torch.autograd.grad(expected, list(actors[0].model.parameters()))

    places = list(
        itertools.product(range(len(PROMPTS)), *[range(len(COMPLETIONS))] * 2)
    )
    joint = torch.stack(
        [tables[0][h, a] * tables[1][h, b] for h, a, b in places]
    ).detach()
    samples = [
        sample(
            [PROMPTS[h]] * 2, [COMPLETIONS[a], COMPLETIONS[b]], rewards[h, a, b].item()
        )
        for h, a, b in places
    ]
    baseline = torch.tensor([[7.0], [-3.0]]).expand(
        2, len(COMPLETIONS)
    )  # any function of h
    if critic_type == "q" and script.__name__ == "maac":  # Q(H, A) is the reward
        values = torch.stack([rewards[h, a, b] for h, a, b in places])
    elif critic_type == "q":  # Q_0(h, a) is the mean over what the other agent does
        own = torch.einsum("hb,hab->ha", tables[1], rewards).detach()
        values = torch.stack([own[h, a] for h, a, _ in places])
    else:
        values = torch.stack([baseline[h, a] for h, a, _ in places])
    targets = script.td_targets(samples, values, args)
    weights = script.advantages(targets, values, args)
    weights = (
        weights * joint * len(samples) / len(PROMPTS)
    )  # a sum over all, not a sample
    update_actor(script, actors[0], samples, 0, weights, args)
    for ours, theirs in zip(actor_gradients(actors[0]), exact, strict=True):
        torch.testing.assert_close(-ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_expected_gradient_of_two_turns(script, critic_type):
    """With exact values, TD errors of one agent's two turns give the gradient of its return."""
    args = script.Args(
        critic_type=critic_type,
        advantage_normalization=False,
        entropy_coef=0.0,
        max_grad_norm=0.0,
        discount=0.5,
        num_turns=2,
    )
    actor = micro_learner(script, seed=4)
    tokens = range(VOCABULARY)
    first = [[2, 3]]
    second = [[2, 3, a, 4] for a in tokens]  # the second history tells the first action
    p = torch.stack([probability(actor, first[0], [a], args) for a in tokens])  # (A,)
    q = torch.stack(
        [
            torch.stack([probability(actor, h, [b], args) for b in tokens])
            for h in second
        ]
    )  # (A, B)
    torch.manual_seed(5)
    r0, r1 = torch.randn(VOCABULARY), torch.randn(VOCABULARY, VOCABULARY)
    # the discounted return weighs the second turn's gradient by γ; actor-critic methods leave
    # that weight out (they follow E[Σ_t ∇log π(a_t|h_t) Â_t]), so the second turn counts fully
    second_turn = torch.einsum("a,ab,ab->", p.detach(), q, r1)
    value1 = (q * r1).sum(1).detach()  # V(h_1)
    first_turn = (p * (r0 + args.discount * value1)).sum()
    exact = torch.autograd.grad(
        first_turn + second_turn, list(actor.model.parameters())
    )

    samples, values, probabilities = [], [], []
    for a, b in itertools.product(tokens, tokens):
        samples.append(sample([first[0]], [[a]], r0[a].item(), done=False))
        samples.append(sample([second[a]], [[b]], r1[a, b].item(), turn=1))
        if critic_type == "v":
            values += [first_turn.detach(), value1[a]]
        else:
            values += [r0[a] + args.discount * value1[a], r1[a, b]]
        probabilities += [p[a] * q[a, b]] * 2
    values = torch.stack(values)
    weights = script.advantages(script.td_targets(samples, values, args), values, args)
    weights = weights * torch.stack(probabilities).detach() * len(samples)
    update_actor(script, actor, samples, 0, weights, args)
    for ours, theirs in zip(actor_gradients(actor), exact, strict=True):
        torch.testing.assert_close(-ours, theirs, atol=1e-5, rtol=1e-4)
