"""The shape of the project: what the scripts share to the byte, and that every flag is read."""

import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, SCRIPTS

FILES = {name: (ROOT / f"{name}.py").read_text() for name in (*SCRIPTS, "common")}
ALLOWED = {"torch", "transformers", "tyro", "numpy", "tqdm", "tokenizers", "common"}
PAIRS = list(itertools.combinations(SCRIPTS, 2))
SHARED = [
    "pad_batch",
    "value_head",
    "adam",
    "warp",
    "generate",
    "collect",
    "critic_values",
    "estimate_values",
    "td_targets",
    "advantages",
    "evaluate",
]


def functions(name):
    return [
        node.name
        for node in ast.parse(FILES[name]).body
        if isinstance(node, ast.FunctionDef)
    ]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_shared_blocks_are_the_same_to_the_byte(pair):
    one, other = map(importlib.import_module, pair)
    for block in SHARED:
        assert inspect.getsource(getattr(one, block)) == inspect.getsource(
            getattr(other, block)
        )


def test_maac_and_iac_separate_share_the_updates():
    import iac_separate
    import maac

    for block in ("sequence_logprobs", "update_critic", "update_actor"):
        assert inspect.getsource(getattr(maac, block)) == inspect.getsource(
            getattr(iac_separate, block)
        )


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_blocks_and_banners_stand_in_the_same_order(pair):
    orders = [functions(name) for name in pair]
    both = [
        [f for f in order if f in set(orders[0]) & set(orders[1])] for order in orders
    ]
    assert both[0] == both[1]
    banners = [re.findall(r"^# -+ (.+)$", FILES[name], re.MULTILINE) for name in pair]
    assert banners[0] == banners[1] and len(banners[0]) >= 7


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_difference_of_two_scripts_can_be_read(pair):
    command = ["diff", *(str(ROOT / f"{name}.py") for name in pair)]
    lines = subprocess.run(
        command, check=False, capture_output=True, text=True
    ).stdout.splitlines()
    assert sum(line[:1] in "<>" for line in lines if line) <= 120


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    for node in ast.parse(FILES[name]).body:
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        roots = {module.split(".")[0] for module in names}
        assert roots <= ALLOWED | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    """A flag is read where `args.flag` (or `self.args.flag`) stands in code."""
    module = importlib.import_module(name)
    read = {
        node.attr
        for text in (FILES[name], FILES["common"])
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("args", "self.args")
    }
    flags = {field.name for field in fields(module.Args)}
    assert flags - read == set()
    source = "".join(inspect.getsource(c) for c in (module.Args, module.common.RunArgs))
    for flag in flags:
        assert re.search(rf"^    {flag}: .+\n    \"\"\"\S", source, re.MULTILINE), flag


def test_every_parameter_of_the_reference_is_a_flag():
    everywhere = [
        "num_agents",
        "num_turns",
        "critic_type",
        "num_train_epochs",
        "agent_learning_rate",
        "critic_learning_rate",
        "value_loss_coef",
        "advantage_normalization",
        "rollout_buffer_size",
        "train_batch_size",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "num_generations",
        "external_prompt_passthrough",
        "discount",
        "early_termination_threshold",
        "eval_interval",
        "eval_num_samples",
        "eval_batch_size",
        "logging_steps",
        "agent_model",
        "agents",
        "critic_model",
        "critics",
        "tokenizer",
        "model_config",
        "wandb_config",
        "seed",
        "task",
        "output_dir",
        "exp_name",
        "device",
        "dtype",
        "max_grad_norm",
        "micro_batch_size",
        "entropy_coef",
        "eval_only",
    ]
    own = {
        "maac": {"critic_value_head_hidden_dim"},
        "iac_separate": {"critic_value_head_hidden_dim"},
        "iac_shared": {"value_head_hidden_dim", "value_clip_range"},
    }
    for name in SCRIPTS:
        flags = {field.name for field in fields(importlib.import_module(name).Args)}
        assert {*everywhere, *own[name]} <= flags


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_else_stands_at_the_top():
    tracked = subprocess.run(
        ["git", "ls-files"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    files = {f"{name}.py" for name in FILES}
    known = files | {"tests", "README.md", "requirements.txt", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= known
