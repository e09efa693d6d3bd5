"""A left-padded batch gives each sample's own, unbatched numbers, on Llama and on GPT-2."""

import pytest
import torch
from conftest import logprobs_of, micro_learner

PROMPTS = [[2, 3, 4, 5, 6, 7, 8, 9], [5], [3, 3, 9], [7, 2, 4, 6, 8]]
COMPLETIONS = [[4], [5, 6, 7, 1], [8, 1], [9, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logprobs_of_a_padded_batch(script, family):
    args = script.Args(temperature=0.8)
    actor = micro_learner(script, family, vocabulary=12)
    batched = logprobs_of(script, actor, PROMPTS, COMPLETIONS, args)
    for k, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = actor.model(torch.tensor([prompt + completion])).logits[0]
        scores = (logits / 0.8).log_softmax(-1)
        alone = sum(
            scores[len(prompt) - 1 + j, token] for j, token in enumerate(completion)
        )
        torch.testing.assert_close(batched[k], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_of_a_padded_batch(script, family):
    args = script.Args()
    critic = micro_learner(script, family, vocabulary=12, head=True)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batched = script.estimate_values(critic, texts, args)
    assert batched.std() > 0.1
    for k, text in enumerate(texts):
        with torch.no_grad():
            hidden = critic.model.base_model(torch.tensor([text])).last_hidden_state
            alone = critic.value_head(hidden[:, -1])[0]
        torch.testing.assert_close(batched[k], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_in_a_padded_batch(script, family):
    """With top_k 1 there is one completion: that of a full forward pass per token."""
    args = script.Args(top_k=1, max_new_tokens=6)
    actor = micro_learner(script, family, vocabulary=12, seed=6)
    batched = script.generate(actor, PROMPTS, args)
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        alone = []
        while len(alone) < 6 and alone[-1:] != [1]:
            with torch.no_grad():
                logits = actor.model(torch.tensor([prompt + alone])).logits[0, -1]
            alone.append(logits.argmax().item())
        assert completion == alone


@pytest.mark.parametrize("critic_type", ["v", "q"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shared_value_is_the_same_in_rollout_and_update(family, critic_type):
    import iac_shared

    args = iac_shared.Args(critic_type=critic_type)
    actor = micro_learner(iac_shared, family, vocabulary=12)
    q = critic_type == "q"
    texts = [p + (c if q else []) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    before = iac_shared.estimate_values(actor, texts, args)
    during = iac_shared.sequence_logprobs(actor, PROMPTS, COMPLETIONS, args)[2]
    torch.testing.assert_close(before, during.detach(), atol=1e-5, rtol=0)
