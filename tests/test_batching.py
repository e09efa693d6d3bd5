"""A left-padded batch of unequal prompts on Llama and on GPT-2: its texts, and iac_shared's Q.
Its log-probabilities stand in test_exactness.py; all of it, for other families, in test_families.py.
"""

import pytest
import torch
from conftest import micro_learner

import iac_shared

PROMPTS = [[2, 3, 4, 5, 6, 7, 8, 9], [5], [3, 3, 9], [7, 2, 4, 6, 8]]
COMPLETIONS = [[4], [5, 6, 7, 1], [8, 1], [9, 2, 3, 4, 5]]
families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@families
@torch.no_grad()
def test_generation_in_a_padded_batch(script, family):
    """With top_k 1 there is one completion: that of a full forward pass per token."""
    args = script.Args(top_k=1, max_new_tokens=6)
    actor = micro_learner(script, family, vocabulary=12, seed=6)
    batched = script.generate(actor, PROMPTS, torch.Generator(), args)
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        written = []
        while len(written) < 6 and written[-1:] != [1]:
            # alone, without mask or positions
            scores = actor.model(torch.tensor([prompt + written])).logits[0, -1]
            first, second = scores.topk(2).values
            assert first - second > 1e-3  # no rounding chooses between them
            written.append(scores.argmax().item())
        assert completion == written


@families
def test_shared_q_is_the_same_in_rollout_and_update(family):
    """Of a float64 model and a float32 head: 32 products below 16 and their sum have 33 roundings
    of 5e-7, 1.7e-5; a defect shows in the first digit. V stands in test_families.py."""
    args = iac_shared.Args(critic_type="q")
    actor = micro_learner(iac_shared, family, vocabulary=12)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    before = iac_shared.estimate_values(actor, texts, args)
    during = iac_shared.sequence_logprobs(actor, PROMPTS, COMPLETIONS, args)[2]
    assert before.std() > 0.1
    torch.testing.assert_close(before, during.detach(), atol=1e-4, rtol=0)
