"""Measure what bfloat16 does to log-probabilities, token by token, on a real model.

    python tests/benchmarks/precision.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python tests/benchmarks/precision.py

16 completions are sampled in bfloat16. Their tokens' log-probabilities are set against those of
the same weights in float32, and those that they were sampled with against those that they are
scored with, in another batch. Once with the head's product in float32, as the scripts have it, and
once by autocast alone. The seconds are of scoring them and of its backward pass.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
from speed import PROMPTS, table

import common
import maac


@dataclass
class Args:
    """What to measure."""

    model: str = ".cache/smollm2"
    """SmolLM2, made by tests/smollm2.py."""
    max_new_tokens: int = 32
    """Tokens of a completion at most."""
    lora_rank: int | None = None
    """Adapters over a base that is in bfloat16 itself; None = autocast."""


def logprobs(actor: common.Learner, texts: tuple, args: maac.Args) -> Tensor:
    """The log-probability of each token of the completions, padding left out."""
    inputs, width = maac.pad_batch(actor, *texts), max(map(len, texts[0]))
    tokens, mask = inputs["input_ids"][:, width:], inputs["attention_mask"][:, width:]
    places = torch.arange(width - 1, width - 1 + tokens.shape[1])
    with common.autocast(actor, args):
        output = actor.model(**inputs, use_cache=False, logits_to_keep=places)
    scores = maac.warp(actor, output.logits, args, tokens).log_softmax(-1)
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)[mask == 1]


def measure(args: Args, head: str) -> list[str]:
    """A row of the table, for a head in "float32" or in "bfloat16"."""
    whole = maac.Args(device="cpu", max_new_tokens=args.max_new_tokens)
    half, drawn = replace(whole, dtype="bfloat16", lora_rank=args.lora_rank), []
    load = ("agent", AutoModelForCausalLM, [args.model], 1)
    (reference,) = common.load_learners(*load, whole)
    lower, draw = common.lower_precision, maac.draw_tokens
    if head == "bfloat16":
        lower = lambda model, args: None
    with patch.object(common, "lower_precision", lower):
        (actor,) = common.load_learners(*load, half)

    def note(scores: Tensor, uniforms: Tensor) -> Tensor:
        tokens = draw(scores, uniforms)
        drawn.append(scores.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1))
        return tokens

    torch.set_float32_matmul_precision("medium")  # as a run in bfloat16 has it
    actor.end_ids = []  # all of full length
    prompts = actor.tokenizer(PROMPTS[:16], add_special_tokens=False).input_ids
    generator = torch.Generator().manual_seed(0)
    with common.autocast(actor, half), patch.object(maac, "draw_tokens", note):
        texts = prompts, maac.generate(actor, prompts, generator, half)
    start = time.perf_counter()
    scored = logprobs(actor, texts, half)
    scored.sum().backward()
    seconds = time.perf_counter() - start
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        exact = logprobs(reference, texts, whole)
    row = [head]
    for other in (exact, torch.stack(drawn, dim=1).flatten()):
        gap = (scored.detach() - other).abs()
        row += [f"{x:.3f}" for x in (gap.max(), gap.quantile(0.99), gap.mean())]
    return [*row, f"{seconds:.1f}"]


if __name__ == "__main__":
    given = tyro.cli(Args)
    heads = "head | off float32: largest | 99 % | mean | sampled, scored: largest"
    rows = [measure(given, head) for head in ("float32", "bfloat16")]
    print(table(f"{heads} | 99 % | mean | seconds", rows))
