"""Adapters: one base for all learners of a source, gradients, what is saved, resuming."""

import copy

import pytest
import torch
from benchmarks.survival import outcome, same
from conftest import save_model, small_task, tiny_args
from test_families import build
from test_resume import flags, game, killed
from transformers import AutoModel, AutoModelForCausalLM

import common
import maac
from common import InputError

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take most of a short run's time, and have tests of their own."""
    monkeypatch.setattr(common, "draw_curves", lambda folder: None)


def team(script, folder, **changes):
    """Two agents and a critic of one folder, with adapters, and the arguments."""
    name = save_model(folder / "model")
    args = tiny_args(script, folder, agent_model=name, lora_rank=3, **changes)
    actors = common.load_learners("agent", AutoModelForCausalLM, [name] * 2, 2, args)
    return args, actors


def stir(learner):
    """Give the adapters' B, which begin as zeros, random values."""
    for name, weight in learner.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


def merged(learner):
    """The same model with every weight W + 2BA written out, and the deltas' factors."""
    model = copy.deepcopy(learner.base[0])
    for name, layer in learner.model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (getattr(layer, x)["default"].weight for x in ("lora_A", "lora_B"))
            weight = model.get_submodule(name).weight
            weight.data += 2 * b.data @ a.data  # alpha / rank
            yield name, a, b, weight
    yield "", None, None, model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_autograds_through_w_and_ba(script, checkpointing, tmp_path):
    """dW of the merged model, by the chain rule: dB = 2 dW A', dA = 2 B' dW; to 1e-5, some
    hundred roundings of float32. Gradient checkpointing changes nothing."""
    changes = {"gradient_checkpointing": checkpointing, "max_new_tokens": 3}
    args, (actor, _) = team(script, tmp_path, **changes)
    actor.value_head = script.value_head(actor, None)
    stir(actor)
    *layers, (_, _, _, model) = merged(actor)
    texts = [[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 1]]
    script.sequence_logprobs(actor, *texts, args)[0].sum().backward()
    model.requires_grad_(True)
    plain = common.Learner("agent_0", "x", model, actor.tokenizer)
    plain.value_head = actor.value_head
    plain.unknown_ids = actor.unknown_ids
    script.sequence_logprobs(plain, *texts, args)[0].sum().backward()
    assert len(layers) == 14  # q, k, v, o, gate, up, down of two layers
    for _, a, b, weight in layers:
        for found, expected in (
            (b.grad, 2 * weight.grad @ a.T), (a.grad, 2 * b.T @ weight.grad)
        ):  # fmt: skip
            assert expected.norm() > 0
            assert (found - expected).norm() < 1e-5 * expected.norm()


def test_learners_share_one_base_and_nothing_else(script, tmp_path):
    """A run changes no weight of the base, and each agent's adapters; the folders it leaves load
    without peft and give what the adapted model gives."""
    _, (one, two) = team(script, tmp_path)
    for name, weight in one.base[0].named_parameters():
        other = two.model.get_parameter(name.replace(".weight", ".base_layer.weight")) \
            if "proj" in name else two.model.get_parameter(name)  # fmt: skip
        assert weight.data_ptr() == other.data_ptr() and not other.requires_grad
    stir(one)
    ids = torch.tensor([[3, 4, 5, 6]])
    adapted, untouched = one.model(ids).logits, two.model(ids).logits
    assert torch.equal(untouched, one.base[0](ids).logits)
    common.save_agent(one, tmp_path / "agent")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    assert torch.allclose(loaded(ids).logits, adapted, atol=1e-5)
    assert not torch.allclose(untouched, adapted, atol=1e-3)
    peft = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(one.base[0]), tmp_path / "agent/adapter"
    )
    assert torch.allclose(again(ids).logits, adapted, atol=1e-5)


def test_the_critic_shares_the_base_too(script, tmp_path):
    """Over the base's weights, of a model with a tied head, in bfloat16; what is trained is not."""
    name = save_model(tmp_path / "model", tie_word_embeddings=True)
    args = tiny_args(script, tmp_path, lora_rank=3, dtype="bfloat16", agent_model=name)
    (actor,) = common.load_learners("agent", AutoModelForCausalLM, [name], 1, args)
    others = [actor]
    (critic,) = common.load_learners("critic", AutoModel, [name], 1, args, others)
    places = {x.data_ptr() for x in actor.base[0].parameters()}
    for learner in (actor, critic):
        for weight in learner.model.parameters():
            assert weight.requires_grad != (weight.data_ptr() in places)
            assert weight.dtype == torch.float32 or not weight.requires_grad
    assert critic.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


def test_killed_with_adapters(script, tmp_path):
    """In the middle of an update, and gone on with, to the bit."""
    whole = script.train(flags(script, tmp_path / "a", lora_rank=2), game())
    args = killed(script, tmp_path / "b", "script.step", 28, lora_rank=2)
    assert same(outcome(script.train(args, game())), outcome(whole))


def test_resumed_with_adapters(script, tmp_path, monkeypatch):
    """To the bit; the checkpoint holds what is trained alone."""
    more = {"lora_rank": 2, "save_interval": 1, "dtype": "bfloat16"}
    whole = script.train(tiny_args(script, tmp_path / "a", **more), small_task(32))
    calls = []

    def update(*given, inner=script.update):
        calls.append(1)
        if len(calls) == 3:
            raise InputError("stopped")
        return inner(*given)

    monkeypatch.setattr(script, "update", update)
    with pytest.raises(InputError, match="stopped"):
        script.train(tiny_args(script, tmp_path / "b", **more), small_task(32))
    (left,) = (tmp_path / "b").iterdir()
    state = torch.load(left / "checkpoint.pt", weights_only=True)["weights"]
    assert all("lora" in k or "value_head" in k for x in state.values() for k in x)
    optimizers = torch.load(left / "checkpoint.pt", weights_only=True)["optimizers"]
    for name, weights in state.items():
        groups = optimizers[name]["param_groups"]
        assert sum(len(group["params"]) for group in groups) == len(weights)
    args = tiny_args(script, tmp_path, **more, resume=str(left))
    assert same(outcome(script.train(args, small_task(32))), outcome(whole))


def test_checkpoints_change_no_text(script, tmp_path):
    """Of GPT-2, which has no cache in train mode: it would read its last token alone."""
    name = save_model(tmp_path / "gpt2", "gpt2", vocab_size=99)
    drawn = []
    for flag in (False, True):
        args = script.Args(gradient_checkpointing=flag, max_new_tokens=6, device="cpu")
        (actor,) = common.load_learners("agent", AutoModelForCausalLM, [name], 1, args)
        texts = [40, 41, 42, 43], [50]
        samples = [common.Sample({}, 0, 0, [""], prompt_ids=[ids]) for ids in texts]
        script.act([actor], samples, torch.Generator().manual_seed(0), args)
        drawn.append([one.completion_ids for one in samples])
    assert drawn[0] == drawn[1]


def test_a_base_in_bfloat16_keeps_its_frequencies(script, tmp_path):
    """Rounded to 8 bits, positions some hundred tokens apart are off by a radian."""
    args, buffers = script.Args(lora_rank=2, device="cpu"), []
    for dtype in ("float32", "bfloat16"):
        args.dtype = dtype
        (actor,) = common.load_learners(
            "agent", AutoModelForCausalLM, ["tiny"], 1, args
        )
        buffers.append(dict(actor.model.named_buffers()))
    assert any("inv_freq" in name for name in buffers[0])
    for name, values in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], values, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_a_base_in_bfloat16(family, script, tmp_path):
    """Of a tied head, whose embedding is float32, under norms that autocast does not cast: within
    0.05 nat of float32, some roundings to 8 bits of scores below 1."""
    name = save_model(
        tmp_path / "tied", family, vocab_size=99, tie_word_embeddings=True
    )
    scores = []
    for dtype in ("float32", "bfloat16"):
        args = script.Args(lora_rank=2, device="cpu", dtype=dtype)
        (actor,) = common.load_learners("agent", AutoModelForCausalLM, [name], 1, args)
        actor.value_head = script.value_head(actor, None)
        torch.manual_seed(0)
        stir(actor)
        given = [[3, 4, 5], [6]], [[8, 9], [10, 11, 1]], args
        scores.append(script.sequence_logprobs(actor, *given)[0])
    assert not torch.equal(*scores)
    torch.testing.assert_close(*scores, rtol=0, atol=0.05)


def test_experts_that_are_no_layers_are_refused(tmp_path):
    """Their adapters could not be merged: better said before the training than after it."""
    model = build(AutoModelForCausalLM, "mixtral").model
    model.save_pretrained(tmp_path)
    common.tiny_tokenizer().save_pretrained(tmp_path)
    args = maac.Args(lora_rank=2, device="cpu")
    with pytest.raises(InputError, match="lora_rank cannot adapt its experts"):
        common.load_learners("agent", AutoModelForCausalLM, [str(tmp_path)], 1, args)
