"""The built-in tasks, task files, and the calls of a user's functions."""

from types import SimpleNamespace

import pytest
from tasks import hidden_cards, length_ratio
from transformers import PretrainedConfig

import common

TWO = SimpleNamespace(
    num_agents=2, num_turns=1, eval_only=False, external_prompt_passthrough=False
)


def test_sum_to_target_rewards_by_hand():
    item = {"prompt": "target 7\n", "target": 7}
    first, second = (
        ["3", "3", " 9\n", "x", "", "-1", "7"],
        ["4", "5", "9", "7", "", "8", "x"],
    )
    expected = [1.0, 1 / 2, 1 / 12, 0.5, 0.0, 0.5 / 2, 0.5]
    task = common.sum_to_target(TWO)
    assert task.reward_func(first, second, batch_items=[item]) == pytest.approx(
        expected
    )
    assert task.reward_func(["1"], ["2"], ["4"], batch_items=[item]) == [1.0]
    several = common.sum_to_target(SimpleNamespace(num_turns=2))
    costly = [worth - 1 for worth in expected]
    assert several.reward_func(first, second, batch_items=[item]) == pytest.approx(
        costly
    )


def test_sum_to_target_without_reading_the_target():
    """No constant sum is paid more than the 0.37 that the docstring says."""
    best = max(sum(1 / (1 + abs(s - t)) for t in range(10)) / 10 for s in range(30))
    assert best == pytest.approx(0.3733, abs=1e-3)


def test_sum_to_target_tells_each_agent_its_own_number_and_the_sum():
    task = common.sum_to_target(TWO)
    texts = task.external_transition(prompt="target 7\n", agent_completions=["3", "x"])
    assert texts == ["target 7\nyours 3, sum 3\n", "target 7\nyours None, sum 3\n"]


def test_length_ratio_rewards_by_hand():
    task = length_ratio.make_task(TWO)
    short = "ab" * 5  # 10 characters
    lengths = [0, 5, 10, 20, 25, 30, 40, 50, 90]
    expected = [-1, 0.25, 0.5, 1, 1, 1, 0.5, 0, 0]
    rewards = task.reward_func([short] * 9, ["c" * n for n in lengths])
    assert rewards == pytest.approx(expected)
    assert task.reward_func([" "], ["x"]) == [-1]
    three = task.reward_func(["a" * 10], ["b" * 20], ["c" * 20])
    assert three == pytest.approx([(1 + 0.5) / 2])
    with pytest.raises(common.InputError, match="two|2"):
        length_ratio.make_task(SimpleNamespace(num_agents=1))


def test_hidden_cards_by_hand():
    """Cards 2 and 7; a right answer is a digit of the card's half; luck (2 + 7 - 9) / 3 = 0."""
    task = hidden_cards.make_task(SimpleNamespace(num_agents=2, num_turns=2))
    first, second = task.formatters
    item = {"prompt": "", "cards": [2, 7]}
    asked = [first(item), second(item)]
    assert asked == ["card 2\n\n", "card 7\n\n"]
    assert task.reward_func(["4"], ["5"], prompts=[[p] for p in asked]) == [0.0]
    marks = task.external_transition(
        prompt="",
        agent_completions=["4", "3"],
        num_agents=2,
        prompt_history_per_agent=[[asked[0]], [asked[1]]],
        response_history_per_agent=[["4"], ["3"]],
    )
    assert marks == ["+", "-"]
    last = [first({**item, "prompt": "+"}), second({**item, "prompt": "-"})]
    assert last == ["card 2\n+\n", "card 7\n-\n"]
    firsts, seconds = ["0", "5", "", "01"], ["9", "9", "x", "4"]
    rewards = task.reward_func(firsts, seconds, prompts=[[p] * 4 for p in last])
    assert rewards == [3 / 4, 2 / 4, 1 / 4, 1 / 4]
    high = [["card 9\n+\n"], ["card 9\n+\n"]]
    assert task.reward_func(["9"], ["9"], prompts=high) == [1 + 3]
    samples = [
        SimpleNamespace(prompts=asked, completions=texts)
        for texts in (["1", "1"], ["1", "8"])
    ]
    assert task.metrics_callback(samples) == {"right": 3 / 4}


def test_the_luck_of_hidden_cards_has_the_predicted_variance():
    """Of a uniform card: 8.25, of a third of it 8.25 / 9; the mean is 0."""
    task = hidden_cards.make_task(SimpleNamespace(num_agents=3, num_turns=1))
    luck = [
        sum(card - 4.5 for card in item["cards"]) / 3 for item in task.train_dataset
    ]
    assert len(luck) == 1000 and abs(sum(luck) / 1000) < 0.2
    variance = sum(x * x for x in luck) / 1000
    assert variance == pytest.approx(3 * 8.25 / 9, rel=0.15)


def test_a_reward_function_of_comlrl_runs_unchanged():
    task = common.Task([{"prompt": "x"}], lambda a, b: [float(len(b[0]) - len(a[0]))])
    one = common.Sample({"prompt": "x"}, 0, 0, ["x", "x"], completions=["a", "bcd"])
    common.pay(task, [one])
    assert one.reward == 2.0


def test_optional_keywords_and_the_processor_reach_the_functions():
    seen = {}

    def reward(*texts, batch_items, prompts):
        seen.update(batch_items=batch_items, prompts=prompts, texts=texts)
        return [1.0, 2.0]

    item = {"prompt": "x"}
    task = common.Task([item], reward, reward_processor=lambda r: 10 * r)
    samples = [
        common.Sample(item, k, 0, ["p", "q"], completions=[f"a{k}", f"b{k}"])
        for k in (0, 1)
    ]
    common.pay(task, samples)
    assert [s.reward for s in samples] == [10.0, 20.0]
    assert seen == {
        "batch_items": [item],
        "prompts": [["p", "p"], ["q", "q"]],
        "texts": (["a0", "a1"], ["b0", "b1"]),
    }


def test_an_exception_becomes_a_sentence_that_names_the_callable_and_the_line():
    def reward(*_):
        raise KeyError("mine")

    task = common.Task([{"prompt": "x"}], reward, name="t")
    line = reward.__code__.co_firstlineno + 1
    expected = f"task 't', item .*reward_func raised KeyError: 'mine' at {__file__}, line {line}$"
    with pytest.raises(common.InputError, match=expected) as error:
        common.pay(
            task, [common.Sample({"prompt": "x"}, 0, 0, ["x"], completions=["a"])]
        )
    assert isinstance(error.value.__cause__, KeyError)


def test_formatters_one_for_all_or_one_each():
    item = {"prompt": "x", "n": 3}
    task = common.Task([item], print, formatters=lambda i: f"{i['prompt']}{i['n']}")
    assert [common.format_prompt(task, item, agent) for agent in range(2)] == [
        "x3",
        "x3",
    ]
    chat = [{"role": "user", "content": "hi"}]
    task = common.Task([item], print, formatters=[lambda i: "a", lambda i: chat])
    assert [common.format_prompt(task, item, agent) for agent in range(2)] == [
        "a",
        chat,
    ]
    for wrong in (None, 3, [], [{"role": "user"}], ["hi"]):
        task = common.Task([item], print, formatters=lambda i, wrong=wrong: wrong)
        with pytest.raises(
            common.InputError, match="formatter of agent 0.*expected a prompt"
        ):
            [common.format_prompt(task, item, agent) for agent in range(2)]
    with pytest.raises(
        common.InputError, match="without a formatter: expected a prompt"
    ):
        common.format_prompt(common.Task([item], print), {"n": 3}, 0)


def test_a_transition_sees_the_history_and_its_prompts_pass_the_formatter():
    seen = []

    def transition(**keywords):
        seen.append(keywords)
        return ["next0", "next1"]

    item = {"prompt": "x"}
    wrap = [lambda i: f"<0 {i['prompt']}>", lambda i: f"<1 {i['prompt']}>"]
    task = common.Task([item], print, formatters=wrap, external_transition=transition)
    one = common.Sample(item, 0, 0, ["<0 x>", "<1 x>"], completions=["a", "b"])
    two = common.next_turn(task, [one], TWO)[0]
    assert two.prompts == ["<0 next0>", "<1 next1>"] and two.turn == 1
    two.completions = ["c", "d"]
    passed = SimpleNamespace(**{**vars(TWO), "external_prompt_passthrough": True})
    assert common.next_turn(task, [two], passed)[0].prompts == ["next0", "next1"]
    assert seen[1] == {
        "prompt": "x",
        "agent_completions": ["c", "d"],
        "num_agents": 2,
        "prompt_history_per_agent": [["<0 x>", "<0 next0>"], ["<1 x>", "<1 next1>"]],
        "response_history_per_agent": [["a", "c"], ["b", "d"]],
    }
    for wrong in (None, ["only one"], "ab", [1, 2]):
        task = common.Task(
            [item], print, external_transition=lambda wrong=wrong, **_: wrong
        )
        with pytest.raises(common.InputError, match="external_transition.*expected"):
            common.next_turn(task, [one], passed)


def test_task_files(tmp_path):
    path = tmp_path / "mine.py"
    args = SimpleNamespace(**vars(TWO), task=str(path), seed=1, train_file=None)
    path.write_text(
        "from common import Task\ntask = Task([{'prompt': 'x'}], lambda a, b: [0.0])\n"
    )
    assert common.load_task(args, None).name == "mine"
    path.write_text(
        "from common import Task\ndef make_task(args):\n"
        "    return Task([{'prompt': 'x'}] * args.num_agents, lambda a, b: [0.0])\n"
    )
    assert len(common.load_task(args, None).train_dataset) == 2
    path.write_text("raise RuntimeError('broken')\n")
    expected = "mine.py' raised RuntimeError: broken at .*mine.py, line 1$"
    with pytest.raises(common.InputError, match=expected):
        common.load_task(args, None)


def test_messages_go_through_the_chat_template_where_there_is_one():
    tokenizer = common.tiny_tokenizer()
    learner = common.Learner(
        "agent_0", "tiny", SimpleNamespace(config=PretrainedConfig()), tokenizer
    )
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    texts = [tokenizer.decode(ids) for ids in common.encode(learner, [chat, "plain"])]
    assert texts == ["be\nhi", "plain"]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    )
    texts = [tokenizer.decode(ids) for ids in common.encode(learner, [chat, "plain"])]
    assert texts == ["[system]be[user]hi>", "plain"]
