"""A real pretrained chat model through each script: SmolLM2-135M-Instruct."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_args
from tasks import length_ratio
from test_pitfalls import load
from transformers import AutoModelForCausalLM

import common

REAL = {
    "save_interval": 0,  # a checkpoint is gigabytes
    "max_new_tokens": 8,
    "rollout_buffer_size": 4,
    "micro_batch_size": 2,
    "agent_learning_rate": 1e-5,
    "critic_learning_rate": 1e-5,
    "entropy_coef": 0.0,
    "eval_num_samples": 2,
}


def chats(actor, *topics):
    """The token ids of requests for stories."""
    texts = [f"Write a story about {topic}." for topic in topics]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    first = common.Sample({}, 0, 0, [])
    return [actor.encode(first, prompt) for prompt in prompts]


@pytest.mark.slow
def test_training_moves_a_real_model(script, smollm2, tmp_path):
    critics = {} if script.__name__ == "iac_shared" else {"critic_model": "tiny"}
    args = tiny_args(script, tmp_path, agent_model=smollm2, **{**REAL, **critics})
    task = length_ratio.make_task(args)
    task.train_dataset = task.train_dataset[:8]
    folder = script.train(args, task)
    before = AutoModelForCausalLM.from_pretrained(smollm2)
    after = AutoModelForCausalLM.from_pretrained(folder / "agent_0")
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    moved = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert 0 < moved.max() < 1e-3  # two Adam steps of 1e-5
    assert (moved > 0).float().mean() > 0.5
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompts"][0][0]["role"] == "user"


def test_log_probabilities_are_those_of_generate(script, smollm2):
    """Of the library's own sampling, token by token: the second method, on a real model. Both
    are sums of a dozen log-probabilities in float32, whose logits of up to 32 have roundings of
    2^-20 and what 30 layers add: far below 1e-3."""
    sampling = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    args = script.Args(**sampling, device="cpu")
    actor = load(smollm2, args)
    assert actor.tokenizer.convert_tokens_to_ids("<|im_end|>") in actor.end_ids
    prompt, long = chats(actor, "a lost dog", "a night in a far away land " * 4)
    text = actor.tokenizer.decode(prompt)
    assert text.endswith("dog.<|im_end|>\n<|im_start|>assistant\n")
    options = {**sampling, "do_sample": True, "max_new_tokens": 12}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    output = actor.model.generate(torch.tensor([prompt]), **options)
    completion = output.sequences[0, len(prompt) :].tolist()
    steps = zip(output.scores, completion, strict=True)
    theirs = sum(scores[0].log_softmax(-1)[token].item() for scores, token in steps)
    texts = [long, prompt], [[5], completion]
    with torch.no_grad():
        ours = script.sequence_logprobs(actor, *texts, args)[0][1]
    assert abs(ours.item() - theirs) < 1e-3


@torch.no_grad()
def test_bfloat16_keeps_log_probabilities(script, smollm2):
    """Those of sampled completions under autocast against float32's. It has 8 bits: a logit from
    16 to 32 is off by 1/16 at most, the layers below round as coarsely, and a token's logit and
    normalizer make 1/8 nat together. As they have either sign, 32 tokens are off by tenths."""
    args = script.Args(device="cpu", max_new_tokens=32, entropy_coef=0.0)
    actor = load(smollm2, args)
    prompts = chats(actor, "a lost dog", "the first snow", "a paper boat")
    generator = torch.Generator().manual_seed(0)
    completions = script.generate(actor, prompts, generator, args)
    assert sum(map(len, completions)) > 30
    for prompt, completion in zip(prompts, completions, strict=True):
        texts, found = ([prompt], [completion]), []
        for dtype in ("float32", "bfloat16"):
            typed = replace(args, dtype=dtype)
            found += script.sequence_logprobs(actor, *texts, typed)[0].tolist()
        assert 0 < abs(found[0] - found[1]) < len(completion) / 8
