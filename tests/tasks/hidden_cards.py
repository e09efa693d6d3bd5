"""hidden_cards: what decides the return stands where the other agents cannot see it.

Each agent is dealt a card, 0 to 9, that no other sees, and answers it at every turn: a digit of
the card's half, 0 to 4 or 5 to 9, is right. It reads its marks so far. Nothing is paid before the
last turn. Then the team gets the share of right answers, of all agents at all turns, and its
luck: a third of the sum of (card - 4.5). Luck is no agent's doing, but decides most of the
return: a critic that reads all the cards can take it out of the advantage, one that reads its own
agent's card only that agent's part.
"""

import random

from common import Sample, Task


def right(prompt: str, text: str) -> bool:
    """Whether an answer is of the half of the card in its prompt."""
    return text in tuple("01234" if prompt[5] in "01234" else "56789")


def mark(**history) -> list[str]:
    """external_transition: each agent's marks, a + or a - for every turn so far."""
    asked, texts = (history[f"{x}_history_per_agent"] for x in ("prompt", "response"))
    pairs = zip(asked, texts, strict=True)
    return ["".join("-+"[right(*turn)] for turn in zip(*pair)) for pair in pairs]


def share(samples: list[Sample]) -> dict[str, float]:
    """metrics_callback: the share of right answers."""
    answers = [right(*x) for s in samples for x in zip(s.prompts, s.completions)]
    return {"right": sum(answers) / len(answers)}


def make_task(args) -> Task:
    """The task for args.num_agents agents and args.num_turns turns."""
    agents, turns = range(args.num_agents), args.num_turns

    def reward(*completions: list[str], prompts: list[list[str]]) -> list[float]:
        rewards = []
        for asked, texts in zip(zip(*prompts), zip(*completions), strict=True):
            marks = "".join(prompt.split("\n")[1] for prompt in asked)
            hits = marks.count("+") + sum(map(right, asked, texts))
            luck = sum(int(prompt[5]) - 4.5 for prompt in asked) / 3
            last = len(marks) == len(agents) * (turns - 1)
            rewards.append(hits / (len(agents) * turns) + luck if last else 0.0)
        return rewards

    def deal(agent: int):
        return lambda item: f"card {item['cards'][agent]}\n{item['prompt']}\n"

    hands = [random.choices(range(10), k=len(agents)) for _ in range(1000)]
    items = [{"prompt": "", "cards": hand} for hand in hands]
    formatters = [deal(agent) for agent in agents]
    return Task(items, reward, items[:100], None, formatters, mark, share)
