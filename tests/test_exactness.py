"""The actor's gradient, averaged over all joint completions, is that of the expected reward.

Probabilities come from transformers' own logits warpers on unpadded sequences, one at a time:
a second method, which shares nothing with the scripts but the model.
"""

import itertools

import pytest
import torch
from conftest import assert_same_gradients, micro_learner, sample, update_actor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

VOCABULARY, END = 5, 1
FIRST = [token for token in range(VOCABULARY) if token != END]
COMPLETIONS = [[END], *map(list, itertools.product(FIRST, range(VOCABULARY)))]
PROMPTS = ([2, 3, 4], [3])  # two histories of unequal length
SAMPLINGS = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
)
PLAIN = {"advantage_normalization": False, "entropy_coef": 0.0, "max_grad_norm": 0.0}


def probability(actor, prompt, completion, args):
    """π(a|h) with gradient, token by token."""
    warpers = [TemperatureLogitsWarper(args.temperature)]
    if args.top_k is not None:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(TopPLogitsWarper(args.top_p))
    logits = actor.model(torch.tensor([prompt + completion])).logits[0]
    product = torch.ones((), dtype=torch.float64)
    for k, token in enumerate(completion):
        scores = logits[None, len(prompt) - 1 + k]
        for warper in warpers:
            scores = warper(None, scores)
        product = product * scores.softmax(-1)[0, token]
    return product


def assert_gradient(actor, expected):
    """The recorded gradient of the language model is minus that of `expected`. Scores, weights and
    log-probabilities are float32, some five roundings of 6e-8, in terms up to ten times as large
    that cancel (the baseline): 3e-6 of its norm. One wrong sample of 882 would be above 1e-3."""
    parameters = list(actor.model.parameters())
    exact = torch.autograd.grad(-expected, parameters)
    assert torch.cat([g.flatten() for g in exact]).norm() > 1e-2
    assert_same_gradients(exact, actor.optimizer.gradients[-1][: len(parameters)])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_expected_gradient_of_one_turn(script, critic_type, sampling):
    flags = {**PLAIN, **sampling, "critic_type": critic_type}
    args = script.Args(**flags, max_new_tokens=2)
    actors = [micro_learner(script, seed=seed) for seed in (1, 2)]
    torch.manual_seed(3)
    rewards = torch.randn(len(PROMPTS), len(COMPLETIONS), len(COMPLETIONS)).double()
    tables = []  # π_i(a|h) of each agent: (H, A)
    for actor in actors:
        rows = [[probability(actor, h, a, args) for a in COMPLETIONS] for h in PROMPTS]
        tables.append(torch.stack([torch.stack(row) for row in rows]))
        torch.testing.assert_close(tables[-1].sum(1), torch.ones(2).double())
    expected = torch.einsum("ha,hb,hab->", *tables, rewards) / len(PROMPTS)

    samples, values, shares = [], [], []
    own = torch.einsum("hb,hab->ha", tables[1], rewards).detach()
    choices = range(len(COMPLETIONS))
    for h, a, b in itertools.product(range(len(PROMPTS)), choices, choices):
        written, reward = [COMPLETIONS[a], COMPLETIONS[b]], rewards[h, a, b]
        samples.append(sample([PROMPTS[h]] * 2, written, reward.item()))
        shares.append((tables[0][h, a] * tables[1][h, b]).detach())
        if critic_type == "v":  # any function of h
            values.append((7.0, -3.0)[h])
        elif script.__name__ == "maac":  # Q(H, A) is the reward
            values.append(reward)
        else:  # Q_0(h, a) is the mean over what the other agent does
            values.append(own[h, a])
    values = torch.tensor(values)
    weights = script.advantages(script.td_targets(samples, values, args), values, args)
    # a sum over all of them, by their probability, in place of the mean of a sample
    weights = weights * torch.stack(shares) * len(samples) / len(PROMPTS)
    update_actor(script, actors[0], samples, 0, weights, args)
    assert_gradient(actors[0], expected)


@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_expected_gradient_of_two_turns(script, critic_type):
    """With exact values, TD errors of one agent's two turns give the gradient of its return."""
    args = script.Args(**PLAIN, critic_type=critic_type, discount=0.5, num_turns=2)
    actor = micro_learner(script, seed=4)
    tokens = range(VOCABULARY)
    first = [2, 3]
    second = [[2, 3, a, 4] for a in tokens]  # the second history tells the first action
    p = torch.stack([probability(actor, first, [a], args) for a in tokens])  # (A,)
    rows = [[probability(actor, h, [b], args) for b in tokens] for h in second]
    q = torch.stack([torch.stack(row) for row in rows])  # (A, B)
    torch.manual_seed(5)
    r0 = torch.randn(VOCABULARY).double()
    r1 = torch.randn(VOCABULARY, VOCABULARY).double()
    # the discounted return weighs the second turn's gradient by γ; actor-critic methods leave
    # that weight out (they follow E[Σ_t ∇log π(a_t|h_t) Â_t]), so the second turn counts fully
    second_turn = torch.einsum("a,ab,ab->", p.detach(), q, r1)
    value1 = (q * r1).sum(1).detach()  # V(h_1)
    first_turn = (p * (r0 + args.discount * value1)).sum()

    samples, values, shares = [], [], []
    for a, b in itertools.product(tokens, tokens):
        samples.append(sample([first], [[a]], r0[a].item(), done=False))
        samples.append(sample([second[a]], [[b]], r1[a, b].item(), turn=1))
        if critic_type == "v":
            values += [first_turn.detach(), value1[a]]
        else:
            values += [r0[a] + args.discount * value1[a], r1[a, b]]
        shares += [(p[a] * q[a, b]).detach()] * 2
    values = torch.tensor(values)
    weights = script.advantages(script.td_targets(samples, values, args), values, args)
    weights = weights * torch.stack(shares) * len(samples)
    update_actor(script, actor, samples, 0, weights, args)
    assert_gradient(actor, first_turn + second_turn)


def test_01_tokens_are_drawn_by_the_cumulative_distribution(script):
    """Probabilities 0, 1/4, 1/2, 0, 1/4, 0: no draw ends on a token that cannot be."""
    scores = torch.tensor([0, 0.25, 0.5, 0, 0.25, 0]).log()
    uniforms = torch.tensor([0.0, 0.2, 0.3, 0.7, 0.8, 1 - 2**-24])
    drawn = script.draw_tokens(scores.expand(6, 6), uniforms)
    assert drawn.tolist() == [1, 1, 2, 2, 4, 4]


def test_28_a_critic_reads_each_text_once(script):
    """And gives the values and, in an update, the gradient that reading each by itself gives."""
    args = script.Args(max_grad_norm=0.0, value_loss_coef=0.6)
    critic = micro_learner(script, head=True)
    texts = [[2, 3, 4], [4], [2, 3, 4], [2, 3, 4], [4], [3, 2]]  # three distinct ones
    targets = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0])
    values = torch.cat([script.critic_values(critic, [text], args) for text in texts])
    (0.6 * (targets - values).square().mean()).backward()  # (5)
    alone = [parameter.grad for parameter in critic.parameters()]
    critic.zero_grad()
    rows, table = [], critic.model.get_input_embeddings()
    table.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    again = script.estimate_values(critic, texts, args)
    # 33 roundings of a value: see test_batching.py
    torch.testing.assert_close(again, values.detach(), atol=3e-5, rtol=0)
    assert rows == [3]
    if script.__name__ != "iac_shared":
        script.update_critic(critic, texts, targets, args)
        assert rows == [3, 3]
        assert_same_gradients(alone, critic.optimizer.gradients[0])
