"""str_build: two agents build a word out of blocks, unseen by each other.

Letters of 5 x 5 stand in a plane, two empty columns between them. Each agent writes lines
`/setblock x y z block` with its own palette; agent 1's come after agent 0's. Every turn begins
with an empty plane. Words: those below, or --train-file's, a line {"string": "WORD"} each.
Source: StrBuild of arXiv 2601.21972.
"""

import re
from collections.abc import Sequence
from functools import partial

from common import Prompt, Sample, Task, require

FONT = """
.###. ####. .#### ####. ##### ##### .#### #...# ##### ..### #...# #.... #...#
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #..#. #.... ##.##
##### ####. #.... #...# ###.. ###.. #..## ##### ..#.. ...#. ###.. #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .#### ####. ##### #.... .#### #...# ##### .##.. #...# ##### #...#

#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #.#.# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. ##.## .#.#. ..#.. .#...
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. #...# #...# ..#.. #####
"""
WORDS = "I T OX GO CAT MOON RIVER PLANET L UP SUN STONE"  # the last four are held out
PALETTES = (("oak_planks", "stone"), ("white_concrete", "obsidian"))  # a texture each
COMMAND = re.compile(r"([-*+]|\d+[.)])? ?`*/setblock (\d{1,3}) ([0-4]) 0 (\w+)`*")
MAX_COMMANDS = 150  # of each agent
SHIFT = -2.0  # added to every reward, so that the best is 0
FEEDBACK = "positions"  # told after a turn: positions, or score
PROMPT = """You and another builder build the word "{word}" of blocks, each a part of it.{order}
The target, # for a block:
{rows}
The box is from 0 0 0 to {right} 4 0: x goes to the right, y upwards (the first row is y = 4).
Your blocks are {one} and {two}: use both, and never two of a kind side by side. The block air
takes one away. Write only lines like this one, at most {most}:
/setblock 0 4 0 {one}
{news}"""


def draw(word: str) -> list[str]:
    """The word as five rows of # and ., top down; InputError if it is not of letters."""
    good = isinstance(word, str) and re.fullmatch("[A-Za-z]+", word)
    require(good, f"its string must be of letters A to Z, got {word!r:.50}")
    glyphs, places = FONT.split(), [divmod(ord(c) - ord("A"), 13) for c in word.upper()]
    return ["..".join(glyphs[65 * k + 13 * r + n] for k, n in places) for r in range(5)]


def commands(text: str, agent: int, word: str) -> list[tuple[int, int, str]]:
    """x, y and block of an agent's valid commands; other lines and list marks are ignored."""
    found, width = [], len(draw(word)[0])
    for line in text.splitlines():
        match = COMMAND.fullmatch(" ".join(line.split()))
        if match and match[4] in (*PALETTES[agent], "air") and int(match[2]) < width:
            found.append((int(match[2]), int(match[3]), match[4]))
    return found[:MAX_COMMANDS]


def build(word: str, texts: Sequence[str]) -> tuple[set, dict]:
    """The places (x, y) to cover, and the blocks that stand there and elsewhere in the end."""
    blocks, targets = {}, set()
    for agent, text in enumerate(texts):
        blocks |= {(x, y): block for x, y, block in commands(text, agent, word)}
    for row, cells in enumerate(draw(word)):
        targets |= {(x, 4 - row) for x, cell in enumerate(cells) if cell == "#"}
    return targets, {place: block for place, block in blocks.items() if block != "air"}


def build_reward(word: str, texts: Sequence[str]) -> float:
    """What a turn is paid, at best 2: 2 times the share of the word that is covered, less 1.5
    times the share of the background that is, less the share of the pairs of neighbours that
    are of one texture, less 0.25 for each agent whose palette is not all to be seen."""
    targets, blocks = build(word, texts)
    background, pairs = 5 * len(draw(word)[0]) - len(targets), []
    for x, y in blocks:
        for neighbour in {(x + 1, y), (x, y + 1)} & set(blocks):
            pairs.append(blocks[x, y] == blocks[neighbour])
    reward = 2 * len(targets & set(blocks)) / len(targets)
    reward -= 1.5 * len(set(blocks) - targets) / background
    unused = sum(not set(palette) <= set(blocks.values()) for palette in PALETTES)
    return reward - sum(pairs) / max(len(pairs), 1) - 0.25 * unused


def ask(item: dict, agent: int) -> Prompt:
    """An agent's prompt; what the transition tells stands at the end."""
    rows, (one, two) = draw(item["string"]), PALETTES[agent]
    order = " Your blocks replace the other builder's." if agent else ""
    text = PROMPT.format(
        word=item["string"], order=order, rows="\n".join(rows), one=one, two=two,
        right=len(rows[0]) - 1, most=MAX_COMMANDS, news=item.get("prompt") or "",
    )  # fmt: skip
    return [{"role": "user", "content": text.strip()}]


def tell(agent_completions: list, prompt_history_per_agent: list, **_) -> list[str]:
    """external_transition: an agent's own commands, and FEEDBACK on what both have built."""
    first = prompt_history_per_agent[0][0][0]["content"]
    word, prompts = re.search('word "([A-Za-z]+)"', first)[1], []
    targets, blocks = build(word, agent_completions)
    news = f"Score: {build_reward(word, agent_completions) + SHIFT:.2f}"
    if FEEDBACK == "positions":
        missing, extra = sorted(targets - set(blocks)), sorted(set(blocks) - targets)
        news = f"Still missing (x, y): {missing}\nNot in the target: {extra}"
    for agent, text in enumerate(agent_completions):
        own = [f"/setblock {x} {y} 0 {b}" for x, y, b in commands(text, agent, word)]
        prompts.append("\n".join(["\nYour last commands:", *(own or ["none"]), news]))
    return prompts


def overlap(samples: list[Sample]) -> dict[str, float]:
    """metrics_callback: blocks in the word / places of the word or a block, at last turns."""
    last = [build(s.item["string"], s.completions) for s in samples if s.done]
    ratios = [len(places & set(b)) / len(places | set(b)) for places, b in last]
    return {"iou": sum(ratios) / len(ratios)}


def make_task(args) -> Task:
    """The task for two agents; InputError for another number."""
    require(args.num_agents == 2, "str_build is for two agents: num_agents must be 2")

    def reward(*completions: list[str], batch_items: list[dict]) -> list[float]:
        return [build_reward(batch_items[0]["string"], t) for t in zip(*completions)]

    items = [{"string": word} for word in WORDS.split()]
    formatters = [partial(ask, agent=agent) for agent in (0, 1)]
    shift = lambda reward: reward + SHIFT
    return Task(items[:8], reward, items[8:], shift, formatters, tell, overlap)
