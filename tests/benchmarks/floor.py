"""The floor of an update: one process that does what no trainer can leave out.

speed.py starts it, with a job as JSON. For each agent transformers' own `generate` on the
batch of all prompts, then one forward and backward of each model over the same tokens (actors:
cross entropy of the completions; critics: the last hidden state, the prompts only) and a fused
AdamW step. No rewards, values, targets. It cuts the batch as the scripts do, and its critics
read a text once; it has the scripts' memory settings, which come with `common`. Prints one JSON
line with the seconds, loading left out.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common


def main(spec: dict) -> dict:
    """One update of the script's models, without reinforcement learning."""
    count, new = spec["num_agents"], spec["max_new_tokens"]
    critics = {"maac": 1, "iac_separate": count, "iac_shared": 0}[spec["script"]]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    classes = [AutoModelForCausalLM] * count + [AutoModel] * critics
    load = {"dtype": torch.float32}
    models = [auto.from_pretrained(spec["model"], **load) for auto in classes]
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-5, fused=True) for m in models]
    texts = [text for text in spec["prompts"] for _ in range(spec["num_generations"])]
    reads = spec["prompts"]
    if spec["script"] == "maac":
        reads = ["".join(f"Agent {k}: {x}\n" for k in range(count)) for x in reads]
    half = spec["dtype"] == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}

    start = time.perf_counter()
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    inputs, lengths = [], []
    for actor in models[:count]:
        with autocast, torch.no_grad():
            ids = actor.generate(**prompts, max_new_tokens=new, **sampling)
        written = ids.shape[1] - prompts.input_ids.shape[1]
        mask = nn.functional.pad(prompts.attention_mask, (0, written), value=1)
        inputs.append({"input_ids": ids, "attention_mask": mask})
        lengths.append(written)
    inputs += [tokenizer(reads, return_tensors="pt", padding=True)] * critics
    for k, (model, optimizer, batch) in enumerate(zip(models, optimizers, inputs)):
        for part in common.slices(len(batch["input_ids"]), spec["micro_batch_size"]):
            rows = {key: tensor[part] for key, tensor in batch.items()}
            with autocast:
                if k < count:
                    logits = model(**rows, logits_to_keep=new + 1).logits[:, :-1]
                    logits, tokens = logits.flatten(0, 1), rows["input_ids"][:, -new:]
                    loss = nn.functional.cross_entropy(logits.float(), tokens.flatten())
                else:
                    loss = model(**rows).last_hidden_state[:, -1].square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - start, "lengths": lengths}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
