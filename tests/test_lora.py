"""Adapters: one base for all learners of a source, gradients, what is saved, resuming."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.survival import outcome, same
from conftest import save_model
from test_families import build
from test_pitfalls import load
from test_resume import bare, flags, game, killed  # noqa: F401 - bare is for every test
from transformers import AutoModel, AutoModelForCausalLM

import common
import maac

peft = pytest.importorskip("peft")
TEXTS = [[3, 4, 5], [6]], [[8, 9], [10, 11, 1]]
IDS = torch.tensor([[3, 4, 5, 6]])


def stir(learner):
    """Give the adapters' B, which begin as zeros, random values."""
    torch.manual_seed(0)
    for name, weight in learner.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_autograds_through_w_and_ba(script, checkpointing, tmp_path):
    """dW of the merged model, by the chain rule: dB = 2 dW A', dA = 2 B' dW; to 1e-5, some
    hundred roundings of float32. Gradient checkpointing changes nothing."""
    args = script.Args(lora_rank=3, device="cpu", gradient_checkpointing=checkpointing)
    actor = load(save_model(tmp_path), args)
    stir(actor)
    merged = copy.deepcopy(actor.base[1]).merge_and_unload().requires_grad_(True)
    plain = common.Learner("agent_0", "x", merged, actor.tokenizer)
    plain.value_head = actor.value_head
    script.sequence_logprobs(actor, *TEXTS, args)[0].sum().backward()
    args = replace(args, gradient_checkpointing=False)
    script.sequence_logprobs(plain, *TEXTS, args)[0].sum().backward()
    layers = dict(actor.model.named_modules())
    layers = {name: x for name, x in layers.items() if hasattr(x, "lora_A")}
    assert len(layers) == 14  # q, k, v, o, gate, up, down of two layers
    for name, layer in layers.items():
        slope = merged.get_submodule(name).weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for found, expected in (b.grad, 2 * slope @ a.T), (a.grad, 2 * b.T @ slope):
            assert expected.norm() > 0
            assert (found - expected).norm() < 1e-5 * expected.norm()


def test_learners_share_one_base_and_nothing_else(tmp_path):
    """Over the very weights of a model with a tied head, in bfloat16; what is trained is not."""
    name = save_model(tmp_path, tie_word_embeddings=True)
    args = maac.Args(lora_rank=3, dtype="bfloat16", device="cpu")
    names = [name, name]
    actors = common.load_learners("agent", AutoModelForCausalLM, names, 2, args)
    critics = common.load_learners("critic", AutoModel, [name], 1, args, actors)
    frozen, trained = {x.data_ptr() for x in actors[0].base[0].parameters()}, []
    for weight in (w for x in actors + critics for w in x.model.parameters()):
        assert weight.requires_grad != (weight.data_ptr() in frozen)
        if weight.requires_grad:
            assert weight.dtype == torch.float32
            trained.append(weight.data_ptr())
    assert len(set(trained)) == len(trained) == 3 * 2 * 14
    up = critics[0].model.layers[0].mlp.up_proj
    assert up.base_layer.weight.dtype == torch.bfloat16


def test_saved_agents_are_the_adapted_model(tmp_path):
    """Merged, for who has no peft, and as adapters; another agent of the base stays as it was."""
    name, args = save_model(tmp_path / "model"), maac.Args(lora_rank=3, device="cpu")
    names = [name, name]
    one, two = common.load_learners("agent", AutoModelForCausalLM, names, 2, args)
    stir(one)
    common.save_agent(one, tmp_path / "agent")
    plain = AutoModelForCausalLM.from_pretrained(name)
    adapted, untouched = one.model(IDS).logits, plain(IDS).logits
    assert torch.equal(two.model(IDS).logits, untouched)
    assert not torch.allclose(untouched, adapted, atol=1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "agent")
    beside = peft.PeftModel.from_pretrained(plain, tmp_path / "agent/adapter")
    for model in (merged, beside):
        assert torch.allclose(model(IDS).logits, adapted, atol=1e-5)


def test_killed_with_adapters(script, tmp_path):
    """In the middle of an update, and gone on with, to the bit; the checkpoint holds what is
    trained alone."""
    more = {"lora_rank": 2, "dtype": "bfloat16"}
    whole = script.train(flags(script, tmp_path / "a", **more), game())
    args = killed(script, tmp_path / "b", "script.step", 28, **more)
    state = torch.load(Path(args.resume) / "checkpoint.pt", weights_only=True)
    for name, weights in state["weights"].items():
        assert all("lora" in key or "value_head" in key for key in weights)
        groups = state["optimizers"][name]["param_groups"]
        assert sum(len(group["params"]) for group in groups) == len(weights)
    assert same(outcome(script.train(args, game())), outcome(whole))


def test_checkpoints_change_no_text(tmp_path):
    """Of GPT-2, which has no cache in train mode: it would read its last token alone."""
    name, drawn = save_model(tmp_path, "gpt2"), []
    for flag in (False, True):
        args = maac.Args(gradient_checkpointing=flag, max_new_tokens=6, device="cpu")
        texts = [40, 41, 42, 43], [50]
        samples = [common.Sample({}, 0, 0, [""], prompt_ids=[ids]) for ids in texts]
        maac.act([load(name, args)], samples, torch.Generator().manual_seed(0), args)
        drawn.append([one.completion_ids for one in samples])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_base_in_bfloat16(family, tmp_path):
    """With a tied head, whose embedding is float32, and norms that autocast does not cast: within
    0.05 nat of float32, some roundings to 8 bits of scores below 1. It keeps its frequencies, which
    would put positions some hundred tokens apart off by a radian."""
    name = save_model(tmp_path, family, tie_word_embeddings=True)
    scores, buffers = [], []
    for dtype in ("float32", "bfloat16"):
        args = maac.Args(lora_rank=2, device="cpu", dtype=dtype)
        actor = load(name, args)
        stir(actor)
        scores.append(maac.sequence_logprobs(actor, *TEXTS, args)[0])
        buffers.append(dict(actor.model.named_buffers()))
    assert not torch.equal(*scores)
    torch.testing.assert_close(*scores, rtol=0, atol=0.05)
    assert any("inv_freq" in name for name in buffers[0]) == (family == "llama")
    torch.testing.assert_close(*buffers, rtol=0, atol=0)


def test_experts_that_are_no_layers_are_refused(tmp_path):
    """Their adapters could not be merged: better said before the training than after it."""
    build(AutoModelForCausalLM, "mixtral").model.save_pretrained(tmp_path)
    args = maac.Args(lora_rank=2, device="cpu", tokenizer="tiny")
    with pytest.raises(common.InputError, match="lora_rank cannot adapt its experts"):
        load(tmp_path, args)
