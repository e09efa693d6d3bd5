"""Peak memory of the scripts: measured on SmolLM2, and by a formula for any size.

    python tests/benchmarks/memory.py --model .cache/smollm2      # README's table
    python tests/benchmarks/memory.py --scripts --ranks           # the formula alone

The formula, in bytes, for N actors and C critics (none in iac_shared.py) of P parameters each:

    all weights: 12 P (N + C), float32 weights and Adam's two moments
    LoRA: b P for the frozen base that all share, b = 4 or 2 by --dtype, and 16 A (N + C), A the
        parameters of an adapter: its weights, gradient and moments are float32
    and the largest of generation: the cache of keys and values of the buffer's samples,
        of update: activations of a micro-batch of m samples of L tokens, T of them new, b (14 H +
        5 F) for each token and layer, H hidden units and F of the MLP, and 8 float32 tensors of
        scores (m, T, V),
        and of the gradient of all weights: 4 P, of the one model that is being updated
    and 0.5 GB for Python and torch.

That counts what a Llama's layer keeps for its backward pass; a critic of maac.py reads the
prompts of all agents, which is longer.
"""

import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from speed import SCRIPTS, Job, endless, measure, table
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "head_dim": 128}
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
SIZES = f"{SIZES} num_key_value_heads".split()
FIELD = {  # the paper's models
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8),
    "Qwen2.5-Coder-3B": (2048, 11008, 36, 16, 2),
    "Qwen3-4B": (2560, 9728, 36, 32, 8),
}
MODES = {  # flags of a row
    "all weights": {}, "LoRA": {"lora_rank": 16},
    "LoRA, bfloat16": {"lora_rank": 16, "dtype": "bfloat16"},
}  # fmt: skip


@dataclass
class Args:
    """What to measure and what to compute."""

    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to measure."""
    ranks: tuple[int | None, ...] = (None, 16)
    """Ranks of the adapters to measure; None = all weights."""
    agents: tuple[int, ...] = (2,)
    """Teams to measure."""
    buffer: int = 16
    """Samples of the buffer that is measured."""
    max_new_tokens: int = 64
    """Tokens of a completion there."""
    model: Path = Path(".cache/smollm2")
    """SmolLM2, made by tests/smollm2.py."""


def predicted(config: PreTrainedConfig, job: Job, prompt_tokens: int) -> float:
    """The formula, in GB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    critics = {"maac": 1, "iac_separate": job.num_agents, "iac_shared": 0}[job.script]
    learners = job.num_agents + critics
    bytes_of = 2 if job.dtype == "bfloat16" else 4
    whole, tokens = model.num_parameters(), prompt_tokens + job.max_new_tokens
    state, gradient = 12 * whole * learners, 4 * whole
    if job.lora_rank is not None:
        linear = [x for x in model.base_model.modules() if isinstance(x, nn.Linear)]
        adapter = job.lora_rank * sum(x.in_features + x.out_features for x in linear)
        state, gradient = bytes_of * whole + 16 * adapter * learners, 0
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    cache = 2 * layers * config.num_key_value_heads * head * bytes_of
    activations = bytes_of * layers * (14 * hidden + 5 * config.intermediate_size)
    scores = 8 * 4 * job.micro_batch_size * job.max_new_tokens * config.vocab_size
    update = job.micro_batch_size * tokens * activations + scores
    return 0.5 + (state + max(job.buffer * tokens * cache, update, gradient)) / 1e9


def measured(args: Args) -> Iterator[list[str]]:
    """A row for each job: its peak, and the formula's."""
    config = AutoConfig.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes = {"buffer": args.buffer, "max_new_tokens": args.max_new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        model = endless(args.model, Path(folder))
        for script, count, rank in itertools.product(
            args.scripts, args.agents, args.ranks
        ):
            sizes |= {"num_agents": count, "lora_rank": rank}
            job = Job("ours", script, micro_batch_size=4, **sizes)
            found = measure(job, model, sys.executable, Path(folder))["memory"] / 1e3
            read = max(map(len, tokenizer(job.prompts).input_ids))
            said = predicted(config, job, prompt_tokens=read)
            print(job, f"{found:.2f} GB", flush=True)
            mode = "all weights" if rank is None else f"LoRA {rank}"
            sums = [f"{x:.2f}" for x in (found, said, said / found)]
            yield [f"{script}.py", f"{count}", mode, *sums]


def main(args: Args) -> None:
    """Print a table of what was measured, and one of what the field's models need."""
    if args.scripts:
        rows = list(measured(args))
        print(table("script | agents | mode | measured GB | formula | ratio", rows))
    rows = []
    for (name, numbers), mode in itertools.product(FIELD.items(), MODES):
        sizes = dict(zip(SIZES, numbers, strict=True))
        config = AutoConfig.for_model("qwen3", **sizes, **QWEN)
        flags = {"buffer": 64, "max_new_tokens": 256, "micro_batch_size": 1}
        jobs = [Job("ours", script, **flags, **MODES[mode]) for script in SCRIPTS]
        sums = [predicted(config, job, prompt_tokens=512) for job in jobs]
        rows.append([name, mode, *(f"{x:.0f}" for x in sums)])
    heads = " | ".join(f"{script}.py" for script in SCRIPTS)
    print("\n" + table(f"model | mode | {heads}", rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
