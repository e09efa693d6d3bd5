"""Train with the reference library CoMLRL: one process, in an environment of its own.

    python reference.py '{"script": "maac", "agents": [".cache/smollm2"], "task": "vowels",
        "prompts": ["a", "b"], "num_agents": 2, "config": {"rollout_buffer_size": 16}}'

agents: one folder for all, or one each; critics: the same, the agents' if not given; task:
vowels, which pays the share of vowels in a joint completion for the prompts given, or
sum_to_target. Prints one JSON line: the seconds of training alone, the tokens
of every completion, and the reward of every item.
"""

import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from comlrl.trainers.actor_critic import (
    IACConfig,
    IACTrainer,
    MAACConfig,
    MAACTrainer,
)
from datasets import Dataset
from transformers import AutoTokenizer


def vowels(*completions: list[str]) -> list[float]:
    """The share of vowels in each joint completion."""
    joint = ["".join(texts).lower() for texts in zip(*completions, strict=True)]
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in joint]


def main(spec: dict) -> dict:
    """Train over the prompts with the trainer that answers to our script."""
    config = {
        "num_turns": 1,
        "num_train_epochs": 1,
        "eval_interval": 0,
        **spec["config"],
    }
    count = spec["num_agents"]
    config |= {"num_agents": count, "early_termination_threshold": None}
    agents = (spec["agents"] * count)[:count]
    critics = (spec.get("critics", agents) * count)[:count]
    if spec["script"] == "maac":
        trainer_class, args = MAACTrainer, MAACConfig(**config)
        models = {"critics": critics[:1]}
    else:
        separate = spec["script"] == "iac_separate"
        trainer_class = IACTrainer
        args = IACConfig(**config, use_separate_critic=separate)
        models = {"critics": critics} if separate else {}
    lengths: list[int] = []
    rewards: list[float] = []

    def note(rollouts: list) -> dict[str, float]:
        lengths.extend(sample.response_len for sample in rollouts)
        rewards.append(float(np.mean([float(sample.reward) for sample in rollouts])))
        return {}

    seed = spec.get("seed", 1)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    items, reward = [{"prompt": text} for text in spec.get("prompts", [])], vowels
    if spec["task"] != "vowels":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from common import sum_to_target

        task = sum_to_target(SimpleNamespace(num_agents=count, num_turns=1))
        items, reward = task.train_dataset, task.reward_func
    trainer = trainer_class(
        agents=agents,
        **models,
        tokenizer=[AutoTokenizer.from_pretrained(agent) for agent in agents],
        reward_func=reward,
        train_dataset=Dataset.from_list(items),
        args=args,
        metrics_callback=note,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "lengths": lengths, "rewards": rewards}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
