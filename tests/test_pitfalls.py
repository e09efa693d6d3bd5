"""Tests per known defect of public trainers; tests/benchmarks/mutants.py takes each handling
out and sees its test fail, and names each by its number."""

import json
import math
import random
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from benchmarks.survival import same, weights
from conftest import (
    ROOT,
    Recorder,
    assert_same_gradients,
    logprobs_of,
    micro_learner,
    sample,
    save_model,
    small_task,
    tiny_args,
    update_actor,
)
from test_families import build
from test_resume import bare  # noqa: F401 - it is for every test here too
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM, set_seed

import common
import maac

# Scores of micro-models are float32 and below 16: a rounding is below 5e-7. A token takes five (cast,
# temperature, two of log-softmax, sum), a completion at most five tokens: 1.3e-5.
ATOL = 1e-4


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def load(name, args=None, role="agent"):
    """One actor or critic, loaded as a run loads it, with a value head."""
    auto_class = AutoModelForCausalLM if role == "agent" else AutoModel
    args = args or maac.Args(device="cpu")
    (learner,) = common.load_learners(role, auto_class, [name], 1, args)
    learner.value_head = maac.value_head(learner, None)
    return learner


def team(script, args, names=("tiny", "tiny"), critics=("tiny", "tiny")):
    """Actors and critics as train makes them, but for Recorders as optimizers."""
    count = {"maac": 1, "iac_separate": 2, "iac_shared": 0}[script.__name__]
    actors = common.load_learners("agent", AutoModelForCausalLM, names, 2, args)
    critics = common.load_learners("critic", AutoModel, critics[:count], count, args)
    for learner in actors + critics:
        learner.value_head = script.value_head(learner, None)
        learner.optimizer = Recorder(learner.parameters())
    return actors, critics or actors


def renumber(folder, ids):
    """Give tokens of a saved tokenizer other ids."""
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"] |= ids
    (folder / "tokenizer.json").write_text(json.dumps(state))


def test_01_logprobs_are_those_of_the_sampling_distribution(script):
    """The frequency of each completion is exp(its log-probability), with every cut on."""
    args = script.Args(temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=1)
    actor = micro_learner(script, seed=2)
    drawn = [ids[0] for ids in script.generate(actor, [[2, 3]] * 20_000, rng(), args)]
    assert len(set(drawn)) > 1
    for token in set(drawn):
        p = logprobs_of(script, actor, [[2, 3]], [[token]], args).exp().item()
        frequency = drawn.count(token) / len(drawn)  # of four standard errors at most
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / len(drawn)) + 1e-4


def test_01_a_sampled_token_is_never_cut(script):
    actor, args = micro_learner(script), script.Args(top_k=1)
    every = logprobs_of(script, actor, [[2, 3]] * 5, [[t] for t in range(5)], args)
    assert every.isfinite().all()


def test_02_only_the_flags_shape_the_distribution(script, tmp_path):
    """The checkpoint's own top_k 1 and repetition penalty have no say; its end ids have."""
    generation = {"top_k": 1, "do_sample": True, "repetition_penalty": 9.0}
    generation["eos_token_id"] = [5, 7]
    actor = load(save_model(tmp_path, generation=generation))
    assert actor.end_ids == [1, 5, 7]  # the tokenizer's and the checkpoint's
    drawn = script.generate(actor, [[9, 9]] * 300, rng(), script.Args())
    assert len({ids[0] for ids in drawn}) > 20


def test_03_the_end_token_is_part_of_the_action(script):
    """With pad == eos, with two end ids, and with an immediate end; it is no part of the text."""
    actor = micro_learner(script, seed=1)
    actor.tokenizer = SimpleNamespace(pad_token_id=1, decode=lambda ids, **_: str(ids))
    actor.end_ids = [1, 3]
    samples = [common.Sample({}, k, 0, ["x"], prompt_ids=[[2, 3]]) for k in range(200)]
    script.act([actor], samples, rng(), script.Args(max_new_tokens=4))
    completions = [one.completion_ids[0] for one in samples]
    assert [1] in completions and [3] in completions and max(map(len, completions)) == 4
    for one, ids in zip(samples, completions, strict=True):
        words = [token for token in ids if token not in (1, 3)]
        assert one.ended == [ids[-1] in (1, 3)] and one.completions == [str(words)]
        assert ids == words + ids[-1:] * one.ended[0]
        assert one.ended[0] or len(ids) == 4
    given = [[2, 3]] * 3, [[1], [4, 4, 1], [4, 4]], script.Args()
    one, three, two = logprobs_of(script, actor, *given).tolist()
    assert one < -0.1 and three < two - 0.1  # an end has a probability of its own


def test_04_left_padding_has_positions(script):
    """Positions are the token's own: GPT-2 would be off by nats (see test_families.py)."""
    actor = micro_learner(script, "gpt2", vocabulary=12)
    inputs = script.pad_batch(actor, [[5, 6, 7], [8]], [[2], [3, 4]])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 2, 0], [0, 0, 8, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]


def test_05_no_dropout(script, tmp_path):
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    small = save_model(tmp_path, "gpt2", **rates), "{}"
    for name, config in (small, ("tiny", '{"attention_dropout": 0.5}')):
        actor = load(name, script.Args(device="cpu", model_config=config))
        actor.model.train()
        given = script, actor, [[5, 6, 7]], [[7, 8]], script.Args()
        assert torch.equal(logprobs_of(*given), logprobs_of(*given))


def test_06_weights_are_float32(script, tmp_path):
    """Of a bfloat16 checkpoint, with a bfloat16 compute type; and so are scores and values."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "whole"))
    model.bfloat16().save_pretrained(tmp_path)
    args = script.Args(dtype="bfloat16", device="cpu", tokenizer="tiny")
    actor = load(tmp_path, args)
    assert {weight.dtype for weight in actor.parameters()} == {torch.float32}
    found = script.sequence_logprobs(actor, [[5, 6]], [[7]], args)
    found = [*found, script.critic_values(actor, [[5, 6]], args)]
    found.append(script.warp(actor, torch.zeros(1, 99, dtype=torch.bfloat16), args))
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_07_one_critic_step_per_minibatch():
    """However many agents there are: here three."""
    args, texts = maac.Args(train_batch_size=4), ([[2, 3]] * 3, [[4]] * 3)
    actors = [micro_learner(maac, seed=k) for k in range(3)]
    critic = micro_learner(maac, seed=9, head=True)
    samples = [sample(*texts, float(k), critic_ids=[[2, 3]]) for k in range(8)]
    maac.update(actors, [critic], samples, rng(), args)
    assert [len(x.optimizer.gradients) for x in (critic, *actors)] == [2] * 4


def test_09_ends_are_flags_of_the_episode(script, tmp_path):
    """Early ends leave episodes of unequal lengths; none bootstraps over its end. The targets by
    hand: values are 0, 10, 20, ..., and half of the next one counts."""
    task = small_task(8, external_transition=lambda prompt, **_: [prompt, prompt])
    paid = iter([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    task.reward_func = lambda a, b: [next(paid) for _ in a]
    flags = {"num_turns": 3, "early_termination_threshold": 0.5, "discount": 0.5}
    args = tiny_args(script, tmp_path, **flags)
    actors, critics = team(script, args)
    samples = script.play(actors, critics, task, task.train_dataset[:4], rng(), args)
    ends = [[s.done for s in samples if s.episode == k] for k in range(4)]
    assert ends == [[True], [False, False, True], [False, True], [False, False, True]]
    targets = script.td_targets(samples, 10 * torch.arange(9.0), args)
    assert targets.tolist() == [1, 10, 15, 0, 25, 1, 35, 40, 0]


def test_10_targets_are_formed_before_whitening_and_once(script, monkeypatch):
    """Whitening is over the whole buffer, whatever the minibatch, and changes no target."""
    rewards, values = [0.0, 5.0, 1.0, 10.0], torch.tensor([1.0, 2.0, 3.0, 4.0])
    samples = [sample([[2]], [[3]], r, critic_ids=[[2]]) for r in rewards]
    errors = torch.tensor(rewards) - values
    white = ((errors - errors.mean()) / errors.std()).tolist()
    seen, judged = {}, []

    def update_actor(actor, chosen, agent, weights, *columns):
        given = [one.reward for one in chosen]
        seen.update(zip(given, weights.tolist(), strict=True))
        judged.extend(columns[1].tolist() if len(columns) > 1 else [])
        return {}

    def update_critic(critic, texts, targets, args):
        judged.extend(targets.tolist())
        return {}

    monkeypatch.setattr(script, "update_actor", update_actor)
    monkeypatch.setattr(script, "update_critic", update_critic, raising=False)
    monkeypatch.setattr(script, "estimate_values", lambda *_: values)
    learners = [SimpleNamespace(name="agent_0")]
    script.update(learners, learners, samples, rng(), script.Args(train_batch_size=2))
    found = [seen[reward] for reward in rewards]
    assert found == pytest.approx(white, abs=1e-5)  # some roundings of numbers below 2
    assert sorted(judged) == sorted(rewards)  # y = r


def test_11_means_are_over_the_whole_minibatch(script):
    """Micro-batches of 1, 3 and all of 4 samples of unequal lengths: one gradient."""
    prompts, completions = [[2]] * 4, [[3], [3, 4, 4, 1], [4, 1], [3, 3, 3]]
    samples = [sample([p], [c]) for p, c in zip(prompts, completions, strict=True)]
    columns = [torch.tensor([1.0, -2.0, 0.5, 3.0])]
    if script.__name__ == "iac_shared":  # the values' part: V_old and y
        columns += [torch.zeros(4), 2 * columns[0]]
    gradients, losses = [], []
    for size in (None, 1, 3):
        args = script.Args(micro_batch_size=size, max_grad_norm=0.0, entropy_coef=0.5)
        actor = micro_learner(script)
        losses.append(script.update_actor(actor, samples, 0, *columns, args))
        gradients.append(actor.optimizer.gradients[0])
    for k in (1, 2):
        assert losses[k] == pytest.approx(losses[0], rel=1e-5, abs=ATOL)
        assert_same_gradients(gradients[0], gradients[k])


def test_12_no_logits_that_nobody_needs(script, tmp_path):
    """The actor's head sees T positions in the update and 1 in sampling; a critic has none."""
    actor = micro_learner(script, vocabulary=12)
    widths = []
    actor.model.lm_head.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    prompts, completions = [[2] * 20, [3] * 9], [[4, 5, 1], [6]]
    logprobs_of(script, actor, prompts, completions, script.Args())
    script.generate(actor, prompts, rng(), script.Args(max_new_tokens=2))
    assert widths == [3, 1, 1]
    if script.__name__ == "iac_shared":
        script.estimate_values(actor, prompts, script.Args())
        assert widths == [3, 1, 1]
    else:
        folder = script.train(tiny_args(script, tmp_path), small_task(8))
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
        assert any("lm_head" in name for name in state["agent_0"])
        assert not any("lm_head" in name for name in state["critic_0"])


def test_12_the_head_of_a_bfloat16_batch_is_one_product(script):
    """The last hidden states are a slice of (B, P, H), of which torch makes B products, and may
    copy the weight for each, where a head is frozen."""
    args = script.Args(device=("cpu",), dtype="bfloat16", lora_rank=2)
    actor = load("tiny", args)
    with (
        torch.profiler.profile(record_shapes=True) as profile,
        common.autocast(actor, args),
    ):
        script.generate(actor, [[5, 6], [7]], rng(), args)
    ids = len(actor.tokenizer)
    products = [
        e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::bmm")
    ]
    heads = [shapes for shapes in products if any(ids in shape for shape in shapes)]
    assert heads == [[[2, 64], [64, ids]]]


def test_13_one_forward_pass_per_sample_in_the_update(script, tmp_path):
    """Of the shared model too; and one before, for the values. None in the rollout."""
    task, args = small_task(4), tiny_args(script, tmp_path)
    actors, critics = team(script, args)
    passes, names = [], [actor.name for actor in actors]
    for learner in {*actors, *critics}:
        model, note = learner.model.base_model, partial(passes.append, learner.name)
        model.register_forward_hook(lambda *_, note=note: note())
    samples = script.collect(actors, critics, task, [0, 1, 2, 3], rng(), args)
    assert sorted(passes) == names
    script.update(actors, critics, samples, rng(), args)
    judged = names if critics is actors else [critic.name for critic in critics] * 2
    assert sorted(passes) == sorted(names * 2 + judged)


def test_14_the_sampled_ids_are_trained_on(script, tmp_path, monkeypatch):
    """Whatever they decode to: special tokens decode to nothing, and are kept."""
    task, args = small_task(4), tiny_args(script, tmp_path, max_new_tokens=4)
    actors, critics = team(script, args)
    drawn, scored = [[2, 0, 40, 1], [0, 2, 41, 42], [2, 2, 2, 2], [1]], []

    def spy(*given, inner=script.sequence_logprobs):
        scored.append([*map(list, zip(*given[1:3], strict=True))])
        return inner(*given)

    monkeypatch.setattr(script, "generate", lambda *_: drawn)
    monkeypatch.setattr(script, "sequence_logprobs", spy)
    samples = script.collect(actors, critics, task, [0, 1, 2, 3], rng(), args)
    script.update(actors, critics, samples, rng(), args)
    for agent, pairs in enumerate(scored):
        assert [s.completion_ids[agent] for s in samples] == drawn
        expected = [[s.prompt_ids[agent], s.completion_ids[agent]] for s in samples]
        assert sorted(pairs) == sorted(expected)


def test_15_each_model_reads_with_its_own_tokenizer(script, tmp_path, monkeypatch):
    """One of two agents and critics has a and b exchanged: 70 is its a, 69 its b."""
    shifted = tmp_path / "shifted"
    save_model(shifted, "gpt2", n_positions=256)
    renumber(shifted, {"a": 70, "b": 69})
    args = tiny_args(script, tmp_path, max_new_tokens=2, critic_type="q")
    names = str(shifted), "tiny"
    actors, critics = team(script, args, names[::-1], names)
    monkeypatch.setattr(script, "generate", lambda *_: [[70, 70]])
    task = common.Task([{"prompt": "ab"}], lambda one, two: [0.0] * len(one))
    (one,) = script.collect(actors, critics, task, [0], rng(), args)
    assert one.prompt_ids == [[69, 70], [70, 69]]
    assert one.completions == ["bb", "aa"]
    if script is maac:
        read = critics[0].tokenizer.decode(one.critic_ids[0])
        assert read == "Agent 0: ab\nAgent 1: ab\n\nAgent 0: bb\nAgent 1: aa"
    elif script.__name__ == "iac_separate":  # "abbb" to the first, "abaa" to the other
        assert one.critic_ids == [[70, 69, 69, 69], [69, 70, 69, 69]]
    else:
        assert one.critic_ids == [[69, 70, 70, 70], [70, 69, 70, 70]]


def test_16_evaluation_leaves_no_trace(script, tmp_path):
    """Evaluating often, seldom or never gives the same weights, even for a random reward."""
    found = []
    for interval, evaluated in ((4, True), (0, True), (0, False)):
        task = small_task(32)
        task.reward_func = lambda a, b: (torch.rand(len(a)) + random.random()).tolist()
        task.eval_dataset = task.eval_dataset if evaluated else None
        args = tiny_args(script, tmp_path, eval_interval=interval, train_batch_size=5)
        found.append(weights(script.train(args, task)))
    assert same(found[0], found[1]) and same(found[0], found[2])


WRONG = [
    [1.0], [1.0, 2.0, 3.0], 1.0, None, "12", [1.0, None], [1.0, math.nan],
    [math.inf, 0.0], ["1", 2.0], [[1.0], [2.0]], {0: 1.0, 1: 2.0}, [[1.0], [2.0, 3.0]],
]  # fmt: skip


@pytest.mark.parametrize("rewards", WRONG, ids=str)
@pytest.mark.parametrize("who", ["reward_func", "reward_processor"])
def test_17_a_wrong_reward_is_refused(rewards, who):
    """From either function; a processor maps one reward, to something that is no number."""
    item = {"prompt": "what"}
    task = common.Task([item], lambda *_: rewards, name="mine")
    if who == "reward_processor":
        task.reward_func = lambda *_: [1.0, 2.0]
        task.reward_processor = lambda _: math.nan if rewards == [1.0] else [rewards]
    samples = [common.Sample(item, k, 0, ["p"], completions=["c"]) for k in range(2)]
    message = rf"task 'mine'.*what.*{who}: expected a list of 2 finite numbers, got "
    with pytest.raises(common.InputError, match=message):
        task.pay(samples)


def test_18_metrics_are_means_over_the_update(script, tmp_path):
    """Minibatches of four and three samples: a loss is the mean over all seven."""
    task, args = small_task(7), tiny_args(script, tmp_path, train_batch_size=6)
    actors, critics = team(script, args)  # whose Recorders take no step
    samples = script.collect(actors, critics, task, list(range(7)), rng(), args)
    for k, one in enumerate(samples):
        one.reward = float(k)
    metrics = script.update(actors, critics, samples, rng(), args)
    weights = (torch.arange(7.0) - 3) / torch.arange(7.0).std()  # of the values 0
    texts = [s.prompt_ids[1] for s in samples], [s.completion_ids[1] for s in samples]
    expected = -(logprobs_of(script, actors[1], *texts, args) * weights).mean().item()
    assert metrics["losses/policy_loss/agent_1"] == pytest.approx(expected, abs=ATOL)
    found = metrics[f"losses/value_loss/{critics[-1].name}"]
    assert found == pytest.approx(91 / 7, rel=1e-5)  # 0 + 1 + 4 + 9 + 16 + 25 + 36


def test_19_whitening_of_equal_advantages_and_of_one(script):
    for count in (2, 3, 7, 48, 1000):
        equal, zeros = torch.full((count,), 0.3), torch.zeros(count)
        assert script.advantages(equal, zeros, script.Args()).abs().max().item() < 1e-6
    one, zero = torch.tensor([0.3]), torch.zeros(1)
    with pytest.warns(UserWarning, match="one sample"):
        assert script.advantages(one, zero, script.Args()).tolist() == one.tolist()


def test_21_tests_run_on_one_thread():
    code = "import torch; print(torch.get_num_threads())"
    theirs = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert torch.get_num_threads() == int(theirs) == 1


def test_22_the_policy_ranges_over_the_tokenizers_tokens(script, tmp_path):
    """160 rows of embedding, 99 tokens, one of them with the id 150: in sampling and scoring."""
    save_model(tmp_path, vocab_size=160)
    renumber(tmp_path, {"~": 150})
    actor = load(tmp_path)
    known = {*range(98), 150}
    assert set(actor.unknown_ids.tolist()) == set(range(160)) - known
    args = script.Args(max_new_tokens=4, temperature=3.0)
    drawn = {*chain(*script.generate(actor, [[9, 9]] * 300, rng(), args))}
    assert drawn <= known and len(drawn) > 90
    given = [[9, 9]] * len(known), [[token] for token in known], args
    total = logprobs_of(script, actor, *given).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)
    renumber(tmp_path, {"~": 160})  # the highest id counts, not the number of tokens
    with pytest.raises(common.InputError, match="embed the tokenizer's id 160"):
        load(tmp_path)


def say(text):
    return {"role": "user", "content": text}


def test_23_users_functions_get_copies(script, tmp_path):
    """Each function spoils what it is given, and what it gave before."""
    kept = []

    def formatter(item):
        assert item.pop("answer") == "1"
        kept.append(item["prompt"])
        return kept[-1]

    def reward(a, b, batch_items, prompts, completion_ids):
        assert batch_items[0].pop("answer") == "1"
        for messages in [*kept, *prompts[0], *prompts[1]]:
            messages.append(say("spoiled"))
        completion_ids[0][0].append(99)
        return [0.0] * len(a)

    def transition(prompt, prompt_history_per_agent, **_):
        prompt.append(say("spoiled"))
        for history in prompt_history_per_agent:
            history[-1].append(say("again"))
        return [history[-1] for history in prompt_history_per_agent]

    def callback(samples):
        samples[0].item.clear()
        samples[0].prompts[0].clear()
        return {}

    items = [{"prompt": [say("go")], "answer": "1"}]
    task = common.Task(items, reward, None, None, formatter, transition, callback)
    args = tiny_args(script, tmp_path, num_turns=2, num_generations=2)
    samples = script.collect(*team(script, args), task, [0], rng(), args)
    common.rollout_metrics(task, samples, "rollout", args)
    assert [one.turn for one in samples] == [0, 1, 0, 1]
    for one in samples:
        assert one.item == {"prompt": [say("go")], "answer": "1"}
        assert one.prompts == [[say("go")] + [say("again")] * one.turn] * 2
        assert [len(ids) for ids in one.completion_ids] == [1, 1]


def test_24_special_tokens_of_prompts(tmp_path):
    """A tokenizer puts 2 before a text and 1, its end, behind it: 2 stays, once; 1 does not."""
    save_model(tmp_path)
    tokenizer, special = common.tiny_tokenizer(), [("<unk>", 2), ("<eos>", 1)]
    frame = TemplateProcessing(single="<unk> $A <eos>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.chat_template = "<unk>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("a").input_ids == [2, 69, 1]
    actor, first = load(tmp_path), common.Sample({}, 0, 0, [])
    prompts = ["ab", "<unk>ab", "<unk>", [say("ab")], [say("<unk>")]]
    rows = [actor.encode(first, prompt) for prompt in prompts]
    assert rows == [[2, 69, 70], [2, 69, 70], [2], [2, 69, 70], [2, 2]]
    assert actor.encode_action([2, 69], "b", True) == [2, 69, 70, 1]
    assert actor.encode_action([2, 69], "b", False) == [2, 69, 70]


def test_25_a_function_that_seeds_moves_no_draw(script, tmp_path):
    """At every turn, in every function: no weight differs, and no two updates are alike."""
    seen = []

    def seeding(function, *given, **more):
        set_seed(42)
        return function(*given, **more)

    def look(samples):
        seen.append([ids for one in samples for ids in one.completion_ids])
        return {}

    plain = small_task(24, formatters=lambda item: "target 3\n", metrics_callback=look)
    plain.reward_func = lambda a, b, **_: [float(ord(text[:1] or "~")) for text in a]
    plain.external_transition, plain.eval_dataset = lambda **_: ["a", "b"], None
    kinds = "formatters", "metrics_callback", "reward_func", "external_transition"
    moved = {kind: partial(seeding, getattr(plain, kind)) for kind in kinds}
    args = tiny_args(script, tmp_path, num_turns=2, train_batch_size=3)
    tasks = plain, replace(plain, **moved)
    one, other = [weights(script.train(args, task)) for task in tasks]
    assert same(one, other) and seen[:6] == seen[6:]
    assert sum(a == b for a, b in zip(*seen[:2], strict=True)) < 4  # of 16


PADDED = "reads a text in a left-padded batch otherwise than alone"
UNFIT = [
    ("bart", "agent", {}, PADDED),  # has no positions
    ("roberta", "agent", {}, PADDED),  # counts them from another number
    ("recurrent_gemma", "critic", {}, PADDED),  # padding enters its states
    ("mamba", "agent", {}, PADDED),  # and what it caches
    ("opt", "critic", {"word_embed_proj_dim": 16}, "last hidden state"),
]


@pytest.mark.parametrize("family, role, sizes, why", UNFIT)
def test_26_a_model_that_padding_changes_is_refused(family, role, sizes, why, tmp_path):
    """As a run loads it: test_families.py has many more, each alone."""
    build(AutoModelForCausalLM, family, **sizes).model.save_pretrained(tmp_path)
    with pytest.raises(common.InputError, match=why):
        load(tmp_path, maac.Args(device="cpu", tokenizer="tiny"), role)


def test_27_a_token_of_no_probability_has_no_say(script):
    """A head that gives the pad token -inf: padded places are masked, not multiplied by 0."""
    actor = micro_learner(script)
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0, 0.0])
    actor.model.lm_head.register_forward_hook(lambda m, i, o: o + bias)
    prompts, completions = [[2, 3], [3], [4, 2, 3]], [[4], [3, 4, 4, 1], [2, 1]]
    args = script.Args()
    assert logprobs_of(script, actor, prompts, completions, args).isfinite().all()
    pairs = zip(prompts, completions, strict=True)
    samples = [sample([p], [c]) for p, c in pairs]
    update_actor(script, actor, samples, 0, torch.ones(3), args)
    assert len(actor.optimizer.gradients) == 1  # a gradient that is not finite raises


def test_28_generation_reads_each_prompt_once(script):
    """With top_k 1 a text is that of its prompt alone."""
    args = script.Args(top_k=1, max_new_tokens=4)
    actor = micro_learner(script, vocabulary=12, seed=6)
    texts = [[2, 3, 4], [4], [2, 3, 4], [2, 3, 4], [4], [3, 2]]  # three distinct ones
    alone = [script.generate(actor, [text], rng(), args)[0] for text in texts]
    rows, table = [], actor.model.get_input_embeddings()
    table.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    assert script.generate(actor, texts, rng(), args) == alone
    assert rows == [3, 6, 6, 6]


def test_28_generation_goes_on_without_rows_that_ended(script):
    """Every text is that of a full forward pass per token with the sample's own draws, to the
    letter: the scores differ by 1e-6 at most, and no draw is as near to a token's edge."""
    args = script.Args(max_new_tokens=20)
    actor = micro_learner(script, vocabulary=5, seed=1)
    texts = [[2, 3, 4], [4], [3, 2]] * 8
    rows, table = [], actor.model.get_input_embeddings()
    hook = table.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    drawn = script.generate(actor, texts, rng(), args)
    hook.remove()
    assert rows[:2] == [3, 24] and len(set(rows)) > 3  # 12 or fewer, 6 or fewer
    uniforms = torch.rand(20, 24, generator=rng())
    for k, (text, found) in enumerate(zip(texts, drawn, strict=True)):
        written = []
        while len(written) < 20 and written[-1:] != [1]:
            scores = actor.model(torch.tensor([text + written])).logits[0, -1:]
            u = uniforms[len(written), k : k + 1]
            written += script.draw_tokens(script.warp(actor, scores, args), u).tolist()
        assert found == written


def test_a_folder_without_a_language_model_head_is_no_actor(tmp_path):
    """Its head would be new and random."""
    name = save_model(tmp_path / "whole")
    AutoModel.from_pretrained(name).save_pretrained(tmp_path)
    with pytest.raises(common.InputError, match="lacks the weights lm_head.weight"):
        load(tmp_path, maac.Args(device="cpu", tokenizer="tiny"))


def test_every_mutant_still_finds_what_it_breaks():
    """tests/benchmarks/mutants.py takes minutes; this sees in no time that it can run."""
    mutants = runpy.run_path(str(ROOT / "tests/benchmarks/mutants.py"))["MUTANTS"]
    files = [*ROOT.glob("*.py"), ROOT / "tests" / "conftest.py"]
    code = "".join(path.read_text() for path in files)
    assert [old for _, _, old, _, _ in mutants if old not in code] == []
    assert {pitfall for pitfall, *_ in mutants} == set(range(1, 29))
