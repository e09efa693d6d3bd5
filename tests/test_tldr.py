"""The task tldr: its reward by hand, and where its posts come from."""

import itertools
import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from conftest import ROOT
from tasks import tldr

import common

TASK = str(ROOT / "tests" / "tasks" / "tldr.py")
ONE_EACH = [phrases.split(", ")[0] for phrases in tldr.TRANSITIONS.values()]


def made(numbers, characters, before=""):
    """`before` and the words "w000", "w001", ... of `numbers`, the last drawn out to fit."""
    text = " ".join([*before.split(), *(f"w{number:03d}" for number in numbers)])
    assert len(text) <= characters
    return text.ljust(characters, "x")


def paid(summary, longer, expected):
    """Whether the reward of two texts is the expected one, roundings of a few sums apart."""
    return tldr.tldr_reward(summary, longer) == pytest.approx(expected, abs=1e-9)


def style(before="", shared=0):
    """What level 4 adds, with `shared` words of 200 in common, the longer text so begun.

    50 words and 150 + shared, of them `shared` in common, so that all are 200: 3 times the
    unique words or more, in 400 and 1200 characters. The levels below it pay 0.5 + 1 + 0.5.
    """
    longer = made([*range(shared), *range(100, 250)], 1200, before)
    return tldr.tldr_reward(made(range(50), 400), longer) - 2.0


def test_level_1_both_have_8_to_256_words():
    """Between white space; both texts have as many characters: level 2 pays nothing."""
    other = made(range(100), 1300)
    for words, expected in [(0, 0), (1, 0), (7, 0), (8, 0.5), (256, 0.5), (257, 0)]:
        text = made(range(words), 1300) if words else ""
        for pair in ((text, text), (text, other), (other, text)):
            assert paid(*pair, expected), words
    seven = "a-b c.d e'f g/h i,j k+l m=n"  # 14 words, but for the white space
    assert paid(seven, seven, 0) and paid(f"{seven} -", f"{seven} -", 0.5)
    assert paid("a b c d e f g h", "a\nb\tc\nd\te\nf\tg\nh", 0.5)


LENGTHS = [
    (100, 0), (1000, 0), (1099, 0), (1100, 0), (1101, 0.001 / 0.5), (1350, 0.25 / 0.5),
    (1599, 0.499 / 0.5), (1600, 1), (2400, 1), (3200, 1), (3201, 1 - 0.001 / 1.8),
    (4100, 1 - 0.9 / 1.8), (4999, 0.001 / 1.8), (5000, 0), (5001, 0), (9000, 0),
]  # fmt: skip


@pytest.mark.parametrize("characters, expected", LENGTHS)
def test_level_2_the_ratio_in_characters(characters, expected):
    """With 8 words and 8 others level 3 stops at 1. With 16 others it pays 0.5, if reached."""
    first = made(range(8), 1000)
    assert paid(first, made(range(8, 16), characters), 0.5 + expected)
    more = 0.5 if 1100 <= characters <= 5000 else 0
    assert paid(first, made(range(8, 24), characters), 0.5 + expected + more)


UNIQUE = [
    (10, 0), (20, 0), (25, 0), (26, 0), (27, 0.5 * 0.05 / 0.7), (33, 0.25),
    (39, 0.5 * 0.65 / 0.7), (40, 0.5), (41, 0.5), (100, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("unique, expected", UNIQUE)
def test_level_3_the_ratio_in_unique_words(unique, expected):
    """Of 20, in texts twice as long: 0.5 + 1 before level 3. From 1.3, which is 26 words, level 4
    is reached, where two words in common of `all` are worth 0.6 * 2 / all / 0.03, at most 0.6."""
    first = made(range(20), 400)
    assert paid(first, made(range(100, 100 + unique), 800), 1.5 + expected)
    shared = made([0, 1, *range(100, 98 + unique)], 800)
    more = min(0.6, 0.6 * 2 / (18 + unique) / 0.03) if unique >= 26 else 0
    assert paid(first, shared, 1.5 + expected + more)


def test_level_3_counts_a_word_once():
    """20 words are 20 words, four times or with a comma too; of 8 dots there are none."""
    commas = ", ".join(f"w{n}" for n in range(100, 120))
    for longer in (made([*range(100, 120)] * 4, 400), made([], 400, commas)):
        assert paid(made(range(20), 200), longer, 1.5)
    repeated = made([*range(10)] * 2, 99)  # 10 unique words, and 20 in the longer one
    assert paid(repeated, made(range(100, 120), 198), 2.0)
    assert paid(" ".join("." * 8), "aaa bbb ccc ddd eee fff ggg hhh", 1.5)


def test_level_4_categories_of_transition_words():
    """0.4 * (0.4 + 0.05 * (count - 1)), and no word in common: 0.4 * 0.95 with all twelve. Each
    counts once, and in the longer text only."""
    for count, expected in [(0, 0), (1, 0.16), (3, 0.2), (12, 0.38)]:
        for first in range(12):
            phrases = " ".join((ONE_EACH * 2)[first : first + count])
            assert style(phrases) == pytest.approx(expected, abs=1e-9)
    assert style("thus thus therefore but as a result") == pytest.approx(0.18)
    summary = made(range(50), 400, "thus however finally overall certainly")
    assert paid(summary, made(range(100, 250), 1000), 2.0)


def test_transition_words_are_whole_words_and_phrases():
    """Each of one category, as it stands and among other marks; not in parts, or within words."""
    for phrases in tldr.TRANSITIONS.values():
        for phrase in phrases.split(", "):
            for text in (phrase, f'w9 ({phrase.upper()}, "w8"', f'"{phrase}".'):
                assert style(text) == pytest.approx(0.16), text
    parts = "soap soup also_so thusly sothus butter yeti iffy firsthand _thus thus2"
    for text in ("for instance", "on the other hand", "in other words"):
        first, tail = text.split(" ", 1)
        broken = [parts, first, tail, f"x{text}", f"{text}x", f"{first} w9 {tail}"]
        assert [style(x) for x in broken] == pytest.approx([0.0] * 6)


def test_level_4_words_in_common():
    """Of 200: 0.6 * J / 0.03 with J = shared / 200, and 0.6 from J = 0.03 up."""
    for shared, expected in [(0, 0), (1, 0.1), (5, 0.5), (6, 0.6), (7, 0.6), (50, 0.6)]:
        assert style(shared=shared) == pytest.approx(expected, abs=1e-9)


def test_stop_words_are_not_words_in_common():
    """Some in both texts, or in one of them: J stays 0, or 3 / 200."""
    for before in ("the of their was with from", "THE OF THEIR", "The Of Was"):
        for shared, expected in ((0, 0), (3, 0.3)):
            longer = made([*range(shared), *range(100, 250)], 900, before)
            for summary in (made(range(50), 300), made(range(50), 300, before)):
                assert paid(summary, longer, 2.0 + expected)


def test_the_most_is_298_and_odd_texts_are_paid_a_number():
    """0.5 + 1 + 0.5, 0.38 for twelve categories, 0.6 for seven words of 200 or so."""
    assert 2.0 + style(" ".join(ONE_EACH), shared=10) == pytest.approx(2.98)
    odd = ["", " " * 9, ". " * 9, "the " * 9, "\n\t" * 9, "\u00e9 " * 9, "\u4e16 " * 99]
    for pair in itertools.product(odd, odd):
        assert 0 <= tldr.tldr_reward(*pair) <= 2.98 + 1e-9


def load(train_file, task=TASK):
    """The task for two agents with the posts of a file."""
    flags = {"task": task, "train_file": train_file, "num_agents": 2, "num_turns": 1}
    return common.load_task(SimpleNamespace(**flags), None)


@pytest.mark.parametrize("count, held_out", [(2, 1), (10, 1), (11, 2), (20, 2)])
@pytest.mark.parametrize("task", [TASK, "sum_to_target"])
def test_the_last_tenth_is_held_out(count, held_out, task, tmp_path):
    """In place of any task's items, and no post is in both parts. Blank lines, a byte order mark
    and line separators within a text are none."""
    items = [{"prompt": f"post\u2028\u00e9 {k}", "more": k} for k in range(count)]
    lines = "\n\n \n".join(json.dumps(item, ensure_ascii=False) for item in items)
    (tmp_path / "posts.jsonl").write_text(f"{lines}\n", "utf-8-sig")
    found = load(tmp_path / "posts.jsonl", task)
    assert found.name == ("tldr" if task == TASK else task)
    assert found.train_dataset == items[: count - held_out]
    assert found.eval_dataset == items[count - held_out :]


GOOD = b'{"prompt": "x"}\n'
UNUSABLE = [
    (b"", "train_dataset is empty"), (GOOD, "train_dataset is empty"),  # the one is held out
    (GOOD + b'{"prompt": \n', "posts.jsonl': JSONDecodeError: .* line 2 "),
    (b'{"prompt": "\xff"}\n' * 2, "posts.jsonl': UnicodeDecodeError: "),
    (None, "posts.jsonl': FileNotFoundError: "),
]  # fmt: skip


@pytest.mark.parametrize("content, expected", UNUSABLE)
def test_a_train_file_that_cannot_be_used(content, expected, tmp_path):
    path = tmp_path / "posts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(common.InputError, match=expected):
        load(str(path))


def test_without_a_file_it_is_the_dataset(monkeypatch):
    """trl-lib/tldr; where it cannot be had, a sentence says what to do."""
    splits = {"train": [{"prompt": "a"}] * 3, "validation": [{"prompt": "b"}]}
    fake = SimpleNamespace(__spec__=ModuleSpec("datasets", None))
    fake.load_dataset = {"trl-lib/tldr": splits}.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", fake)
    task = load(None)
    assert [task.train_dataset, task.eval_dataset] == list(splits.values())
    fake.load_dataset = lambda name: 1 / 0
    with pytest.raises(common.InputError, match="cannot be loaded .*train_file.*zero"):
        load(None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(common.InputError, match="pip install datasets.*train_file"):
        load(None)


def test_each_agent_is_asked_for_its_own_and_the_longer_text_is_agent_1s():
    """8 and 8 words of 100 and 160 characters are paid 1.5; the other way round the ratio is
    0.625."""
    task = load(ROOT / "tests" / "posts.jsonl")
    assert (len(task.train_dataset), len(task.eval_dataset)) == (36, 4)
    requests = set()
    for item in task.train_dataset:
        for agent in (0, 1):
            (message,) = task.format(item, agent)
            assert message["role"] == "user"
            assert message["content"].startswith(item["prompt"])
            requests.add((agent, message["content"].removeprefix(item["prompt"])))
    assert len(requests) == len({request for _, request in requests}) == 2
    one, two = made(range(8), 100), made(range(8, 16), 160)
    rewards = task.reward_func([one, two, ""], [two, one, ""])
    assert rewards == pytest.approx([1.5, 0.5, 0.0])
