"""One test per known defect of public trainers; tests/benchmarks/mutants.py takes each handling
out and sees its test fail, and names each by its number."""

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    Recorder,
    assert_same_gradients,
    logprobs_of,
    micro_config,
    micro_learner,
    sample,
    small_task,
    tiny_args,
    update_actor,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
)

import common


def save_model(folder, family="llama", generation=None, **config):
    """A checkpoint of a random model with the built-in tokenizer."""
    tokenizer = common.tiny_tokenizer()
    settings = micro_config(family, len(tokenizer))
    for key, value in config.items():
        setattr(settings, key, value)
    model = AutoModelForCausalLM.from_config(settings)
    if generation is not None:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_01_logprobs_are_those_of_the_sampling_distribution(script):
    """The frequency of each completion is exp(its log-probability), with every cut on."""
    args = script.Args(temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=1)
    actor = micro_learner(script, seed=2)
    torch.manual_seed(0)
    drawn = [ids[0] for ids in script.generate(actor, [[2, 3]] * 20_000, args)]
    for token in set(drawn):
        p = logprobs_of(script, actor, [[2, 3]], [[token]], args).exp().item()
        frequency = drawn.count(token) / len(drawn)
        assert abs(frequency - p) < 4 * math.sqrt(p * (1 - p) / len(drawn)) + 1e-4


def test_01_a_sampled_token_is_never_cut(script):
    args = script.Args(top_k=1)
    actor = micro_learner(script)
    every = [logprobs_of(script, actor, [[2, 3]], [[t]], args).item() for t in range(5)]
    assert all(map(math.isfinite, every))


def test_02_only_the_flags_shape_the_distribution(script, tmp_path):
    """The checkpoint's own top_k 1 and repetition penalty have no say; its end ids have."""
    generation = {
        "top_k": 1,
        "do_sample": True,
        "repetition_penalty": 9.0,
        "eos_token_id": [5, 7],
    }
    name = save_model(tmp_path / "model", generation=generation)
    args = script.Args(agents=(name, name), max_new_tokens=1, device="cpu")
    actor = common.load_learners("agent", AutoModelForCausalLM, [name], args)[0]
    assert actor.end_ids == [1, 5, 7]  # the tokenizer's and the checkpoint's
    drawn = {ids[0] for ids in script.generate(actor, [[9, 9]] * 300, args)}
    assert len(drawn) > 20
    assert actor.model.generation_config.repetition_penalty in (None, 1.0)


def test_03_the_end_token_is_part_of_the_action(script):
    """With pad == eos, with two end ids, and with an immediate end."""
    actor = micro_learner(script, seed=1)
    actor.tokenizer = SimpleNamespace(pad_token_id=1, decode=lambda ids, **_: str(ids))
    actor.model.generation_config.eos_token_id = [1, 3]
    torch.manual_seed(0)
    args = script.Args(max_new_tokens=4)
    completions = script.generate(actor, [[2, 3]] * 200, args)
    for ids in completions:
        inner, last = ids[:-1], ids[-1]
        assert not {1, 3} & set(inner)
        assert last in (1, 3) or len(ids) == 4
    assert [1] in completions and [3] in completions
    one = logprobs_of(script, actor, [[2, 3], [2, 3]], [[1], [4, 4, 1]], args)
    with torch.no_grad():
        first = actor.model(torch.tensor([[2, 3]])).logits[0, -1].log_softmax(-1)
    assert one[0].item() == pytest.approx(first[1].item(), abs=1e-5)
    empty = common.Sample({}, 0, 0, [""])
    empty.add(actor, [2, 3], [1])
    assert empty.completions == ["[]"] and empty.ended == [True]


def test_04_left_padding_has_positions(script):
    """Positions are the token's own: GPT-2 would be off by nats (see also test_batching)."""
    actor = micro_learner(script, "gpt2", vocabulary=12)
    inputs, width = script.pad_batch(actor, [[5, 6, 7], [8]], [[2], [3, 4]])
    assert width == 3
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 2, 0], [0, 0, 8, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    args = script.Args()
    pair = logprobs_of(script, actor, [[5, 6, 7, 9], [8]], [[2], [3, 4]], args)
    alone = logprobs_of(script, actor, [[8]], [[3, 4]], args)
    torch.testing.assert_close(pair[1:], alone, atol=1e-5, rtol=0)


def test_05_no_dropout(script, tmp_path):
    name = save_model(
        tmp_path / "m", "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    actor = common.load_learners("agent", AutoModelForCausalLM, [name], script.Args())[
        0
    ]
    actor.value_head = script.value_head(actor, None)
    actor.model.train()
    twice = [
        logprobs_of(script, actor, [[5, 6]], [[7, 8]], script.Args()) for _ in range(2)
    ]
    assert torch.equal(*twice)


def test_05_no_dropout_in_the_tiny_model(script):
    args = script.Args(device="cpu", model_config='{"attention_dropout": 0.5}')
    (actor,) = common.load_learners("agent", AutoModelForCausalLM, ["tiny"], args)
    assert actor.model.config.attention_dropout == 0


def test_04_a_model_without_positions_is_refused(script, tmp_path):
    """BART would read a left-padded row as another text; Mamba would count the mask twice."""
    small = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    sizes = small | {"decoder_ffn_dim": 16, "vocab_size": 99, "encoder_layers": 1}
    AutoModelForCausalLM.from_config(BartConfig(**sizes)).save_pretrained(tmp_path)
    common.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(common.InputError, match="takes no position_ids or no cache"):
        script.train(tiny_args(script, tmp_path, agent_model=str(tmp_path)))


def test_a_folder_without_a_language_model_head_is_no_actor(script, tmp_path):
    """Its head would be new and random."""
    name = save_model(tmp_path / "whole")
    AutoModel.from_pretrained(name).save_pretrained(tmp_path / "backbone")
    common.tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    args = tiny_args(script, tmp_path, agent_model=str(tmp_path / "backbone"))
    with pytest.raises(common.InputError, match="weights lack lm_head.weight"):
        script.train(args, small_task())


def test_06_weights_are_float32(script, tmp_path):
    folder = tmp_path / "half"
    name = save_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    common.tiny_tokenizer().save_pretrained(folder)
    args = script.Args(dtype="bfloat16")
    actor = common.load_learners("agent", AutoModelForCausalLM, [str(folder)], args)[0]
    actor.value_head = script.value_head(actor, 8)
    weights = [*actor.model.parameters(), *actor.value_head.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    if script.__name__ == "iac_shared":
        values = script.sequence_logprobs(actor, [[5, 6]], [[7]], args)[2]
    else:
        values = script.critic_values(actor, [[5, 6]], args)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("agents", [1, 3])
def test_07_one_critic_step_per_minibatch(agents):
    import maac

    args = maac.Args(num_agents=agents, train_batch_size=4)
    actors = [micro_learner(maac, seed=k) for k in range(agents)]
    critic = micro_learner(maac, vocabulary=99, head=True)
    critic.tokenizer = common.tiny_tokenizer()
    samples = [sample([[2, 3]] * agents, [[4]] * agents, float(k)) for k in range(8)]
    for one in samples:
        one.prompts = ["x"] * agents
    maac.update(actors, [critic], samples, args)
    assert len(critic.optimizer.gradients) == 2
    assert [len(actor.optimizer.gradients) for actor in actors] == [2] * agents


def test_08_a_q_critic_weighs_by_q_itself(script):
    """With an exact Q, y − Q is zero at the last turn, and yet the policy must learn."""
    args = script.Args(critic_type="q")
    samples = [sample([[2]], [[3]], reward) for reward in (0.0, 1.0, 2.0)]
    q = torch.tensor([0.0, 1.0, 2.0])
    weights = script.advantages(script.td_targets(samples, q, args), q, args)
    torch.testing.assert_close(weights, torch.tensor([-1.0, 0.0, 1.0]))


def test_09_ends_are_flags_of_the_episode(script, tmp_path):
    """Early ends leave episodes of unequal lengths; none bootstraps over its end."""
    task = small_task(8, external_transition=lambda prompt, **_: [prompt, prompt])
    paid = iter([1.0, 0.0] * 100)
    task.reward_func = lambda a, b: [next(paid) for _ in a]
    args = tiny_args(script, tmp_path, num_turns=3, early_termination_threshold=0.5)
    actors = common.load_learners("agent", AutoModelForCausalLM, ["tiny", "tiny"], args)
    samples = script.collect(actors, task, task.train_dataset[:4], args)
    assert {(s.turn, s.reward > 0.5) for s in samples if s.done} <= {
        (turn, True) for turn in range(3)
    } | {(2, False)}
    assert any(s.done and s.turn == 0 for s in samples)
    assert any(s.done and s.turn > 0 for s in samples)
    targets = script.td_targets(samples, torch.full((len(samples),), 100.0), args)
    for one, target in zip(samples, targets.tolist(), strict=True):
        assert target == one.reward + (0.0 if one.done else 100.0)


def test_10_targets_are_formed_before_whitening_and_once(script):
    """Whitening is over the whole buffer, whatever the minibatch, and changes no target."""
    samples = [sample([[2]], [[3]], r) for r in (0.0, 5.0, 1.0, 10.0)]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    args = script.Args(train_batch_size=2)
    targets = script.td_targets(samples, values, args)
    weights = script.advantages(targets, values, args)
    assert targets.tolist() == [0.0, 5.0, 1.0, 10.0]
    assert abs(weights.mean().item()) < 1e-6 and weights.std().item() == pytest.approx(
        1.0
    )
    seen = {}
    module_update_actor = script.update_actor

    def spy(actor, chosen, agent, given, args):
        row = given[0] if given.dim() == 2 else given
        seen.update({s.reward: w for s, w in zip(chosen, row.tolist(), strict=True)})
        return {}

    learner = SimpleNamespace(name="agent_0")
    script.update_actor, script.estimate_values = spy, lambda *_: values
    restore = script.critic_texts, getattr(script, "update_critic", None)
    script.critic_texts, script.update_critic = lambda *_: [[2]] * 4, lambda *_: {}
    try:
        script.update([learner], [learner], samples, args)
    finally:
        import importlib

        script.critic_texts, script.update_critic = restore
        script.update_actor = module_update_actor
        importlib.reload(script)
    for one, weight in zip(samples, weights.tolist(), strict=True):
        assert seen[one.reward] == pytest.approx(weight)


def test_11_means_are_over_the_whole_minibatch(script):
    """Micro-batches of 1, 3 and all of 4 samples of unequal lengths: one gradient."""
    prompts, completions = [[2]] * 4, [[3], [3, 4, 4, 1], [4, 1], [3, 3, 3]]
    samples = [sample([p], [c]) for p, c in zip(prompts, completions, strict=True)]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    gradients = []
    for size in (None, 1, 3):
        actor = micro_learner(script)
        args = script.Args(micro_batch_size=size, max_grad_norm=0.0, entropy_coef=0.5)
        update_actor(script, actor, samples, 0, weights, args)
        gradients.append(actor.optimizer.gradients[0])
    for other in gradients[1:]:
        assert_same_gradients(gradients[0], other)


def test_12_no_logits_that_nobody_needs(script):
    """The actor's head sees T positions in the update and 1 in sampling; a critic has none."""
    actor = micro_learner(script, vocabulary=12)
    widths = []
    actor.model.lm_head.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    prompts, completions = [[2] * 20, [3] * 9], [[4, 5, 1], [6]]
    logprobs_of(script, actor, prompts, completions, script.Args())
    script.generate(actor, prompts, script.Args(max_new_tokens=2))
    assert widths[0] == 3 and set(widths[1:]) == {1}
    critic = micro_learner(script, vocabulary=12, head=True)
    if script.__name__ == "iac_shared":
        critic.model.lm_head.register_forward_hook(
            lambda *_: pytest.fail("logits for a value")
        )
    else:
        assert not hasattr(critic.model, "lm_head")
    script.estimate_values(critic, prompts, script.Args())


def test_13_one_forward_pass_per_sample_in_the_update(script):
    """The shared model gives log-probability and value in one pass; nobody runs a second."""
    actor = micro_learner(script)
    passes = []
    actor.model.register_forward_hook(lambda m, i, o: passes.append(1))
    actor.model.base_model.layers[0].register_forward_hook(
        lambda m, i, o: passes.append(0)
    )
    samples = [sample([[2, 3]], [[4, 1]]) for _ in range(4)]
    args = script.Args()
    columns = torch.ones(3, 4) if script.__name__ == "iac_shared" else torch.ones(4)
    script.update_actor(actor, samples, 0, columns, args)
    assert passes.count(1) == 1 and passes.count(0) == 1


def test_14_the_sampled_ids_are_trained_on(script, tmp_path):
    """A tokenizer that decodes to something else changes nothing: the ids are kept."""
    task = small_task(4)
    args = tiny_args(script, tmp_path, max_new_tokens=3)
    actors = common.load_learners("agent", AutoModelForCausalLM, ["tiny", "tiny"], args)
    drawn = []
    original = script.generate

    def spy(actor, prompts, args):
        drawn.append(original(actor, prompts, args))
        return drawn[-1]

    script.generate = spy
    try:
        samples = script.collect(actors, task, task.train_dataset, args)
    finally:
        script.generate = original
    for agent in range(2):
        assert [s.completion_ids[agent] for s in samples] == drawn[agent]


def test_15_each_model_reads_with_its_own_tokenizer(script, tmp_path):
    """Agents and critics of different vocabularies: every text through its reader's tokenizer."""
    shifted = tmp_path / "shifted"
    save_model(shifted, "gpt2", n_positions=256)
    text = (shifted / "tokenizer.json").read_text()
    a, b = '"a": 69', '"b": 70'
    assert a in text and b in text
    (shifted / "tokenizer.json").write_text(
        text.replace(a, '"a": 0x').replace(b, '"b": 69').replace("0x", "70")
    )
    assert AutoTokenizer.from_pretrained(shifted)("ab").input_ids == [70, 69]
    args = tiny_args(script, tmp_path, agents=("tiny", str(shifted)), max_new_tokens=2)
    names = common.model_names(args)
    actors = common.load_learners("agent", AutoModelForCausalLM, names, args)
    items = [{"prompt": "ab"}]
    task = common.Task(items, lambda one, two: [0.0] * len(one))
    samples = script.collect(actors, task, items, args)
    assert [s.prompt_ids for s in samples] == [[[69, 70], [70, 69]]]
    if script.__name__ != "iac_shared":
        critic = common.load_learners(
            "critic", AutoModelForCausalLM, [str(shifted)], args
        )[0]
        agent = () if script.__name__ == "maac" else (0,)
        texts = script.critic_texts(critic, samples, *agent, args)
        assert critic.tokenizer.decode(texts[0]).rstrip().endswith("ab")
        assert [token for token in texts[0] if token in (69, 70)][-2:] == [70, 69]


def test_16_evaluation_leaves_no_trace(script, tmp_path):
    """Evaluating often, seldom or never gives the same weights, even for a random reward."""
    import random

    weights = []
    for interval, evaluated in ((4, True), (0, True), (0, False)):
        task = small_task(32)
        task.reward_func = lambda a, b: [
            random.random() + torch.rand(()).item() for _ in a
        ]
        task = task if evaluated else replace(task, eval_dataset=None)
        args = tiny_args(script, tmp_path, eval_interval=interval)
        folder = script.train(args, task)
        model = AutoModelForCausalLM.from_pretrained(folder / "agent_1")
        weights.append([p.detach() for p in model.parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


@pytest.mark.parametrize(
    "rewards", [[1.0], [1.0, 2.0, 3.0], 1.0, None, "12", [1.0, None], [1.0, math.nan],
                [math.inf, 0.0], ["1", 2.0], [[1.0], [2.0]], {0: 1.0, 1: 2.0}],
    ids=str,
)  # fmt: skip
def test_17_a_wrong_reward_is_refused(rewards):
    item = {"prompt": "what"}
    task = common.Task([item], lambda *_: rewards, name="mine")
    samples = [common.Sample(item, k, 0, ["p"], completions=["c"]) for k in range(2)]
    with pytest.raises(
        common.InputError, match=r"task 'mine'.*what.*reward_func.*expected.*got"
    ):
        common.pay(task, samples)


def test_18_metrics_are_means_over_the_update(script, tmp_path):
    """Two minibatches of unequal size: the reported loss is the mean over all samples."""
    task = small_task(8)
    args = tiny_args(script, tmp_path, train_batch_size=6, agent_learning_rate=1e-9)
    actors = common.load_learners("agent", AutoModelForCausalLM, ["tiny", "tiny"], args)
    for actor in actors:
        actor.value_head = script.value_head(actor, None)
        actor.optimizer = Recorder(actor.model.parameters())
    critics = common.load_learners(
        "critic", AutoModelForCausalLM, ["tiny", "tiny"], args
    )
    for critic in critics:
        critic.value_head = script.value_head(critic, None)
        critic.optimizer = Recorder(critic.model.parameters())
    samples = script.collect(actors, task, task.train_dataset, args)
    for k, one in enumerate(samples):
        one.reward = float(k)
    critics = {"maac": critics[:1], "iac_shared": actors}.get(script.__name__, critics)
    metrics = script.update(actors, critics, samples, args)
    values = torch.zeros(len(samples))
    weights = script.advantages(script.td_targets(samples, values, args), values, args)
    prompts, completions = [
        [getattr(s, name)[1] for s in samples]
        for name in ("prompt_ids", "completion_ids")
    ]
    logprobs = logprobs_of(script, actors[1], prompts, completions, args)
    expected = -(logprobs * weights).mean().item()
    assert metrics["losses/policy_loss/agent_1"] == pytest.approx(expected, abs=1e-5)
    assert metrics[f"losses/value_loss/{critics[-1].name}"] == pytest.approx(
        sum(k * k for k in range(8)) / 8, rel=1e-4
    )


@pytest.mark.parametrize("count", [2, 3, 7, 48, 1000])
def test_19_equal_advantages_whiten_to_zero(script, count):
    equal = torch.full((count,), 0.3)
    weights = script.advantages(equal, torch.zeros(count), script.Args())
    assert weights.abs().max().item() < 1e-6


def test_19_a_buffer_of_one_is_left_as_it_is(script):
    one, zero = torch.tensor([0.3]), torch.zeros(1)
    with pytest.warns(UserWarning, match="one sample"):
        assert script.advantages(one, zero, script.Args()).tolist() == one.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script.advantages(one, zero, script.Args(advantage_normalization=False))


def test_21_tests_run_on_one_thread():
    code = "import torch; print(torch.get_num_threads())"
    theirs = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert torch.get_num_threads() == int(theirs) == 1


def test_every_mutant_still_finds_what_it_breaks():
    """tests/benchmarks/mutants.py takes minutes; this sees in no time that it can run."""
    import runpy

    mutants = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "mutants.py"))[
        "MUTANTS"
    ]
    code = "".join(path.read_text() for path in ROOT.glob("*.py"))
    assert [old for _, _, old, _, _ in mutants if old not in code] == []
    assert {pitfall for pitfall, *_ in mutants} == set(range(1, 21))
