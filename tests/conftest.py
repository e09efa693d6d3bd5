"""What the tests share: the three scripts, micro-models, tasks small enough to enumerate."""

import fcntl
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# two processes with two threads each fight for cores
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("maac", "iac_separate", "iac_shared")

import common

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Register the tests' marker."""
    config.addinivalue_line("markers", "slow: README's short command leaves it out")


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each of the three scripts in turn."""
    return importlib.import_module(request.param)


@pytest.fixture
def smollm2() -> Iterator[str]:
    """The folder of SmolLM2-135M-Instruct, for one test at a time: two could need 20 GB."""
    folder = os.environ.get("SMOLLM2", str(ROOT / ".cache" / "smollm2"))
    if not (Path(folder) / "model.safetensors").is_file():
        pytest.skip(f"no model in {folder}: python tests/smollm2.py {folder}")
    with open(Path(tempfile.gettempdir()) / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture
def comlrl() -> str:
    """The folder of an environment with the reference."""
    folder = os.environ.get("COMLRL", str(ROOT / ".cache" / "comlrl"))
    if not (Path(folder) / "bin" / "python").is_file():
        pytest.skip(f"no CoMLRL in {folder}: tests/benchmarks/speed.py installs it")
    return folder


def tiny_args(module: ModuleType, folder: Path, **changes: Any) -> Any:
    """Arguments of a run of a few updates in `folder`."""
    small = {"num_train_epochs": 1, "rollout_buffer_size": 8, "eval_num_samples": 4}
    small |= {"logging_steps": 8, "output_dir": str(folder), "device": "cpu"}
    return module.Args(**{**small, **changes})


def small_task(items: int = 16, **changes: Any) -> common.Task:
    """The default game with few items."""
    task = common.sum_to_target(SimpleNamespace(num_turns=1))
    few = task.train_dataset[:items]
    own = {"name": "sum_to_target", "train_dataset": few, "eval_dataset": few[:4]}
    return replace(task, **{**own, **changes})


def micro_config(family: str, vocabulary: int) -> Any:
    """A model of a few thousand parameters: pad 0, end of sequence 1."""
    fields = {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1}
    fields |= {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    fields["max_position_embeddings"] = 64
    return transformers.AutoConfig.for_model(family, **fields)


def save_model(
    folder: Path, family: str = "llama", generation: dict | None = None, **config: Any
) -> str:
    """A checkpoint of a random model with the built-in tokenizer: its folder."""
    tokenizer = common.tiny_tokenizer()
    settings = micro_config(family, len(tokenizer))
    settings.update(config)
    model = AutoModelForCausalLM.from_config(settings)
    options = generation or {"eos_token_id": 1}
    model.generation_config = transformers.GenerationConfig(**options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients of each step instead of taking it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.gradients: list[list[torch.Tensor | None]] = []

    def step(self) -> None:
        every = [p.grad for group in self.param_groups for p in group["params"]]
        self.gradients.append([None if g is None else g.clone() for g in every])


def micro_learner(
    module: ModuleType, family: str = "llama", vocabulary: int = 5, seed: int = 0,
    head: bool = False,
) -> common.Learner:  # fmt: skip
    """A float64 micro-model with sharp random weights, a Recorder, and a random float32 value
    head if asked. What the scripts make of it, scores and values, is float32."""
    torch.manual_seed(seed)
    headless = head and module.__name__ != "iac_shared"
    auto_class = AutoModel if headless else AutoModelForCausalLM
    model = auto_class.from_config(micro_config(family, vocabulary)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    words = {"<pad>": 0, "<eos>": 1} | {chr(95 + k): k for k in range(2, vocabulary)}
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    learner = common.Learner(f"agent_{seed}", "micro", model, tokenizer)
    learner.end_ids = [1]
    if head or module.__name__ == "iac_shared":
        learner.value_head = module.value_head(learner, None)
        torch.nn.init.normal_(learner.value_head[0].weight)
    learner.optimizer = Recorder(learner.parameters())
    return learner


def sample(
    prompts: list, completions: list, reward: float = 0.0, **more: Any
) -> common.Sample:
    """A last-turn sample from token ids, one list per agent each."""
    texts = ["".join(map(chr, ids)) for ids in completions]
    ended = [ids[-1:] == [1] for ids in completions]
    fields = {"prompt_ids": prompts, "completion_ids": completions, "ended": ended}
    fields |= {"completions": texts, "episode": 0, "turn": 0, "done": True, **more}
    return common.Sample({}, prompts=[""] * len(prompts), reward=reward, **fields)


def update_actor(
    module: ModuleType, actor: common.Learner, samples: list, agent: int,
    weights: torch.Tensor, args: Any,
) -> dict[str, float]:  # fmt: skip
    """The shipped update_actor, with the critic's part of iac_shared.py switched off."""
    if module.__name__ != "iac_shared":
        return module.update_actor(actor, samples, agent, weights, args)
    args, zeros = replace(args, value_loss_coef=0.0), torch.zeros_like(weights)
    return module.update_actor(actor, samples, agent, weights, zeros, zeros, args)


def logprobs_of(
    module: ModuleType, actor: common.Learner, prompts: list, completions: list, args: Any
) -> torch.Tensor:  # fmt: skip
    """The shipped log π(a|h), without gradient."""
    with torch.no_grad():
        return module.sequence_logprobs(actor, prompts, completions, args)[0]


def assert_same_gradients(one: list, other: list) -> None:
    """Two lists of gradients differ by less than 1e-5 of their norm: float32 scores are off by
    6e-8 of themselves, and a few hundred such errors would have to add up."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    norm = torch.stack([a.norm() for a, _ in pairs]).norm()
    assert norm > 1e-3 and difference < 1e-5 * norm
