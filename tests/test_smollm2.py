"""A real pretrained chat model through each script: SmolLM2-135M-Instruct."""

import json
from dataclasses import replace

import torch
from conftest import tiny_args
from tasks import length_ratio
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def short_length_ratio(args):
    task = length_ratio.make_task(args)
    return replace(
        task, train_dataset=task.train_dataset[:8], eval_dataset=task.eval_dataset[:2]
    )


def test_training_moves_a_real_model(script, smollm2, tmp_path):
    critics = {} if script.__name__ == "iac_shared" else {"critic_model": "tiny"}
    args = tiny_args(script, tmp_path, agent_model=smollm2, **{**REAL, **critics})
    folder = script.train(args, short_length_ratio(args))
    before = AutoModelForCausalLM.from_pretrained(smollm2)
    after = AutoModelForCausalLM.from_pretrained(folder / "agent_0")
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    moved = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    assert 0 < moved.max() < 1e-3  # two Adam steps of 1e-5
    assert (moved > 0).float().mean() > 0.5
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompts"][0][0]["role"] == "user"


def test_log_probabilities_are_those_of_generate(script, smollm2):
    """Of the library's own sampling, token by token: the second method, on a real model."""
    args = script.Args(temperature=0.7, top_k=50, top_p=0.9, device="cpu")
    actor = common.load_learners("agent", AutoModelForCausalLM, [smollm2], args)[0]
    actor.value_head = script.value_head(actor, None)
    chat = [{"role": "user", "content": "Write a story about a lost dog."}]
    prompt = common.encode(actor, [chat])[0]
    text = actor.tokenizer.decode(prompt)
    assert (
        text.endswith("<|im_start|>assistant\n") and text.count("<|im_start|>user") == 1
    )
    torch.manual_seed(0)
    output = actor.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=True,
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        output_scores=True,
        return_dict_in_generate=True,
    )
    completion = output.sequences[0, len(prompt) :].tolist()
    theirs = sum(
        scores[0].log_softmax(-1)[token].item()
        for scores, token in zip(output.scores, completion, strict=True)
    )
    long = common.encode(actor, ["Once upon a time there was " * 9])[0]
    with torch.no_grad():
        ours = script.sequence_logprobs(actor, [long, prompt], [[5], completion], args)[
            0
        ][1]
    assert abs(ours.item() - theirs) < 1e-3


def test_bfloat16_keeps_log_probabilities(script, smollm2):
    """Token by token, those of sampled text under autocast against float32's.

    A logit between 16 and 32 is rounded to a multiple of 1/8, so a token in a hundred is off by
    a little more than 0.1 nat.
    """
    args = script.Args(device="cpu", max_new_tokens=32, entropy_coef=0.0)
    actor = common.load_learners("agent", AutoModelForCausalLM, [smollm2], args)[0]
    actor.value_head = script.value_head(actor, None)
    chats = [
        [{"role": "user", "content": f"Write a story about {topic}."}]
        for topic in ("a lost dog", "the first snow", "a paper boat")
    ]
    prompts = common.encode(actor, chats)
    torch.manual_seed(0)
    completions = script.generate(actor, prompts, args)
    inputs, width = script.pad_batch(actor, prompts, completions)
    tokens = inputs["input_ids"][:, width:]
    mask = inputs["attention_mask"][:, width:].bool()
    assert mask.sum() > 30

    def logprobs(dtype):
        with torch.no_grad(), common.autocast(actor, replace(args, dtype=dtype)):
            logits = actor.model(**inputs, use_cache=False).logits[:, width - 1 : -1]
            return script.token_logprobs(logits, tokens, args)[0][mask]

    exact, half = map(logprobs, ("float32", "bfloat16"))
    off = (exact - half).abs()
    assert 0 < off.mean() < 0.03 and off.max() < 0.2
    assert (off < 0.1).float().mean() > 0.97
    assert (
        script.warp(torch.zeros(1, 4, dtype=torch.bfloat16), args).dtype
        == torch.float32
    )


def test_the_chat_models_end_tokens(smollm2):
    import maac

    actor = common.load_learners("agent", AutoModelForCausalLM, [smollm2], maac.Args())[
        0
    ]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in actor.end_ids
