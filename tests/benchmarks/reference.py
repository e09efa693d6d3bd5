"""Train with the reference library CoMLRL: one process, in an environment of its own.

speed.py starts it on its prompts, and learning.py on sum_to_target; both give the script that is
answered to, its models and the trainer's settings as JSON. Prints one JSON line: the seconds of
training alone, the tokens of every completion, and the reward of every item.
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
from speed import vowels
from transformers import AutoTokenizer


def main(spec: dict) -> dict:
    """Train over the prompts with the trainer that answers to our script."""
    count, agents, critics = spec["num_agents"], spec["agents"], spec["critics"]
    config = {"num_turns": 1, "num_train_epochs": 1, "eval_interval": 0}
    config |= {"num_agents": count, "early_termination_threshold": None}
    config |= spec["config"]
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

    random.seed(spec["seed"])
    np.random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    if "prompts" in spec:
        items, reward = [{"prompt": text} for text in spec["prompts"]], vowels
    else:  # common sets how memory is taken, which is not to help in speed.py
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
