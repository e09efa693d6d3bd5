"""The shape of the project: sizes, what the scripts share to the byte, that every flag is read."""

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

# What they hold today: bounds to be lowered, never raised. The aims: 480, 790.
SCRIPT_LINES, COMMON_LINES = 497, 1058
FILES = {name: (ROOT / f"{name}.py").read_text() for name in (*SCRIPTS, "common")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
PAIRS = list(itertools.combinations(SCRIPTS, 2))
IMPORTED = {"torch", "transformers", "tyro", "numpy", "tqdm", "tokenizers", "common"}
WHERE_USED = {"wandb", "tensorboard", "matplotlib", "datasets", "peft"}
SHARED = """pad_batch distinct value_head warp draw_tokens generate act play collect
critic_values estimate_values td_targets advantages minibatches step evaluate"""
BOTH_WITH_CRITIC_MODELS = "sequence_logprobs update_critic update_actor"


def functions(tree):
    """Every function and method under a node."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def lines(node):
    return node.end_lineno - node.lineno + 1


# Sizes


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name):
    size = len(FILES[name].splitlines())
    assert size <= SCRIPT_LINES
    sizes = {function.name: lines(function) for function in functions(TREES[name])}
    assert sizes["train"] <= 80 and max(sizes.values()) <= 60, sizes


def test_common_is_short():
    size = len(FILES["common"].splitlines())
    assert size <= COMMON_LINES
    sizes = {function.name: lines(function) for function in functions(TREES["common"])}
    assert max(sizes.values()) <= 40, sizes
    classes = [node for node in TREES["common"].body if isinstance(node, ast.ClassDef)]
    sizes = {node.name: lines(node) for node in classes}
    assert max(sizes.values()) <= 200


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_few_helpers(name):
    """The names of common, of its run and of its learners apart, that it uses."""
    used = set(re.findall(r"\bcommon\.(\w+)", FILES[name]))
    for node in TREES[name].body:
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            used |= {alias.name for alias in node.names}
    assert len(used) <= 20, used


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_difference_of_two_scripts_can_be_read(pair):
    command = ["diff", *(str(ROOT / f"{name}.py") for name in pair)]
    shown = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", shown, re.MULTILINE)) <= 120


# What is shared


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_shared_blocks_are_the_same_to_the_byte(pair):
    one, other = map(importlib.import_module, pair)
    blocks = SHARED if "iac_shared" in pair else f"{SHARED} {BOTH_WITH_CRITIC_MODELS}"
    for block in blocks.split():
        sources = [inspect.getsource(getattr(module, block)) for module in (one, other)]
        assert sources[0] == sources[1], block


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_other_block_is_shared(pair):
    """SHARED names all that are the same, so that none begins to differ unseen."""
    named = set(f"{SHARED} {BOTH_WITH_CRITIC_MODELS}".split())
    found = [
        {function.name: ast.unparse(function) for function in functions(TREES[name])}
        for name in pair
    ]
    same = {name for name, code in found[0].items() if found[1].get(name) == code}
    assert same <= named


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_blocks_and_banners_stand_in_the_same_order(pair):
    orders = [[f.name for f in functions(TREES[name])] for name in pair]
    both = set(orders[0]) & set(orders[1])
    assert len(both) >= len(SHARED.split())
    orders = [[name for name in order if name in both] for order in orders]
    assert orders[0] == orders[1]
    banners = [re.findall(r"^# -+ (.+)$", FILES[name], re.MULTILINE) for name in pair]
    assert banners[0] == banners[1] and len(banners[0]) == 8


# Imports and flags


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    """Of whatever a file imports outside of its functions, and inside of them."""

    def roots(*trees):
        found = set()
        for node in itertools.chain(*map(ast.walk, trees)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        return found - set(sys.stdlib_module_names)

    inside = roots(*functions(TREES[name]))
    assert inside <= IMPORTED | WHERE_USED
    assert roots(TREES[name]) - inside <= IMPORTED - {name}
    top = [node for node in TREES[name].body if not isinstance(node, ast.FunctionDef)]
    top = [node for node in top if not isinstance(node, ast.ClassDef)]
    assert roots(*top) <= IMPORTED - {name}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name):
    """A flag is read where `args.flag`, `self.args.flag` or `flags["flag"]` stands in code."""
    module, read = importlib.import_module(name), set()
    for node in itertools.chain(*map(ast.walk, (TREES[name], TREES["common"]))):
        code = ast.unparse(node) if isinstance(node, ast.expr) else ""
        read |= set(re.findall(r"^(?:self\.)?args\.(\w+)$|^flags\['(\w+)'\]$", code))
    read = {flag for found in read for flag in found}
    flags = {field.name for field in fields(module.Args)}
    assert flags - read == set()
    classes = (module.Args, module.common.TaskArgs, module.common.RunArgs)
    source = "".join(map(inspect.getsource, classes))
    for flag in flags:
        assert re.search(rf"^    {flag}: .+\n    \"\"\"\S", source, re.MULTILINE), flag


PARAMETERS = """num_agents num_turns critic_type num_train_epochs agent_learning_rate
critic_learning_rate value_loss_coef advantage_normalization rollout_buffer_size
train_batch_size max_new_tokens temperature top_p top_k num_generations
external_prompt_passthrough discount early_termination_threshold eval_interval
eval_num_samples eval_batch_size logging_steps agent_model agents tokenizer model_config
wandb_config seed task train_file output_dir resume device dtype max_grad_norm
lora_rank gradient_checkpointing micro_batch_size entropy_coef save_interval log_samples"""
OWN = {
    "maac": "critic_model critics critic_value_head_hidden_dim",
    "iac_separate": "critic_model critics critic_value_head_hidden_dim",
    "iac_shared": "value_head_hidden_dim value_clip_range",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_are_the_parameters_of_the_reference_and_few_more(name):
    """No flag is new or gone without a thought."""
    flags = {field.name for field in fields(importlib.import_module(name).Args)}
    assert flags == set(f"{PARAMETERS} {OWN[name]}".split())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_else_stands_at_the_top():
    command = ["git", "ls-files"]
    tracked = subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    top = {path.split("/")[0] for path in tracked.stdout.decode().split()}
    known = {f"{name}.py" for name in FILES} | {"tests", "README.md", "LICENSE"}
    known |= {"requirements.txt"}
    assert {name for name in top if not name.startswith(".")} <= known
