"""The floor of an update: one process that does what no trainer can leave out.

    python floor.py '{"script": "maac", "model": ".cache/smollm2", "prompts": ["a", "b"],
        "num_agents": 2, "config": {"max_new_tokens": 64, "num_generations": 1},
        "dtype": "float32", "micro_batch_size": 4}'

For each agent transformers' own `generate` on the batch of all prompts, then one forward and
backward of each model over the same tokens (actors: cross entropy of the completions; critics:
the last hidden state, the prompts only) and a fused AdamW step. No rewards, values, targets. It
cuts the batch as the scripts do, and its critics read a text once; it has the scripts' memory
settings, which come with `common`. Prints one JSON line with the seconds, loading left out.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common


def main(spec: dict) -> dict:
    """One update of the script's models, without reinforcement learning."""
    count, config = spec["num_agents"], spec["config"]
    critics = {"maac": 1, "iac_separate": count, "iac_shared": 0}[spec["script"]]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    load = {"dtype": torch.float32}
    models = [
        AutoModelForCausalLM.from_pretrained(spec["model"], **load)
        for _ in range(count)
    ] + [AutoModel.from_pretrained(spec["model"], **load) for _ in range(critics)]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-5, fused=True) for m in models]
    texts = [text for text in spec["prompts"] for _ in range(config["num_generations"])]
    joint = ["".join(f"Agent {k}: {text}\n" for k in range(count)) for text in texts]
    half = spec["dtype"] == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    lengths = []

    start = time.perf_counter()
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = []
    for actor in models[:count]:
        with autocast, torch.no_grad():
            ids = actor.generate(
                **prompts,
                max_new_tokens=config["max_new_tokens"],
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
            )
        written = ids.shape[1] - prompts.input_ids.shape[1]
        mask = torch.nn.functional.pad(prompts.attention_mask, (0, written), value=1)
        inputs.append({"input_ids": ids, "attention_mask": mask})
        lengths.append(written)
    reads = list(dict.fromkeys(joint if spec["script"] == "maac" else texts))
    inputs += [tokenizer(reads, return_tensors="pt", padding=True)] * critics
    new = config["max_new_tokens"]
    for k, (model, optimizer, batch) in enumerate(zip(models, optimizers, inputs)):
        for part in common.slices(len(batch["input_ids"]), spec["micro_batch_size"]):
            rows = {key: tensor[part] for key, tensor in batch.items()}
            with autocast:
                if k < count:
                    logits = model(**rows, logits_to_keep=new + 1).logits[:, :-1]
                    loss = torch.nn.functional.cross_entropy(
                        logits.float().flatten(0, 1),
                        rows["input_ids"][:, -new:].flatten(),
                    )
                else:
                    loss = model(**rows).last_hidden_state[:, -1].square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - start, "lengths": lengths}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
