"""Train with the reference library CoMLRL: one process, in an environment of its own.

    python reference.py '{"script": "maac", "model": ".cache/smollm2", "prompts": ["a", "b"],
        "num_agents": 2, "config": {"rollout_buffer_size": 16, "max_new_tokens": 64}}'

Prints one JSON line: the seconds of training alone, and the tokens of every completion. The
reward of a joint completion is its share of vowels.
"""

import json
import sys
import time

import torch
from comlrl.trainers.actor_critic import (
    IACConfig,
    IACTrainer,
    MAACConfig,
    MAACTrainer,
)
from datasets import Dataset


def vowels(*completions: list[str]) -> list[float]:
    """The share of vowels in each joint completion."""
    joint = ["".join(texts).lower() for texts in zip(*completions, strict=True)]
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in joint]


def main(spec: dict) -> dict:
    """Train one epoch over the prompts with the trainer that answers to our script."""
    config = {
        "num_turns": 1,
        "num_train_epochs": 1,
        "eval_interval": 0,
        **spec["config"],
    }
    config |= {"num_agents": spec["num_agents"], "early_termination_threshold": None}
    critic = {"critic_model": spec["model"]}
    if spec["script"] == "maac":
        trainer_class, args = MAACTrainer, MAACConfig(**config)
    else:
        separate = spec["script"] == "iac_separate"
        critic = critic if separate else {}
        trainer_class, args = (
            IACTrainer,
            IACConfig(**config, use_separate_critic=separate),
        )
    lengths: list[int] = []

    def count(rollouts: list) -> dict[str, float]:
        lengths.extend(sample.response_len for sample in rollouts)
        return {}

    torch.manual_seed(1)
    trainer = trainer_class(
        agent_model=spec["model"],
        **critic,
        reward_func=vowels,
        train_dataset=Dataset.from_list([{"prompt": text} for text in spec["prompts"]]),
        args=args,
        metrics_callback=count,
    )
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, "lengths": lengths}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
