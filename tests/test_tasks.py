"""The built-in tasks, task files, and the calls of a user's functions."""

import functools
import json
import random
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_args
from tasks import hidden_cards, length_ratio
from tokenizers import normalizers
from transformers import AutoModel

import common
from common import InputError, Sample, Task

TWO = SimpleNamespace(num_agents=2, num_turns=1, train_file=None)
ITEM = {"prompt": "x"}
FIRST = Sample(ITEM, 0, 0, [])
COLUMNS = {"completions": ["a", "bcd"], "completion_ids": [[3], [4]]}
SAMPLES = [Sample(ITEM, k, 0, ["p", "q"], **COLUMNS) for k in (0, 1)]
ONE, ZERO = torch.tensor([1.0, 0.0])


def test_sum_to_target_by_hand():
    item, task = {"prompt": "target 7\n", "target": 7}, common.sum_to_target(TWO)
    first = ["3", "3", " 9\n", "x", "", "-1", "7"]
    second = ["4", "5", "9", "7", "", "8", "x"]
    rewards = task.reward_func(first, second, batch_items=[item])
    assert rewards == pytest.approx([1.0, 1 / 2, 1 / 12, 0.5, 0.0, 0.5 / 2, 0.5])
    assert task.reward_func(["1"], ["2"], ["4"], batch_items=[item]) == [1.0]
    several = common.sum_to_target(SimpleNamespace(num_turns=2))
    costly = several.reward_func(first, second, batch_items=[item])
    assert costly == pytest.approx([reward - 1 for reward in rewards])
    texts = task.external_transition("target 7\n", ["3", "x"])
    assert texts == ["target 7\nyours 3, sum 3\n", "target 7\nyours None, sum 3\n"]


def test_sum_to_target_without_reading_the_target():
    """No constant sum is paid more than the 0.37 that the docstring says."""
    reward, texts = common.sum_to_target(TWO).reward_func, list(map(str, range(30)))
    items = [{"target": n} for n in range(10)]
    paid = [reward(texts, ["0"] * 30, batch_items=[item]) for item in items]
    assert np.mean(paid, axis=0).max() == pytest.approx(0.3733, abs=1e-3)


def test_length_ratio_rewards_by_hand():
    task, lengths = length_ratio.make_task(TWO), [0, 5, 10, 20, 25, 30, 40, 50, 90]
    rewards = task.reward_func(["ab" * 5] * 9, ["c" * n for n in lengths])
    assert rewards == pytest.approx([-1, 0.25, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert task.reward_func([" "], ["x"]) == [-1]
    assert task.reward_func(["a" * 10], ["b" * 20], ["c" * 20]) == [(1 + 0.5) / 2]


def test_hidden_cards_by_hand():
    """Cards 2 and 7; a right answer is a digit of the card's half; luck (2 + 7 - 9) / 3 = 0."""
    task = hidden_cards.make_task(SimpleNamespace(num_agents=2, num_turns=2))
    (first, second), item = task.formatters, {"prompt": "", "cards": [2, 7]}
    asked = [first(item), second(item)]
    assert asked == ["card 2\n\n", "card 7\n\n"]
    assert task.reward_func(["4"], ["5"], prompts=[[p] for p in asked]) == [0.0]
    history = {"prompt_history_per_agent": [[prompt] for prompt in asked]}
    history["response_history_per_agent"] = [["4"], ["3"]]
    assert task.external_transition(**history) == ["+", "-"]
    last = [first(item | {"prompt": "+"}), second(item | {"prompt": "-"})]
    assert last == ["card 2\n+\n", "card 7\n-\n"]
    firsts, seconds = ["0", "5", "", "01"], ["9", "9", "x", "4"]
    rewards = task.reward_func(firsts, seconds, prompts=[[p] * 4 for p in last])
    assert rewards == [3 / 4, 2 / 4, 1 / 4, 1 / 4]
    assert task.reward_func(["9"], ["9"], prompts=[["card 9\n+\n"]] * 2) == [1 + 3]
    texts = [["1", "1"], ["1", "8"]]
    samples = [Sample(item, 0, 0, asked, completions=pair) for pair in texts]
    assert task.metrics_callback(samples) == {"right": 3 / 4}


def test_the_luck_of_hidden_cards_has_the_predicted_variance():
    """Of a uniform card: 8.25, of a third of it 8.25 / 9; the mean is 0. Of 1000 hands the mean
    is off by 0.05, a standard deviation, and the variance by 4 %."""
    random.seed(0)
    task = hidden_cards.make_task(SimpleNamespace(num_agents=3, num_turns=1))
    luck = []
    for item in task.train_dataset:
        asked = [[deal(item)] for deal in task.formatters]
        luck += task.reward_func([""], [""], [""], prompts=asked)  # no answer is right
    assert len(luck) == 1000 and abs(np.mean(luck)) < 0.2
    assert np.var(luck) == pytest.approx(3 * 8.25 / 9, rel=0.16)


TOLD = {  # a task: an item, what 8 characters of noise are paid, what the next prompts say of it
    "code": ({"prompt": "", "entry_point": "f", "test": "def check(f): assert f(1)"}, -4, "not reached: aux is defined"),
    "str_build": ({"string": "Li"}, -0.5 - 2, "commands:\nnone\nStill missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_a_run_of_two_turns(name, script, tmp_path):
    item, paid, told = TOLD[name]
    (tmp_path / "items.jsonl").write_text(f"{json.dumps(item)}\n" * 4)
    flags = {"task": str(ROOT / f"tests/tasks/{name}.py"), "num_turns": 2}
    flags |= {"train_file": str(tmp_path / "items.jsonl"), "num_generations": 2}
    flags |= {"model_config": '{"max_position_embeddings": 2048}', "log_samples": 12}
    folder = script.train(tiny_args(script, tmp_path, max_new_tokens=8, **flags))
    samples = list(map(json.loads, (folder / "samples.jsonl").open()))
    assert {s["reward"] for s in samples} == {paid}
    found = [told in str(s["prompts"][1][0]["content"]) for s in samples]
    assert found == [s["turn"] == 1 for s in samples] and any(found)


@pytest.mark.parametrize("numbers", [
    (1, False), [np.bool_(True), np.float16(0)], np.array([True, False]), torch.tensor([1, 0]),
    np.array([1, 0], np.float16), [np.array(1.0), np.array(0)], [ONE.bool(), ZERO.bool()],
    [ONE.bfloat16(), ZERO.bfloat16()], [ONE.clone().requires_grad_(), ZERO],
])  # fmt: skip
def test_rewards_of_many_types(numbers):
    paid = Task([], lambda *texts: numbers).pay(SAMPLES)
    process = {"reward_processor": lambda k: numbers[int(k)]}
    for found in (paid, Task([], lambda *texts: [0, 1], **process).pay(SAMPLES)):
        assert found == [1.0, 0.0] and {type(reward) for reward in found} == {float}


@pytest.mark.parametrize("reward, expected", [
    (lambda a, b: [float(len(b[0]) - len(a[0])), 7], [2.0, 7.0]),  # as for CoMLRL
    (lambda *texts, prompts: [float(prompts == [["p"] * 2, ["q"] * 2])] * 2, [1.0] * 2),
    (lambda *texts, completion_ids: [float(completion_ids[1][0][0]), 0], [4.0, 0.0]),
    (lambda *texts, **more: [len(more), len(more["batch_items"])], [3.0, 1.0]),
    (lambda *texts, batch_items: [float(batch_items == [ITEM])] * 2, [1.0] * 2),
    (functools.partial(lambda worth, *texts: [worth] * 2, 0.5), [0.5, 0.5]),
])  # fmt: skip
def test_rewards_are_paid(reward, expected):
    """Whatever arguments the function takes."""
    assert Task([ITEM], reward).pay(SAMPLES) == expected


def test_formatters_one_for_all_or_one_each():
    item, chat = {"prompt": "x", "n": 3}, [{"role": "user", "content": "hi"}]
    both, each = lambda i: f"{i['prompt']}{i['n']}", [lambda i: "a", lambda i: chat]
    for formatters, expected in ((both, ["x3", "x3"]), (each, ["a", chat])):
        task = Task([item], print, formatters=formatters)
        assert [task.format(item, agent) for agent in range(2)] == expected
    for wrong in (None, 3, b"x", [], [{"role": "user"}], ["hi"], (chat[0],)):
        task = Task([item], print, formatters=Mock(return_value=wrong))
        with pytest.raises(InputError, match="formatter of agent 0: expected a prompt"):
            task.format(item, 0)
    with pytest.raises(InputError, match="prompt of agent 0: expected a prompt"):
        Task([item], print).format({"n": 3}, 0)


def test_a_transition_sees_the_history_and_its_prompts_pass_the_formatter():
    transition = Mock(return_value=["next0", "next1"])
    wrap = [lambda i: f"<0 {i['prompt']}>", lambda i: f"<1 {i['prompt']}>"]
    task = Task([ITEM], print, formatters=wrap, external_transition=transition)
    one = Sample(ITEM, 0, 0, ["<0 x>", "<1 x>"], completions=["a", "b"])
    prompts = task.transition(one, False)
    assert prompts == ["<0 next0>", "<1 next1>"]
    two = Sample(ITEM, 0, 1, prompts, [one], completions=["c", "d"])
    assert task.transition(two, True) == ["next0", "next1"]
    assert transition.call_args.kwargs == {
        "prompt": "x",
        "agent_completions": ["c", "d"],
        "num_agents": 2,
        "prompt_history_per_agent": [["<0 x>", "<0 next0>"], ["<1 x>", "<1 next1>"]],
        "response_history_per_agent": [["a", "c"], ["b", "d"]],
    }
    for wrong in (None, ["only one"], "ab", [1, 2]):
        task = Task([ITEM], print, external_transition=Mock(return_value=wrong))
        with pytest.raises(InputError, match="external_transition: expected"):
            task.transition(one, True)


def test_task_files(tmp_path):
    path = tmp_path / "mine.py"
    args = SimpleNamespace(**vars(TWO), task=str(path))
    (tmp_path / "beside.py").write_text("def reward(a, b):\n    return [0.5]\n")
    start = "from beside import reward\nfrom common import Task\n"
    path.write_text(f"{start}task = Task([{ITEM}], reward)\n")
    task = common.load_task(args, None)
    one = Sample(ITEM, 0, 0, ["x", "x"], completions=["a", "b"])
    assert task.name == "mine" and task.pay([one]) == [0.5]
    path.write_text(f"{start}make_task = lambda args: Task([args], reward)\n")
    assert common.load_task(args, None).train_dataset == [args]
    path.write_text("raise RuntimeError('broken')\n")
    with pytest.raises(InputError, match="RuntimeError: broken at .*mine.py, line 1$"):
        common.load_task(args, None)


@pytest.fixture
def reader():
    """A learner that reads at most 8 tokens, a character each, and leaves out blanks."""
    model = common.load_model("tiny", AutoModel, {"max_position_embeddings": 8})
    tokenizer = common.tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    return common.Learner("agent_0", "tiny", model, tokenizer)


def test_messages_go_through_the_chat_template_where_there_is_one(reader):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    roles = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}>"
    for template, expected in ((None, "a\nb"), (roles, "s:au:b>")):
        reader.tokenizer.chat_template = template
        for prompt, text in ((chat, expected), ("plain", "plain")):
            ids = reader.encode(FIRST, prompt)
            assert reader.tokenizer.decode(ids) == text
    reader.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match="cannot read .*no system"):
        reader.encode(FIRST, chat)


UNREADABLE = [
    ("7777777", "to read 7 tokens, with room for 2.*its model takes 8"),
    ("", "empty"),
    (" ", "empty"),  # no token
    ([{"role": "user", "content": None}], "empty"),
    ([{"role": "user", "content": ["x"]}], "AttributeError"),
    ("\ud800", "agent_0"),  # half of a character
]


@pytest.mark.parametrize("prompt, why", UNREADABLE)
def test_a_prompt_that_cannot_be_read_is_refused(reader, prompt, why):
    with pytest.raises(InputError, match=why):
        reader.encode(FIRST, prompt, room=2)


def test_a_later_prompt_that_cannot_be_read_ends_the_episode(reader, capsys):
    """It has no ids, the turn before says why, and the first is told."""
    past = [Sample({"n": k}, k, 0, []) for k in range(3)]
    now = [Sample(x.item, x.episode, 1, [], [x]) for x in past]
    prompts = zip(now, ["7777777", "666666", ""], strict=True)
    rows = [reader.encode(sample, prompt, room=2) for sample, prompt in prompts]
    assert rows == [[], reader.tokenizer("666666").input_ids, []]
    assert past[0].cut.endswith("its model takes 8") and past[1].cut == ""
    assert "empty" in past[2].cut
    told = capsys.readouterr().err
    assert told.count("ends before turn 1 of item {'n': 0}") == told.count("ends") == 1
    cut = reader.encode_action(rows[1], "333", True)  # sampled as fewer tokens
    assert cut == reader.tokenizer("66666633").input_ids
