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

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from speed import SCRIPTS, Job, endless, measure, table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "head_dim": 128}
FIELD = {  # the paper's models: hidden size, intermediate size, layers, heads, heads of the cache
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
    micro_batch_size: int = 4
    """Samples in a forward pass there."""
    model: Path = Path(".cache/smollm2")
    """SmolLM2, made by tests/smollm2.py."""


def predicted(
    config: PreTrainedConfig, job: Job, prompt_tokens: int
) -> dict[str, float]:
    """The formula's terms, in GB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    linear = [x for x in model.base_model.modules() if isinstance(x, torch.nn.Linear)]
    learners = job.num_agents + {"maac": 1, "iac_shared": 0}.get(
        job.script, job.num_agents
    )
    bytes_of = 2 if job.dtype == "bfloat16" else 4
    whole, tokens = model.num_parameters(), prompt_tokens + job.max_new_tokens
    state, gradient = 12 * whole * learners, 4 * whole
    if job.lora_rank is not None:
        adapter = job.lora_rank * sum(x.in_features + x.out_features for x in linear)
        state, gradient = bytes_of * whole + 16 * adapter * learners, 0
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    cache = 2 * layers * config.num_key_value_heads * head * bytes_of
    samples = job.micro_batch_size or job.buffer
    activations = bytes_of * layers * (14 * hidden + 5 * config.intermediate_size)
    scores = 8 * 4 * samples * job.max_new_tokens * config.vocab_size
    update = samples * tokens * activations + scores
    terms = {"state": state, "generation": job.buffer * tokens * cache}
    terms |= {"update": update, "gradient": gradient}
    return {name: size / 1e9 for name, size in terms.items()}


def peak(terms: dict[str, float]) -> float:
    """The formula's sum, in GB."""
    return 0.5 + terms["state"] + max(x for name, x in terms.items() if name != "state")


def main(args: Args) -> None:
    """Print a table of what was measured, and one of what the field's models need."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(args.model) if args.scripts else None
        model = endless(args.model, Path(folder)) if args.scripts else None
        tokenizer = AutoTokenizer.from_pretrained(args.model) if args.scripts else None
        sizes = {"buffer": args.buffer, "max_new_tokens": args.max_new_tokens}
        sizes["micro_batch_size"] = args.micro_batch_size
        jobs = [
            Job("ours", script, num_agents=count, lora_rank=rank, **sizes)
            for script in args.scripts
            for count in args.agents
            for rank in args.ranks
        ]
        for job in jobs:
            found = measure(job, model, sys.executable, Path(folder))["memory"] / 1e3
            read = max(map(len, tokenizer(job.prompts).input_ids))
            terms = predicted(config, job, prompt_tokens=read)
            mode = "all weights" if job.lora_rank is None else f"LoRA {job.lora_rank}"
            sums = [f"{found:.2f}", f"{peak(terms):.2f}", f"{peak(terms) / found:.2f}"]
            rows.append([f"{job.script}.py", f"{job.num_agents}", mode, *sums])
            print(rows[-1], {k: round(x, 2) for k, x in terms.items()}, flush=True)
    print(table("script | agents | mode | measured GB | formula | ratio", rows), "\n")
    rows = []
    for name, (hidden, inner, layers, heads, cached) in FIELD.items():
        config = AutoConfig.for_model("qwen3", hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=cached,
            **QWEN)  # fmt: skip
        for mode, flags in MODES.items():
            settings = {"buffer": 64, "max_new_tokens": 256, "micro_batch_size": 1}
            jobs = [Job("ours", script, **flags, **settings) for script in SCRIPTS]
            sums = [peak(predicted(config, job, prompt_tokens=512)) for job in jobs]
            rows.append([name, mode, *(f"{x:.0f}" for x in sums)])
    print(table("model | mode | " + " | ".join(f"{x}.py" for x in SCRIPTS), rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
