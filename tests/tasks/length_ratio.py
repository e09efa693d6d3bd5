"""length_ratio: each agent writes a story, 2 to 3 times as long as that of the agent before it.

The reward is the mean over neighbours of 1 within those bounds (in characters), falling linearly
outside, to 0 at ratios 0 and 5; it is -1 if a text is empty. For pretrained chat models.
"""

from itertools import pairwise

from common import Prompt, Task, require

TOPICS = """a lighthouse keeper, a lost dog, the first snow, a broken clock, a brave mouse,
an old ship, a secret garden, a talking tree, a rainy day, a stolen crown, a kind giant,
a tiny robot, a night train, a magic pencil, a hungry fox, a paper boat, a haunted house,
a wise owl, a desert road, a red balloon, a sleepy village, a silver key, a clumsy wizard,
a river crossing, a forgotten song, a mountain hut, a friendly ghost, a market day,
a shooting star, a stubborn donkey, an empty theatre, a long winter"""


def closeness(short: str, long: str) -> float:
    """What two neighbours earn, 0 to 1."""
    ratio = len(long) / len(short)
    return max(0.0, min(1.0, ratio / 2, (5 - ratio) / 2))


def reward(*completions: list[str]) -> list[float]:
    """One list of texts per agent -> one reward per joint completion."""
    rewards = []
    for texts in zip(*completions, strict=True):
        if all(text.strip() for text in texts):
            scores = [closeness(*pair) for pair in pairwise(texts)]
            rewards.append(sum(scores) / len(scores))
        else:
            rewards.append(-1.0)
    return rewards


def ask(item: dict) -> Prompt:
    """The chat that an item becomes."""
    request = f"Write a story about {item['prompt']} in one or two sentences."
    return [{"role": "user", "content": request}]


def make_task(args) -> Task:
    """The task for args.num_agents agents; InputError for one alone."""
    compares = "task length_ratio compares agents"
    require(args.num_agents > 1, f"{compares}: num_agents must be 2 or more")
    items = [{"prompt": " ".join(topic.split())} for topic in TOPICS.split(",")]
    return Task(items, reward, items, formatters=ask)
