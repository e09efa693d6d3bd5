"""The task str_build: its grid, its commands, its reward by hand, and what agents are told."""

from types import SimpleNamespace

import pytest
from tasks import str_build

import common

TASK = str_build.make_task(SimpleNamespace(num_agents=2))
BLOCKS = {block[0].upper(): block for block in ("stone", "oak_planks", "air")}
BLOCKS |= {"W": "white_concrete", "B": "obsidian"}
# L has its 9 blocks at 00 to 04 and 10 to 40; the background has 16 places
L, BOX = "00 01 02 03 04 10 20 30 40", [f"{x}{y}" for x in range(5) for y in range(5)]
STONES = " ".join(f"S{place}" for place in L.split())
OUTSIDE = " ".join(f"S{place}" for place in BOX if place not in L.split())
BEST = ("S00 O02 S04 O20 S40", "W01 B03 W10 B30")


def put(blocks):
    """The commands of "S01 O23": stone at (0, 1), oak_planks at (2, 3)."""
    places = blocks.split()
    return "".join(f"/setblock {x} {y} 0 {BLOCKS[b]}\n" for b, x, y in places)


@pytest.mark.parametrize("first, second, expected", [
    ("", "", -0.5), ("S00", "", 2 / 9 - 0.5), ("S44", "", -1.5 / 16 - 0.5),
    ("S00 S01", "", 4 / 9 - 1 - 0.5), ("S01 S10", "", 4 / 9 - 0.5),  # neighbours, or not
    ("S00 O01", "", 4 / 9 - 0.25), ("S00", "B01", 4 / 9 - 0.5),  # a palette in use, or not
    ("S00 S01 O10", "", 6 / 9 - 1 / 2 - 0.25),  # one of two pairs
    ("S00 O01", "B00", 4 / 9 - 0.5),  # stone is replaced, and no longer in use
    ("S00 S02", "A00", 2 / 9 - 0.5), ("A00 S00", "", 2 / 9 - 0.5),  # taken away, or not
    (STONES, "", 2 - 1 - 0.5), (f"{STONES} {OUTSIDE}", "", 2 - 1.5 - 1 - 0.5),
    (OUTSIDE, "", -1.5 - 1 - 0.5), (*BEST, 2),  # the least, and the most
    (f"{BEST[0]} S33", BEST[1], 2 - 1.5 / 16),
])  # fmt: skip
def test_rewards_by_hand(first, second, expected):
    texts = [put(first)], [put(second)]
    (paid,) = TASK.reward_func(*texts, batch_items=[{"string": "L"}])
    assert paid == pytest.approx(expected)
    assert TASK.reward_processor(paid) == pytest.approx(expected - 2)


def test_letters_have_5_by_5_blocks_with_two_empty_columns_between():
    letters = [str_build.draw(chr(code)) for code in range(ord("A"), ord("Z") + 1)]
    assert len(set(map(tuple, letters))) == 26
    assert {len(row) for rows in letters for row in rows} == {5}
    rows = ["#......#####", *["#........#.."] * 3, "#####....#.."]
    assert str_build.draw("LT") == str_build.draw("lt") == rows
    targets, _ = str_build.build("LT", [])
    assert {(0, 4), (4, 0), (7, 4), (11, 4), (9, 0)} <= targets and len(targets) == 18
    train = {item["string"] for item in TASK.train_dataset}
    assert len(train) == 8 and {len(word) for word in train} == {1, 2, 3, 4, 5, 6}
    assert not train & {item["string"] for item in TASK.eval_dataset}
    with pytest.raises(common.InputError, match="letters A to Z, got 'ME2'"):
        str_build.draw("ME2")


def test_commands_are_read_and_other_lines_ignored():
    right = {
        "/setblock 1 2 0 stone": (1, 2, "stone"),
        "  /setblock  4 4 0  oak_planks ": (4, 4, "oak_planks"),
        "- /setblock 0 0 0 air": (0, 0, "air"),
        "12. /setblock 0 1 0 stone": (0, 1, "stone"),
        "3) `/setblock 0 2 0 stone`": (0, 2, "stone"),
    }
    wrong = (
        "5 0 0 stone,0 5 0 stone,0 0 1 stone,-1 0 0 stone,~1 0 0 stone,0.5 0 0 stone"
    )
    wrong += ",0 0 0 obsidian,0 0 0 stones,0 0 stone,0 0 0"
    lines = [*right, *(f"/setblock {text}" for text in wrong.split(",")), "```"]
    assert str_build.commands("\n".join(lines), 0, "L") == list(right.values())
    assert str_build.commands(put("B00 S00"), 1, "L") == [(0, 0, "obsidian")]
    many = put("B00 " + "S00 " * 149 + "S10 S20")  # one that is not valid, and 151
    assert [x for x, _, _ in str_build.commands(many, 0, "L")] == [0] * 149 + [1]


def test_agents_are_told_their_own_commands_and_what_is_missing(monkeypatch):
    item, texts = {"string": "L"}, [put("S00 S01 S02 S03 S04") + "I", put("B10 B11")]
    prompts = [TASK.format(item, agent) for agent in (0, 1)]
    turn = common.Sample(item, 0, 0, prompts, completions=texts)
    begun = prompts[0][0]["content"]
    assert "\n".join(str_build.draw("L")) in begun and "from 0 0 0 to 4 4 0" in begun
    news = "Still missing (x, y): [(2, 0), (3, 0), (4, 0)]\nNot in the target: [(1, 1)]"
    first, second = (told[0]["content"] for told in TASK.transition(turn, False))
    assert first == f"{begun}\n\nYour last commands:\n{texts[0][:-1]}{news}"
    assert second.endswith(f"Your last commands:\n{texts[1]}{news}")
    assert "stone" not in second and "obsidian" not in first
    monkeypatch.setattr(str_build, "FEEDBACK", "score")
    # six of nine, one outside; the pairs up the left column, and 10-11, of seven
    score = 12 / 9 - 1.5 / 16 - 5 / 7 - 0.5 - 2
    assert TASK.transition(turn, True)[1].endswith(f"{texts[1]}Score: {score:.2f}")
    turn.completions[0] = "Sorry."
    assert "Your last commands:\nnone\nScore" in TASK.transition(turn, True)[0]


def test_the_overlap_is_that_of_last_turns():
    item, texts = {"string": "L"}, [put("S00 S01 S44"), ""]
    first = common.Sample(item, 0, 0, [], completions=["", ""])
    last = common.Sample(item, 0, 1, [], completions=texts, done=True)
    assert TASK.metrics_callback([first, last]) == {"iou": 2 / 10}
