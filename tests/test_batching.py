"""A left-padded batch gives each sample's own, unbatched numbers, on Llama and on GPT-2.

The micro-models compute in float64 (Llama its norms in float32, of inputs that agree to 1e-15);
scores and values are float32, below 16 here, so that a rounding is below 5e-7. A token's score
takes five (cast, temperature, two of log-softmax, sum), a completion five tokens: 1.3e-5 at
most. A value adds 32 products, 33 roundings: 1.7e-5. A defect shows in the first digit.
"""

import pytest
import torch
from conftest import logprobs_of, micro_learner

PROMPTS = [[2, 3, 4, 5, 6, 7, 8, 9], [5], [3, 3, 9], [7, 2, 4, 6, 8]]
COMPLETIONS = [[4], [5, 6, 7, 1], [8, 1], [9, 2, 3, 4, 5]]
TEXTS = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
ATOL = 1e-4
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@torch.no_grad()
def alone(model, text):
    """What a model says about one text, unpadded, without mask or positions: (L, V or H)."""
    return model(torch.tensor([text]))[0][0]


@families
def test_logprobs_of_a_padded_batch(script, family):
    args = script.Args(temperature=0.8)
    actor = micro_learner(script, family, vocabulary=12)
    batched = logprobs_of(script, actor, PROMPTS, COMPLETIONS, args)
    for k, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        scores = (alone(actor.model, prompt + completion) / 0.8).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt + completion) - 1)
        expected = scores[places, completion].sum().item()
        assert batched[k].item() == pytest.approx(expected, abs=ATOL)


@families
def test_values_of_a_padded_batch(script, family):
    critic = micro_learner(script, family, vocabulary=12, head=True)
    batched = script.estimate_values(critic, TEXTS, script.Args())
    assert batched.std() > 0.1
    for value, text in zip(batched.tolist(), TEXTS, strict=True):
        hidden = alone(critic.model.base_model, text)[-1:].float()
        assert value == pytest.approx(critic.value_head(hidden).item(), abs=ATOL)


@families
def test_generation_in_a_padded_batch(script, family):
    """With top_k 1 there is one completion: that of a full forward pass per token."""
    args = script.Args(top_k=1, max_new_tokens=6)
    actor = micro_learner(script, family, vocabulary=12, seed=6)
    batched = script.generate(actor, PROMPTS, torch.Generator(), args)
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        written = []
        while len(written) < 6 and written[-1:] != [1]:
            first, second = alone(actor.model, prompt + written)[-1].topk(2).values
            assert first - second > 1e-3  # no rounding chooses between them
            written.append(alone(actor.model, prompt + written)[-1].argmax().item())
        assert completion == written


@families
@pytest.mark.parametrize("critic_type", ["v", "q"])
def test_shared_value_is_the_same_in_rollout_and_update(family, critic_type):
    import iac_shared

    args = iac_shared.Args(critic_type=critic_type)
    actor = micro_learner(iac_shared, family, vocabulary=12)
    texts = TEXTS if critic_type == "q" else PROMPTS
    before = iac_shared.estimate_values(actor, texts, args)
    during = iac_shared.sequence_logprobs(actor, PROMPTS, COMPLETIONS, args)[2]
    torch.testing.assert_close(before, during.detach(), atol=ATOL, rtol=0)
