"""The task tldr: its reward by hand, and where its posts come from."""

import importlib
import json
import re
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, tiny_args
from tasks import tldr

import common

POSTS = ROOT / "tests" / "posts.jsonl"
ARGS = SimpleNamespace(
    task="tldr", train_file=str(POSTS), num_agents=2, num_turns=1, seed=1,
    eval_only=False, max_new_tokens=8,
)  # fmt: skip
ONE_EACH = [  # of every category a word, or a phrase
    "furthermore", "for instance", "in other words", "therefore", "in contrast",
    "although", "unless", "finally", "meanwhile", "likewise", "certainly", "in short",
]  # fmt: skip


def made(numbers, characters, before=""):
    """`before` and the words "w000", "w001", ... of `numbers`, the last drawn out to fit."""
    text = " ".join([*before.split(), *(f"w{number:03d}" for number in numbers)])
    assert len(text) <= characters
    return text.ljust(characters, "x")


def style(before="", shared=0):
    """What level 4 adds, with `shared` words of 200 in common, the longer text so begun.

    50 words and 150 + shared, of them `shared` in common, so that all are 200: 3 times the
    unique words or more, in 400 and 1200 characters. The levels below it pay 0.5 + 1 + 0.5.
    """
    longer = made([*range(shared), *range(100, 250)], 1200, before)
    return tldr.tldr_reward(made(range(50), 400), longer) - 2.0


# The number of words. Both texts have as many characters, so that level 2 pays nothing.


@pytest.mark.parametrize(
    "words, expected", [(0, 0), (1, 0), (7, 0), (8, 0.5), (256, 0.5), (257, 0)]
)
def test_level_1_both_have_8_to_256_words(words, expected):
    text, other = made(range(words), 1300) if words else "", made(range(100), 1300)
    assert tldr.tldr_reward(text, text) == expected
    assert tldr.tldr_reward(text, other) == expected
    assert tldr.tldr_reward(other, text) == expected


def test_level_1_counts_what_stands_between_white_space():
    seven = "a-b c.d e'f g/h i,j k+l m=n"  # 14 words, but for the white space
    assert tldr.tldr_reward(seven, seven) == 0
    assert tldr.tldr_reward(f"{seven} -", f"{seven} -") == 0.5
    lines = "\n".join("abcdefgh")
    assert tldr.tldr_reward(lines, lines.replace("\n", "\t")) == 0.5


# The ratio in characters. 8 words and 8 others, so that level 3 stops at 1.


@pytest.mark.parametrize(
    "characters, expected",
    [
        (100, 0),
        (1000, 0),
        (1099, 0),
        (1100, 0),
        (1101, 0.001 / 0.5),
        (1350, 0.25 / 0.5),
        (1599, 0.499 / 0.5),
        (1600, 1),
        (2400, 1),
        (3200, 1),
        (3201, 1 - 0.001 / 1.8),
        (4100, 1 - 0.9 / 1.8),
        (4999, 0.001 / 1.8),
        (5000, 0),
        (5001, 0),
        (9000, 0),
    ],
)
def test_level_2_the_ratio_in_characters(characters, expected):
    texts = made(range(8), 1000), made(range(8, 16), characters)
    assert tldr.tldr_reward(*texts) == pytest.approx(0.5 + expected, abs=1e-9)


@pytest.mark.parametrize(
    "characters, goes_on", [(1099, False), (1100, True), (5000, True), (5001, False)]
)
def test_level_2_stops_outside_its_bounds(characters, goes_on):
    """16 new words for 8 are worth 0.5 at level 3, if it is reached."""
    texts = made(range(8), 1000), made(range(8, 24), characters)
    expected = 0.5 + 0.5 * goes_on
    assert tldr.tldr_reward(*texts) == pytest.approx(expected, abs=1e-9)


# The ratio in unique words, of 20 and of texts twice as long: 0.5 + 1 before level 3.


@pytest.mark.parametrize(
    "unique, expected",
    [
        (10, 0),
        (20, 0),
        (25, 0),  # 1.25
        (26, 0),  # 1.3
        (27, 0.5 * 0.05 / 0.7),  # 1.35
        (33, 0.25),  # 1.65
        (39, 0.5 * 0.65 / 0.7),  # 1.95
        (40, 0.5),
        (41, 0.5),
        (100, 0.5),
    ],
)
def test_level_3_the_ratio_in_unique_words(unique, expected):
    texts = made(range(20), 400), made(range(100, 100 + unique), 800)
    assert tldr.tldr_reward(*texts) == pytest.approx(1.5 + expected, abs=1e-9)


@pytest.mark.parametrize("unique, goes_on", [(25, False), (26, True), (40, True)])
def test_level_3_stops_below_its_bound(unique, goes_on):
    """Two words in common, of at most 58, are worth 0.6 at level 4, if it is reached."""
    numbers = [0, 1, *range(100, 98 + unique)]
    reward = tldr.tldr_reward(made(range(20), 400), made(numbers, 800))
    expected = 1.5 + 0.5 * (unique == 40) + 0.6 * goes_on
    assert reward == pytest.approx(expected, abs=1e-9)


def test_level_3_counts_a_word_once():
    """20 words are 20 words, written four times or with a comma too."""
    first, again = made(range(20), 200), [*range(100, 120)] * 4
    assert tldr.tldr_reward(first, made(again, 400)) == 1.5
    commas = made(range(100, 120), 400, ", ".join(f"w{n}" for n in range(100, 120)))
    assert tldr.tldr_reward(first, commas) == pytest.approx(1.5)  # 21 / 20
    repeated = made([*range(10)] * 2, 99)  # 10 unique words, and 20 in the longer one
    assert tldr.tldr_reward(repeated, made(range(100, 120), 198)) == 2.0


# The transition words: no word in common, so that all of level 4 comes from them.


@pytest.mark.parametrize(
    "count, expected", [(0, 0), (1, 0.16), (2, 0.18), (3, 0.2), (11, 0.36), (12, 0.38)]
)
def test_level_4_categories_of_transition_words(count, expected):
    """0.4 * (0.4 + 0.05 * (count - 1)): 0.4 * 0.95 with all twelve."""
    for first in range(len(ONE_EACH)):
        phrases = (ONE_EACH * 2)[first : first + count]
        assert style(" ".join(phrases)) == pytest.approx(expected, abs=1e-9)


def test_level_4_counts_a_category_once():
    assert style("thus thus therefore hence as a result") == pytest.approx(0.16)
    assert style("thus thus therefore hence but as a result") == pytest.approx(0.18)


def test_level_4_reads_the_longer_text_only():
    summary = made(range(50), 400, "thus however finally overall certainly")
    assert tldr.tldr_reward(summary, made(range(100, 250), 1000)) == 2.0


def test_transition_words_are_whole_words():
    parts = "soap soup also_so thusly sothus butter yeti iffy firsthand _thus thus2"
    assert style(parts) == pytest.approx(0.0)
    for word in ("so", "thus", "if", "but", "first"):
        for text in (word, word.upper(), f"({word})", f"{word},", f'"{word}"'):
            assert style(text) == pytest.approx(0.16), text


@pytest.mark.parametrize(
    "text", ["for instance", "on the other hand", "in other words"]
)
def test_transition_phrases_are_whole_phrases(text):
    first, tail = text.split(" ", 1)
    assert style(text) == style(f"w900 {text.upper()}. w901") == pytest.approx(0.16)
    for broken in (
        first,
        tail,
        f"x{text}",
        f"{text}x",
        f"{first} w900 {tail}",
    ):
        assert style(broken) == pytest.approx(0.0), broken


def test_no_transition_word_counts_for_two_categories():
    phrases = {k: text.split(", ") for k, text in tldr.TRANSITIONS.items()}
    assert len(phrases) == 12
    for category, own in phrases.items():
        for phrase in own:
            assert re.fullmatch("[a-z]+( [a-z]+)*", phrase)
            others = {p for k, texts in phrases.items() if k != category for p in texts}
            within = [p for p in others if f" {p} " in f" {phrase} "]
            assert not within, f"{phrase!r} counts for {within} too"
            assert style(phrase) == pytest.approx(0.16), phrase


# The words in common, of 200 without the stop words.


@pytest.mark.parametrize(
    "shared, expected",
    [(0, 0), (1, 0.1), (3, 0.3), (5, 0.5), (6, 0.6), (7, 0.6), (50, 0.6)],
)
def test_level_4_words_in_common(shared, expected):
    """0.6 * J / 0.03 with J = shared / 200, and 0.6 from J = 0.03 up."""
    assert style(shared=shared) == pytest.approx(expected, abs=1e-9)


def test_stop_words_are_not_words_in_common():
    """Six in both texts, or in one of them: J stays 0, or 3 / 200."""
    stop = "the of their was with from"
    for before in (stop, stop.upper(), stop.title()):
        for shared, expected in ((0, 0), (3, 0.3)):
            longer = made([*range(shared), *range(100, 250)], 900, before)
            for summary in (made(range(50), 300), made(range(50), 300, before)):
                reward = tldr.tldr_reward(summary, longer)
                assert reward == pytest.approx(2.0 + expected, abs=1e-9)


def test_the_most_is_298():
    """0.5 + 1 + 0.5, 0.38 for twelve categories, 0.6 for seven words of 200 or so."""
    assert 2.0 + style(" ".join(ONE_EACH), shared=10) == pytest.approx(2.98)


def test_odd_texts_are_paid_a_number():
    odd = ["", " " * 9, ". " * 9, "the " * 9, "\n\t" * 9, "\u00e9 " * 9, "\u4e16 " * 99]
    for summary in odd:
        for longer in odd:
            assert 0 <= tldr.tldr_reward(summary, longer) <= 2.98 + 1e-9


# The task


def write_posts(path, posts):
    path.write_text("".join(f"{json.dumps(post)}\n" for post in posts))
    return SimpleNamespace(**{**vars(ARGS), "train_file": str(path)})


def refused(args):
    """The sentence of the InputError."""
    with pytest.raises(common.InputError) as error:
        common.load_task(args, None)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("agents", [1, 3])
def test_it_is_for_two_agents(agents):
    args = SimpleNamespace(**{**vars(ARGS), "num_agents": agents})
    assert "num_agents must be 2" in refused(args)


@pytest.mark.parametrize(
    "posts, held_out", [(2, 1), (9, 1), (10, 1), (11, 2), (20, 2), (40, 4)]
)
def test_the_last_tenth_is_held_out(posts, held_out, tmp_path):
    """And no post is in both parts."""
    items = [{"prompt": f"post {k}", "more": k} for k in range(posts)]
    task = common.load_task(write_posts(tmp_path / "posts.jsonl", items), None)
    assert task.name == "tldr"
    assert task.train_dataset == items[: posts - held_out]
    assert task.eval_dataset == items[posts - held_out :]


def test_blank_lines_and_other_alphabets(tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_text('\n{"prompt": "\u00e9"}\n\n{"prompt": "\u4e16"}\n \n', "utf-8")
    args = SimpleNamespace(**{**vars(ARGS), "train_file": str(path)})
    task = common.load_task(args, None)
    items = [*task.train_dataset, *task.eval_dataset]
    assert items == [{"prompt": "\u00e9"}, {"prompt": "\u4e16"}]


UNUSABLE = "expected 2 items or more, each with a text as its prompt"
GOOD = b'{"prompt": "x"}\n'


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", UNUSABLE),
        (GOOD, UNUSABLE),
        (GOOD * 2 + b'"SUBREDDIT: r/jobs"', UNUSABLE),
        (b'["x"]\n' + GOOD * 2, UNUSABLE),
        (GOOD * 2 + b'{"post": "x"}', UNUSABLE),
        (GOOD * 2 + b'{"prompt": null}', UNUSABLE),
        (GOOD * 2 + b'{"prompt": " "}', UNUSABLE),
        (GOOD + b'{"prompt": \n', ", line 2, is no JSON: "),
        (b"prompt,text\n1,2\n", ", line 1, is no JSON: "),
        (b'{"prompt": "\xff"}\n' * 2, "cannot be read: "),
        (None, "cannot be read: .*No such file"),
    ],
    ids=[
        "empty", "one post", "a text", "a list", "no prompt", "null", "blank",
        "broken JSON", "no JSON", "no UTF-8", "missing",
    ],
)  # fmt: skip
def test_a_train_file_that_cannot_be_used(content, expected, tmp_path):
    path = tmp_path / "posts.jsonl"
    if content is not None:
        path.write_bytes(content)
    args = SimpleNamespace(**{**vars(ARGS), "train_file": str(path)})
    assert re.match(f"train_file {str(path)!r}:? ?{expected}", refused(args))


def test_a_run_refuses_them_before_there_is_one(script, tmp_path):
    write_posts(tmp_path / "posts.jsonl", [{"prompt": "x"}, {"post": "x"}])
    args = tiny_args(script, tmp_path, task="tldr")
    args = replace(args, train_file=str(tmp_path / "posts.jsonl"))
    with pytest.raises(common.InputError, match=UNUSABLE):
        script.train(args)
    assert [path.name for path in tmp_path.iterdir()] == ["posts.jsonl"]


def test_a_byte_order_mark_and_line_separators_are_text(tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + '{"prompt": "a\u2028b"}'.encode())
    args = SimpleNamespace(**{**vars(ARGS), "train_file": str(path)})
    assert common.load_task(args, None).eval_dataset == [{"prompt": "a\u2028b"}]


def test_a_summary_without_a_word_ends_at_the_third_level():
    """Eight dots (15 characters) and 31 characters of eight words: 0.5 + (31/15 - ...) = 1.5."""
    assert tldr.tldr_reward(" ".join("." * 8), "aaa bbb ccc ddd eee fff ggg hhh") == 1.5


def test_a_run_on_posts_of_ones_own(tmp_path):
    """The tiny model writes 16 characters of noise: it earns 0.5 at the very most."""
    maac = importlib.import_module("maac")
    write_posts(tmp_path / "posts.jsonl", [{"prompt": f"post {k}"} for k in range(8)])
    args = tiny_args(maac, tmp_path, task="tldr", max_new_tokens=16)
    args = replace(args, train_file=str(tmp_path / "posts.jsonl"), num_generations=1)
    folder = maac.train(args)
    assert folder.name.startswith("maac__tldr__1__")
    lines = (folder / "samples.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["reward"] == tldr.tldr_reward(*line["completions"])
        for messages in line["prompts"]:
            assert [m["role"] for m in messages] == ["user"]
            assert messages[0]["content"].startswith("post ")


def test_the_reward_takes_a_joint_sample_each():
    """8 and 8 words of 100 and 160 characters; the other way round the ratio is 0.625."""
    texts = made(range(8), 100), made(range(8, 16), 160)
    task = common.load_task(ARGS, None)
    rewards = task.reward_func([texts[0], texts[1], ""], [texts[1], texts[0], ""])
    assert rewards == pytest.approx([1.5, 0.5, 0.0])


# The dataset trl-lib/tldr


def test_without_a_file_it_is_the_dataset(monkeypatch):
    splits = {
        name: [{"prompt": f"{name} {k}", "completion": "y"} for k in range(3)]
        for name in ("train", "validation", "test")
    }
    asked = []
    fake = ModuleType("datasets")
    fake.__spec__ = ModuleSpec("datasets", None)
    fake.load_dataset = lambda name, *more: asked.append((name, *more)) or splits
    monkeypatch.setitem(sys.modules, "datasets", fake)
    args = SimpleNamespace(**{**vars(ARGS), "train_file": None})
    task = common.load_task(args, None)
    assert asked == [("trl-lib/tldr",)]
    args = importlib.import_module("maac").Args(task="tldr")
    assert task.train_dataset is splits["train"]
    assert task.eval_dataset is splits["validation"]
    texts = [
        s.prompts[0][0]["content"] for s in next(common.first_samples(task, [], args))
    ]
    assert [text.split("\n")[0] for text in texts] == ["train 0", "train 1", "train 2"]
    fake.load_dataset = lambda name: 1 / 0
    expected = "trl-lib/tldr cannot be loaded .*train_file.*division by zero"
    assert re.search(expected, refused(args))
    fake.load_dataset = lambda name: {"train": splits["train"]}
    assert "trl-lib/tldr cannot be loaded" in refused(args)


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    args = SimpleNamespace(**{**vars(ARGS), "train_file": None})
    sentence = refused(args)
    assert "pip install datasets" in sentence and "train_file" in sentence


def test_a_train_file_takes_the_place_of_any_task_s_items(tmp_path):
    items = [{"prompt": f"target {n}\n", "target": n} for n in range(4)]
    args = write_posts(tmp_path / "items.jsonl", items)
    args.task = "sum_to_target"
    task = common.load_task(args, None)
    assert [task.train_dataset, task.eval_dataset] == [items[:3], items[3:]]


# The posts of these tests


def test_the_posts_read_as_those_of_the_dataset():
    text = POSTS.read_bytes().decode("ascii")
    posts = [json.loads(line) for line in text.splitlines()]
    assert len(posts) == len({post["prompt"] for post in posts}) == 40
    shape = r"SUBREDDIT: r/\w+\n\nTITLE: (.+)\n\nPOST: (.+)\n\nTL;DR:"
    for post in posts:
        assert list(post) == ["prompt"]
        title, body = re.fullmatch(shape, post["prompt"]).groups()
        assert title and 60 <= len(body.split()) <= 90


def test_each_agent_is_asked_for_its_own_version_of_each_post():
    task = common.load_task(ARGS, None)
    items = [*task.train_dataset, *task.eval_dataset]
    assert len(items) == 40
    asked = [[common.format_prompt(task, item, k) for item in items] for k in (0, 1)]
    requests = set()
    for agent, prompts in enumerate(asked):
        for item, messages in zip(items, prompts, strict=True):
            assert [message["role"] for message in messages] == ["user"]
            post, request = messages[0]["content"].rsplit("\n\n", 1)
            assert post == item["prompt"]
            requests.add((agent, request))
    assert (
        len(requests) == len(dict(requests)) == len(set(dict(requests).values())) == 2
    )
