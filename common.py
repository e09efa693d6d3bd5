"""Helpers of maac.py, iac_separate.py and iac_shared.py: flags of a run, tasks, models and
tokenizers, ranks, metrics, and the run's folder. The algorithms stand in the scripts."""

import copy
import ctypes
import inspect
import json
import math
import os
import random
import re
import reprlib
import runpy
import shlex
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# An update takes and frees gigabytes, again and again. On a CPU, most of the time of a forward
# pass can go into fetching their pages anew: take them in huge pages, and keep what is freed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # torch has the cores
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h; older glibc refuses the first
    _ = libc.mallopt(-3, 2**31 - 1) and libc.mallopt(-1, 2**31 - 1)

Prompt = str | list[dict[str, Any]]  # text, or chat messages with role and content
brief = reprlib.Repr()
brief.maxstring = brief.maxother = 150
shown = brief.repr  # a value, shortened for a message


# ----------------------------------------------------------------------- errors


class InputError(ValueError):
    """What a user gave cannot be used; the message is one sentence that says why."""


def require(condition: Any, sentence: str) -> None:
    """Raise InputError with `sentence` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


@contextmanager
def attempting(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn an exception inside into an InputError: `what`, why, and where in a user's file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, InputError):
            reason = f"{type(error).__name__}: {reason}"
            known = (__file__, sys.prefix, sys.base_prefix, "<")
            for frame in reversed(traceback.extract_tb(error.__traceback__)):
                if not frame.filename.startswith(known):
                    reason += f" at {frame.filename}, line {frame.lineno}"
                    break
        raise InputError(f"{what() if callable(what) else what}: {reason}") from error


def main(args_class: type, train: Callable) -> None:
    """Train with the command line's flags; an InputError is one sentence and exit status 2."""
    sys.stdout.reconfigure(errors="replace")  # a ? for what a terminal cannot show
    try:
        train(parse_args(args_class))
    except (InputError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------- flags of a run


@dataclass
class RunArgs:
    """Flags that prolong or log a run, and its devices: they may differ when it is resumed."""

    # the run

    output_dir: str = "runs"
    """Where the run folder is made; one that is resumed stays where it is."""
    resume: str | None = None
    """Run folder to go on in; on the command line, flags not given are that run's."""
    num_train_epochs: int = 20
    """Passes over the train dataset; 0 = evaluate the given agents and train nothing."""
    device: tuple[str, ...] = ("auto",)
    """cpu, cuda, ..., or several, which the learners take in turn; auto = cuda where it is."""
    save_interval: int = 50
    """Updates between checkpoints, and one at the end; 0 = only when a run is stopped or fails."""

    # evaluation and logging

    eval_interval: int = 5000
    """Items (training batches) between evaluations; 0 = before and after training."""
    eval_num_samples: int = 100
    """Items of an evaluation; 0 = no evaluations."""
    eval_batch_size: int = 100
    """Items generated at once in an evaluation."""
    logging_steps: int = 100
    """Items between lines of metrics.jsonl, each the mean since the line before."""
    log_samples: int = 2
    """Joint samples written to samples.jsonl at each update."""
    wandb_config: str | None = None
    """JSON keyword arguments of wandb.init, such as '{"project": "maac"}'; None = off."""


@dataclass
class TaskArgs(RunArgs):
    """And those of the task and the team."""

    # the task and the team

    seed: int = 1
    """Seed of the weights, of the order of the items and of the sampling."""
    task: str = "sum_to_target"
    """sum_to_target, or a .py file: tests/tasks/hidden_cards.py, or one of your own."""
    train_file: str | None = None
    """JSON lines, an item each, in place of the task's; the last tenth is for evaluation."""
    num_agents: int = 2
    """Agents in the team, at least 1."""
    agent_model: str = "tiny"
    """Model of every agent: tiny (built in), a folder, or a name on the hub."""
    agents: tuple[str, ...] = ()
    """One model per agent, where they differ; overrides agent_model."""
    tokenizer: str | None = None
    """Tokenizer of every model; None = each model's own."""
    model_config: str = "{}"
    """JSON keyword arguments of from_pretrained, or of the tiny model's LlamaConfig."""
    lora_rank: int | None = None
    """Rank of adapters over one frozen base per source, in dtype; None = all weights train."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    dtype: str = "float32"
    """Compute type: float32, or bfloat16 by autocast; what is trained is float32 always."""
    external_prompt_passthrough: bool = False
    """Use the transition's prompts as they are, not through the formatters."""


LIMITS = (  # flags, what they must be, whether a value is that
    ("""num_agents num_turns num_generations max_new_tokens top_k lora_rank rollout_buffer_size
        train_batch_size micro_batch_size value_head_hidden_dim critic_value_head_hidden_dim
        value_clip_range eval_batch_size logging_steps agent_learning_rate
        critic_learning_rate temperature""", "above 0", lambda v: 0 < v < math.inf),
    ("""num_train_epochs value_loss_coef entropy_coef max_grad_norm eval_interval save_interval
        log_samples eval_num_samples""", "at least 0", lambda v: 0 <= v < math.inf),
    ("top_p", "above 0 and at most 1", lambda v: 0 < v <= 1),
    ("discount", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("adam_beta2", "at least 0 and below 1", lambda v: 0 <= v < 1),
    ("early_termination_threshold", "a number", lambda v: not math.isnan(v)),
    ("seed", "from 0 to 2**31 - 1", lambda v: 0 <= v < 2**31),
    ("critic_type", "v or q", lambda v: v in ("v", "q")),
    ("dtype", "float32 or bfloat16", lambda v: v in ("float32", "bfloat16")),
)  # fmt: skip


def parse_args(args_class: type, arguments: Sequence[str] | None = None) -> Any:
    """The command line's flags, by tyro; under --resume, the run's flags are the defaults.
    Raises InputError if the run folder's args.json cannot be read."""
    args = tyro.cli(args_class, args=arguments)
    if args.resume is None:
        return args
    with attempting(f"{args.resume!r} is no run of this script"):
        saved = json.loads((Path(args.resume) / "args.json").read_text())
        own = Path(inspect.getfile(args_class)).name
        require(saved["script"] == own, f"it is one of {saved['script']}")
        flags = {field.name: saved[field.name] for field in fields(args_class)}
        flags = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
    return tyro.cli(args_class, args=arguments, default=args_class(**flags))


def json_object(text: str | dict, flag: str) -> dict[str, Any]:
    """The dict that a flag's JSON says, or is; InputError if it is anything else."""
    with attempting(f"{flag} takes a JSON object, got {text!r:.100}"):
        return {**(text if isinstance(text, dict) else json.loads(text))}


def setup(args: Any, task: "Task | None") -> "Task":
    """Check the flags, join the ranks, load the task: the given one, or that of the flags."""
    for names, limit, fits in LIMITS:
        for name in names.split():
            v = getattr(args, name, None)
            require(v is None or fits(v), f"{name} must be {limit}, got {v!r}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        gpu = torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    seeded(args, "task")  # items drawn at random are the same again, and on every rank
    return load_task(args, task)


def seeded(args: Any, *place: str | int) -> torch.Generator:
    """The run's own generator for what happens at `place`, such as ("update", 7, rank()): on
    the CPU, so that every device draws the same. Python, numpy and torch are seeded as well,
    for users' functions, which cannot touch the run's own."""
    number = random.Random(f"{args.seed} {place}").getrandbits(32)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number + 1)


# ------------------------------------------------------------------------ tasks


@dataclass
class Sample:
    """One turn of one episode: what N agents read and wrote, what the team was paid."""

    item: dict
    episode: int  # its number within one call of play
    turn: int
    prompts: list[Prompt]  # one per agent, as in the four lists below
    history: "list[Sample]" = field(default_factory=list)  # the episode's turns before
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)  # with the end token
    completions: list[str] = field(default_factory=list)  # without special tokens
    ended: list[bool] = field(default_factory=list)  # by an end-of-sequence token
    critic_ids: list[list[int]] = field(default_factory=list)  # what each critic reads
    reward: float = math.nan
    done: bool = False  # the episode's last turn
    cut: str = ""  # why there is no turn after it, where that could not be read


@dataclass
class Task:
    """A cooperative problem: the whole interface between a user and the algorithms. Its
    functions are given copies, so they cannot change what agents and critics read."""

    train_dataset: Sequence[dict]  # `prompt` is shown where there is no formatter
    # One list of texts per agent, the joint samples of ONE item -> one float per joint sample;
    # also given batch_items=[item], prompts, completion_ids (lists per agent), if it takes them
    reward_func: Callable[..., list[float]]
    eval_dataset: Sequence[dict] | None = None  # None or empty: no evaluation
    reward_processor: Callable[[float], float] | None = None  # applied to every reward
    # item -> prompt, one function for all agents or one each
    formatters: Callable[[dict], Prompt] | Sequence[Callable] | None = None
    # The next turn's prompts, one per agent, from the keywords prompt, agent_completions,
    # num_agents, prompt_history_per_agent, response_history_per_agent
    external_transition: Callable[..., Sequence[Prompt]] | None = None
    # Samples of an update or of an evaluation, of all ranks -> metrics of your own
    metrics_callback: Callable[[list[Sample]], dict[str, float]] | None = None
    name: str = "task"  # in messages and the run folder's name; --task sets it

    def calling(self, function: str, item: Any) -> AbstractContextManager:
        """Say, where a function of the user's fails, which it is, and of which item."""
        return attempting(lambda: f"task {self.name!r}, item {shown(item)}: {function}")

    def format(self, item: dict, agent: int) -> Prompt:
        """An agent's prompt for an item: the item's own, or its formatter's."""
        formatter = self.formatters
        if isinstance(formatter, Sequence):
            formatter = formatter[agent]
        own = formatter is None
        with self.calling(f"{'prompt' if own else 'formatter'} of agent {agent}", item):
            require(isinstance(item, dict), "an item must be a dict")
            item = copy.deepcopy(item)
            return checked_prompt(item.get("prompt") if own else formatter(item))

    def pay(self, samples: list[Sample]) -> list[float]:
        """The rewards of the joint samples of one item, a finite number each."""
        item = samples[0].item
        options = {"batch_items": [item]}
        for name in ("completions", "prompts", "completion_ids"):
            options[name] = per_agent([getattr(sample, name) for sample in samples])
        texts = options.pop("completions")
        with self.calling(f"{len(texts)} agents' reward_func", item):
            parameters = inspect.signature(self.reward_func).parameters.values()
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                taken = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
                options = {key: options[key] for key in taken & set(options)}
            rewards = self.reward_func(*texts, **copy.deepcopy(options))
            rewards = checked_numbers(rewards, len(samples))
        with self.calling("reward_processor", item):
            process = self.reward_processor or float
            return checked_numbers([process(x) for x in rewards], len(rewards))

    def transition(self, sample: Sample, passthrough: bool) -> list[Prompt]:
        """What the agents are prompted with at the turn after `sample`."""
        item, count, turns = sample.item, len(sample.prompts), [*sample.history, sample]
        keywords = {
            "prompt": item.get("prompt"),
            "agent_completions": sample.completions,
            "num_agents": count,
            "prompt_history_per_agent": per_agent([s.prompts for s in turns]),
            "response_history_per_agent": per_agent([s.completions for s in turns]),
        }
        with self.calling("external_transition", item):
            prompts = self.external_transition(**copy.deepcopy(keywords))
            fits = isinstance(prompts, list | tuple) and len(prompts) == count
            require(fits, f"expected {count} prompts, got {shown(prompts)}")
            prompts = [checked_prompt(prompt) for prompt in prompts]
        if passthrough:
            return prompts
        return [self.format({**item, "prompt": p}, k) for k, p in enumerate(prompts)]


def per_agent(rows: list[list]) -> list[list]:
    """From lists with one thing per agent, for each agent the list of its things."""
    return [list(column) for column in zip(*rows, strict=True)]


def checked_prompt(prompt: Any) -> Prompt:
    """A copy of the prompt; InputError unless it is text or a list of chat messages."""
    parts = prompt if isinstance(prompt, list) else []
    chat = [isinstance(x, dict) and {"role", "content"} <= x.keys() for x in parts]
    good = isinstance(prompt, str) or (chat and all(chat))
    require(good, f"expected a prompt, text or chat messages, got {shown(prompt)}")
    return copy.deepcopy(prompt)


def checked_numbers(values: Any, count: int) -> list[float]:
    """The values as floats; InputError unless they are a list of `count` finite numbers."""
    rows = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    good = isinstance(rows, list | tuple) and len(rows) == count
    if good:  # numbers of numpy, and tensors without a dimension, are numbers too
        rows = [row.item() if getattr(row, "shape", 0) == () else row for row in rows]
        good = all(isinstance(v, int | float) and math.isfinite(v) for v in rows)
    require(good, f"expected a list of {count} finite numbers, got {shown(values)}")
    return [float(value) for value in rows]


def sum_to_target(args: Any) -> Task:
    """Each agent writes a number, unseen by the others; together they should add up. A turn is
    paid 1 / (1 + |sum - target|), times the share of agents that wrote a number: 1 at best, 0.37
    for a team that does not read the target. Of several turns each costs 1, so that being right
    at once, which may end the episode, is never worse."""

    def numbers(texts: Sequence[str]) -> list[int | None]:
        found = [re.fullmatch(r"\s*([0-9]{1,9})\s*", text) for text in texts]
        return [int(match[1]) if match else None for match in found]

    def reward(*completions: list[str], batch_items: list[dict]) -> list[float]:
        rewards = []
        for texts in zip(*completions, strict=True):
            written = [number for number in numbers(texts) if number is not None]
            error = abs(sum(written) - batch_items[0]["target"])
            rewards.append(len(written) / len(texts) / (1 + error))
        return [x - 1 if args.num_turns > 1 else x for x in rewards]

    def correct(prompt: str, agent_completions: list[str], **_: Any) -> list[str]:
        written = numbers(agent_completions)
        total = sum(number or 0 for number in written)
        return [f"{prompt}yours {number}, sum {total}\n" for number in written]

    items = [{"prompt": f"target {n}\n", "target": n} for n in range(10)]
    return Task(items * 100, reward, items * 10, external_transition=correct)


def run_task_file(args: Any) -> Task:
    """The task that the file named by args.task defines; InputError if there is none."""
    path = Path(args.task)
    found = path.suffix == ".py" and path.is_file()
    require(found, f"no task {args.task!r}: give sum_to_target, or a .py file")
    with attempting(f"task file {args.task!r}"):
        sys.path.append(str(path.resolve().parent))  # it may import what is beside it
        names = runpy.run_path(str(path))
        make = names.get("make_task")
        task = make(copy.deepcopy(args)) if make else names.get("task")
        kinds = "it must define `task`, a common.Task, or `make_task(args)` that returns one"
        require(isinstance(task, Task), f"{kinds}, got {type(task).__name__}")
    return task


def load_task(args: Any, task: Task | None) -> Task:
    """The given task, or the one that args.task names, with the items of args.train_file.
    Raises InputError if there is none, or if it does not fit num_agents and num_turns."""
    if task is None:
        make = sum_to_target if args.task == "sum_to_target" else run_task_file
        task = replace(make(args), name=Path(args.task).stem)
    if args.train_file is not None:
        with attempting(f"train_file {args.train_file!r}"):
            text = Path(args.train_file).read_text("utf-8-sig").strip()
            text = re.sub(r"\n\s*", ",\n", text)
            items = json.loads(f"[{text}]")
        kept = len(items) * 9 // 10
        task = replace(task, train_dataset=items[:kept], eval_dataset=items[kept:])
    many, turns = isinstance(task.formatters, Sequence), args.num_turns
    with attempting(f"task {task.name!r} cannot be used"):
        require(len(task.train_dataset) > 0, "its train_dataset is empty")
        fits = not many or len(task.formatters) == args.num_agents
        require(fits, f"it needs one formatter for all, or {args.num_agents}")
        ready = turns == 1 or task.external_transition is not None
        require(ready, f"it has no external_transition, which num_turns {turns} needs")
        evaluates = task.eval_dataset is not None and len(task.eval_dataset) > 0
    return task if evaluates else replace(task, eval_dataset=[])


def pick_items(dataset: Sequence[dict], places: Sequence[int]) -> list[dict]:
    """This rank's share of the items at these places."""
    with attempting("a dataset's item cannot be read"):
        return [dataset[k] for k in places[rank() :: ranks()]]


# -------------------------------------------------------- models and tokenizers


class Learner(nn.Module):
    """An actor or a critic: a model and its value head (its state), its tokenizer, optimizer.
    Of a generation config only the end-of-sequence ids count."""

    def __init__(self, name: str, source: str, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self.model, self.value_head, self.optimizer = model, None, None
        self.base: tuple = ()  # the model whose frozen weights are shared; as a PeftModel
        self.told = False  # of the first turn that it could not read
        read = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self.read = lru_cache(1024)(read)  # texts come again: generations, epochs
        inner = self.read("a")
        whole = tokenizer("a").input_ids  # what begins a text, a, what would close it
        starts = [k for k in range(len(whole)) if whole[k : k + len(inner)] == inner]
        self.opening: list[int] = whole[: starts[0]] if starts else []
        end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        self.end_ids: list[int] = sorted(ends - {None})  # that end a completion
        rows = model.get_input_embeddings().num_embeddings
        ids = set(tokenizer.get_vocab().values())
        require(max(ids) < rows, f"it does not embed the tokenizer's id {max(ids)}")
        unknown = sorted(set(range(rows)) - ids)  # that are embedded, but no tokens
        self.unknown_ids = torch.tensor(unknown, dtype=torch.long, device=model.device)
        config = model.config.get_text_config()
        names = ("max_position_embeddings", "max_seq_len")
        sizes = [getattr(config, name, None) or sys.maxsize for name in names]
        self.context: int = min(sizes)  # tokens that the model takes

    def encode(self, sample: Sample, prompt: Prompt, room: int = 0) -> list[int]:
        """Token ids of a sample's prompt. Text is taken to the letter, with the special tokens
        that begin one, once; messages go through the chat template. What is empty, or leaves no
        `room` for an action's tokens, gives no ids at a later turn, at the first an InputError."""
        chat = self.tokenizer.chat_template is not None and not isinstance(prompt, str)
        with attempting(lambda: f"{self.name}'s tokenizer cannot read {shown(prompt)}"):
            options = {"tokenize": False, "add_generation_prompt": True}
            template = self.tokenizer.apply_chat_template
            text = template(prompt, **options) if chat else render(prompt)
            words = list(self.read(text))
        begun = chat or words[: len(self.opening)] == self.opening
        ids = words if begun else self.opening + words
        if words and len(ids) + room <= self.context:
            return ids
        why = f"{self.name} is to read {len(ids)} tokens, with room for {room} more: "
        why += f"its model takes {self.context}" if words else "its prompt is empty"
        require(sample.turn > 0, f"item {shown(sample.item)}: {why}")
        if not self.told:  # only of the first
            place = f"before turn {sample.turn} of item {shown(sample.item)}"
            print(f"\nan episode ends {place}: {why}", file=sys.stderr)
        sample.history[-1].cut, self.told = why, True
        return []

    def encode_action(self, ids: list[int], text: str, ended: bool) -> list[int]:
        """Token ids of a history, and behind it of an action; of one that takes more tokens here
        than where it was sampled, as many as the model takes."""
        text += (self.tokenizer.eos_token or "") if ended else ""
        return (ids + self.read(text))[: self.context]


def pick_device(args: Any, place: int) -> torch.device:
    """The torch device of the learner at `place`. Raises InputError if it cannot be used."""
    names = [args.device] if isinstance(args.device, str) else args.device
    require(names, "device must name one device or more")
    name = names[place % len(names)]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's: a GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with attempting(f"device {name!r} cannot be used"):
        found = torch.zeros(0, device=name).device
        require(found.type in ("cpu", "cuda"), "it is no cpu and no cuda")
    return found


def autocast(learner: Learner, args: Any) -> torch.autocast:
    """The context of a forward pass in args.dtype, with checkpoints where it has gradients."""
    for part in learner.model.modules() if args.gradient_checkpointing else ():
        if isinstance(part, transformers.modeling_layers.GradientCheckpointingLayer):
            part.training = torch.is_grad_enabled()  # not the model: it would not cache
    half = args.dtype == "bfloat16"
    return torch.autocast(learner.model.device.type, torch.bfloat16, enabled=half)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer over printable ASCII and the newline."""
    characters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {character: k for k, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TINY = {  # the built-in model: a Llama of 0.1 million parameters over those characters
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def load_model(source: str, auto_class: Any, options: dict) -> nn.Module:
    """A model in float32 without dropout. Raises InputError where weights are missing."""
    if source == "tiny":
        model = auto_class.from_config(LlamaConfig(**{**TINY, **options}))
    else:
        options = {"dtype": torch.float32, "output_loading_info": True, **options}
        model, loaded = auto_class.from_pretrained(source, **options)
        missing = ", ".join(sorted(loaded["missing_keys"]))[:100]
        require(not missing, f"as {auto_class.__name__} it lacks the weights {missing}")
    require(model.dtype == torch.float32, "its weights must be float32: see --dtype")
    for part in (model.config, model.config.get_text_config(), *model.modules()):
        for key, value in list(vars(part).items()):
            rate = "drop" in key or (key == "p" and isinstance(part, nn.Dropout))
            if rate and isinstance(value, float):
                setattr(part, key, 0.0)
    return model.eval()


def lower_precision(model: nn.Module, args: Any) -> None:
    """Put matrices that adapters leave alone in args.dtype; scores are float32 always."""
    for weight in model.parameters() if args.lora_rank is not None else ():
        if weight.dim() > 1:  # no norm, which autocast does not cast, and no buffer
            weight.data = weight.data.to(getattr(torch, args.dtype))
    head = model.get_output_embeddings()
    if args.dtype == "bfloat16" and head is not None:
        product = torch.autocast(model.device.type, enabled=False)(head.float().forward)
        # a slice that is not contiguous would be B products, of B copies of the weight
        head.forward = lambda hidden: product(hidden.float().contiguous())


def adapted(base: nn.Module, rank: int) -> Any:
    """A PeftModel over the very weights of `base`, which are frozen, with low-rank adapters of
    its own, in float32, on all linear layers but the head: W + 2BA (LoRA, arXiv 2106.09685), B = 0
    at first. Raises InputError where peft would adapt what is no layer, as some experts."""
    with attempting("lora_rank needs peft: pip install peft"):
        from peft import LoraConfig, get_peft_model
    model = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(model, config)
    experts = any(hasattr(layer, "parameter_name") for layer in model.modules())
    require(not experts, "lora_rank cannot adapt its experts, which are no layers")
    return model


@torch.no_grad()
def probe(learner: Learner, writes: bool) -> None:
    """Raise InputError for a model that does not read a text in a left-padded batch as it reads
    it alone; for one that writes, also with a cache."""
    model, known = learner.model, sorted(learner.tokenizer.get_vocab().values())
    ids = torch.tensor([(known * 12)[-12:]] * 2, device=model.device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    alone = model(input_ids=ids[1:, 5:])[0][0, -1]
    keep = {"logits_to_keep": ids.new_tensor([11])} if writes else {}
    output = model(**inputs, **keep, use_cache=False, output_hidden_states=True)
    width = model.config.get_text_config().hidden_size
    rows = model.get_input_embeddings().num_embeddings
    seen = (output[0], output.hidden_states[-1]) if writes else (output[0],)
    shapes = [tuple(x.shape) for x in seen]
    sizes = [(2, 1, rows), (2, 12, width)] if writes else [(2, 12, width)]
    require(shapes == sizes, f"output, last hidden state: {shapes}, not {sizes}")
    found = [output[0][1, -1]]
    if writes:  # all but the last token, and then that one
        require(model.base_model is not model, "it names no base_model")
        first = model(**{k: x[:, :11] for k, x in inputs.items()}, use_cache=True)
        first.cache.reorder_cache(ids.new_tensor([1]))  # the second row goes on alone
        end = {k: x[1:, 11:] for k, x in inputs.items()} | {"attention_mask": mask[1:]}
        found.append(model(**end, cache=first.cache, use_cache=True)[0][0, -1])
    # a head may give some tokens -inf, or the least number that there is
    alone, *found = (x.masked_fill(x < -1e4, 0.0) for x in (alone, *found))
    same = all((x - alone).norm() < 1e-3 * alone.norm() for x in found)
    require(same, "it reads a text in a left-padded batch otherwise than alone")


def load_learners(
    role: str, auto_class: Any, names: Sequence[str], count: int, args: Any,
    others: Sequence[Learner] = (),
) -> list[Learner]:  # fmt: skip
    """The actors (role "agent") or the critics ("critic"), without optimizers or value heads
    yet. Adapters share a base, with `others` too. Raises InputError for what cannot be used."""
    require(len(names) == count, f"{role}s lists {len(names)}, expected {count}")
    options, learners = json_object(args.model_config, "model_config"), []
    hub = {key: options[key] for key in {"revision", "token"} & set(options)}
    hub["trust_remote_code"] = options.pop("trust_remote_code", False)  # None would ask
    for k, source in enumerate(names):
        reader = args.tokenizer or source
        with attempting(f"tokenizer {reader!r} cannot be used"):
            make = AutoTokenizer.from_pretrained
            tokenizer = tiny_tokenizer() if reader == "tiny" else make(reader, **hub)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            require(tokenizer.pad_token, "it has neither a pad nor an end token")
        place = k if role == "agent" else args.num_agents + k
        seeded(args, "weights", place)
        with attempting(f"model {source!r} cannot be used"):
            loads = options if source == "tiny" else options | hub
            device = pick_device(args, place)
            bases = [x for x in (*others, *learners) if x.base and x.source == source]
            shared = [x.base[0] for x in bases if x.base[0].device == device]
            model = shared[0] if shared else load_model(source, auto_class, loads)
            model = model.to(device) if role == "agent" else model.to(device).base_model
            learner = Learner(f"{role}_{k}", source, model, tokenizer)
            learners.append(learner)
            if not shared:  # in float32, where rounding hides nothing
                probe(learner, writes=role == "agent")
                lower_precision(model, args)
            if args.lora_rank is not None:
                learner.base = model, adapted(model, args.lora_rank)
                learner.model = learner.base[1].get_base_model()
            if args.gradient_checkpointing:
                learner.model.activation_checkpointing_enable()
    return learners


def render(prompt: Prompt) -> str:
    """A prompt as text; of messages, the contents."""
    if isinstance(prompt, str):
        return prompt
    contents = [message["content"] or "" for message in prompt]
    for k, content in enumerate(contents):
        if isinstance(content, list):  # of parts: {"type": "text", "text": "Hi"}
            contents[k] = "".join(part.get("text", "") for part in content)
    return "\n".join(map(str, contents))


def save_agent(agent: Learner, folder: Path) -> None:
    """Write an agent as a folder that from_pretrained takes: W + 2BA, where it has adapters, and
    these as peft has them, in adapter/."""
    with attempting(f"{str(folder)!r} cannot be written"):
        model = agent.model
        if agent.base:
            (base, adapters), copies = agent.base, {}  # beside the device's memory
            for x in base.parameters():
                copies[id(x)] = nn.Parameter(x.to("cpu", torch.float32, copy=True))
            adapters = copy.deepcopy(adapters, copies).cpu()
            adapters.save_pretrained(folder / "adapter", save_embedding_layers=False)
            model = adapters.merge_and_unload()
        model.save_pretrained(folder)
        agent.tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------ ranks


def ranks() -> int:
    """How many processes train together, started by torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The place of this process among them; the one at 0 writes and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(mine: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks."""
    everyone = [mine] * ranks()
    if ranks() > 1:
        with attempting(f"rank {rank()} is without the others, one of which says why"):
            dist.all_gather_object(everyone, mine)
    return everyone


def total(*numbers: float) -> list[float]:
    """Each number's sum over the ranks."""
    return [sum(column) for column in zip(*gather(numbers), strict=True)]


def sum_gradients(learner: Learner) -> None:
    """Add up a learner's gradients over the ranks, in place; one without samples adds zeros."""
    weights = [x for x in learner.parameters() if x.requires_grad and ranks() > 1]
    with attempting(f"rank {rank()} is without the others, one of which says why"):
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)


def slices(count: int, size: int | None) -> list[slice]:
    """0..count in pieces of `size`; None = one piece."""
    step = size or max(count, 1)
    return [slice(start, start + step) for start in range(0, count, step)]


# --------------------------------------------------------- metrics and pictures


def critic_metrics(
    critic: Learner, samples: list[Sample], values: Tensor, targets: Tensor, args: Any
) -> dict[str, float]:
    """What a critic was worth to an update, over all ranks' samples; values, targets: (B,).
    Explained variance is 1 - Var(G - V) / Var(G), with G the discounted return to the end of the
    episode: 1 if the critic foresees it, 0 if it says a constant. Advantages are not whitened."""
    returns = np.zeros(len(samples) + 1)
    for k, sample in reversed(list(enumerate(samples))):
        returns[k] = sample.reward + args.discount * returns[k + 1] * (not sample.done)
    weights = targets - values if args.critic_type == "v" else values
    everyones = gather(torch.stack([values, torch.tensor(returns[:-1]), weights]))
    values, returns, weights = torch.cat(everyones, dim=1)
    found = {"value_mean": values.mean(), "advantage_std": weights.std(correction=0)}
    spread = returns.var(correction=0)
    if spread > 0:
        found["explained_variance"] = 1 - (returns - values).var(correction=0) / spread
    return {f"critic/{name}/{critic.name}": v.item() for name, v in found.items()}


def rollout_metrics(
    task: Task, samples: list[Sample], prefix: str, args: Any
) -> dict[str, float]:
    """Means over the samples or the episodes of what the team was paid and wrote."""
    rewards = np.array([sample.reward for sample in samples])
    done = np.array([sample.done for sample in samples])
    metrics = {"reward": rewards.mean(), "final_reward": rewards[done].mean()}
    metrics |= {"return": rewards.sum() / done.sum(), "turns": len(done) / done.sum()}
    if args.num_turns > 1:
        turns = np.array([sample.turn for sample in samples])
        for turn in range(turns.max() + 1):
            metrics[f"turn_{turn}/reward"] = rewards[turns == turn].mean()
        metrics["unreadable"] = sum(bool(s.cut) for s in samples) / done.sum()
    for agent in range(args.num_agents):
        lengths = [len(sample.completion_ids[agent]) for sample in samples]
        metrics[f"completion_tokens/agent_{agent}"] = np.mean(lengths)
        metrics[f"ended/agent_{agent}"] = np.mean([s.ended[agent] for s in samples])
    if task.metrics_callback is not None:
        with attempting(f"task {task.name!r}: metrics_callback"):
            own = task.metrics_callback(copy.deepcopy(samples))
            metrics = {str(name): float(x) for name, x in own.items()} | metrics
    return {f"{prefix}/{k}": float(x) for k, x in metrics.items() if math.isfinite(x)}


def dialogue(sample: Sample) -> str:
    """A joint sample to read."""
    lines = [] if sample.done and sample.turn == 0 else [f"turn {sample.turn}"]
    for agent, prompt in enumerate(sample.prompts):
        lines += [f"agent {agent} reads:", render(prompt).rstrip()]
        lines += [f"agent {agent} writes:", sample.completions[agent]]
    return "\n".join([*lines, f"reward {sample.reward:.3f}"])


PANELS = {  # of curves.png: title -> metrics
    "return of an episode": "(rollout|eval)/return",
    "losses": "losses/(policy|value)_loss",
    "explained variance of the returns": "critic/explained_variance/.*",
    "entropy (nats per token)": "losses/entropy/.*",
    "norm of the gradients": "losses/(actor|critic)_grad_norm",
    "completion length (tokens)": "rollout/completion_tokens/.*",
}


def draw_curves(folder: Path) -> None:
    """Draw a run's metrics.jsonl as curves.png beside it, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curves.png needs matplotlib: pip install matplotlib")
        return
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    keys = dict.fromkeys(key for line in lines for key in line)
    figure = Figure(figsize=(16, 7), layout="constrained")
    for axes, (title, pattern) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for key in filter(re.compile(pattern).fullmatch, keys):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), ".-", markersize=3, label=key)
            axes.legend(fontsize="small")
        if title.startswith("explained"):  # far below 0 where returns hardly vary
            axes.set_ylim(bottom=max(-1.0, axes.get_ylim()[0]))
        axes.set(title=title, xlabel="items")
        values = {y for line in axes.lines for y in line.get_ydata()}
        axes.set_visible(len(values) > 1 or len(lines) == 1)  # a flat line says nothing
    figure.savefig(folder / "curves.png", dpi=100)


class Logs:
    """What a run tells: metrics.jsonl, samples.jsonl, TensorBoard and W&B. Rank 0 writes."""

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, folder: Path, sizes: list[int], flags: dict, step: int):
        self.folder, self.start = folder, time.perf_counter()
        self.tensorboard = self.wandb = None
        for name, size in zip(self.FILES if rank() == 0 else (), sizes):
            with open(folder / name, "ab") as file:
                require(file.tell() >= size, f"{folder / name} is damaged")
                file.truncate(size)  # what came after the checkpoint comes again
        if flags["wandb_config"] is not None and rank() == 0:
            options = {"id": folder.name, "name": folder.name, "resume": "allow"}
            options |= {"sync_tensorboard": True, "config": flags}
            options |= json_object(flags["wandb_config"], "wandb_config")
            with attempting("wandb_config needs wandb and tensorboard, and a login"):
                import wandb
                from tensorboard import __version__  # noqa: F401 - W&B is told through it

                self.wandb = wandb.init(**options)
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            if rank() == 0:
                self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append a line of JSON to a file of the run folder."""
        if rank() == 0:
            with attempting(f"a line of {name} cannot be written"):
                text = json.dumps(line, default=str, skipkeys=True)
                line = json.loads(text, parse_constant=str)  # NaN is no JSON
                with open(self.folder / name, "a") as file:
                    file.write(json.dumps(line) + "\n")

    def metrics(self, metrics: dict[str, float], step: int, update: int) -> None:
        """Write a line of metrics, with their means over agents and over critics."""
        teams: dict[str, list[float]] = {}  # name/agent_0, name/agent_1, ... as name
        for key, value in metrics.items():
            teams.setdefault(re.sub(r"/(agent|critic)_\d+$", "", key), []).append(value)
        means = {name: float(np.mean(values)) for name, values in teams.items()}
        line = {"step": step, "update": update, **means, **metrics}
        line["time/seconds"] = time.perf_counter() - self.start
        self.write("metrics.jsonl", line)
        for name, value in line.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)

    def samples(self, samples: list[Sample], step: int, phase: str) -> None:
        """Write joint samples."""
        keys = ("turn", "item", "prompts", "completions", "reward")
        for sample in samples:
            line = {key: getattr(sample, key) for key in keys}
            self.write("samples.jsonl", {"step": step, "phase": phase, **line})

    def close(self, failed: bool) -> None:
        """End TensorBoard and W&B."""
        with suppress(OSError):  # on a full disk
            if self.tensorboard is not None:
                self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


# ---------------------------------------------------------------------- the run


class Run:
    """A run's folder, progress and checkpoint; a context manager. All ranks count alike, for
    each is told what the others did."""

    COUNTS = ("items", "updates", "evaluated", "logged", "pending", "sizes")

    def __init__(self, args: Any, task: Task, script: str, learners: list[Learner]):
        self.args, self.task, self.learners = args, task, learners
        self.total_items = args.num_train_epochs * len(task.train_dataset)
        self.items = self.updates = self.stop = 0  # stop: the signal that asked for it
        self.evaluated, self.logged = -1, 0  # items at the last evaluation, and line
        self.pending: dict[str, list[float]] = {}  # metrics since the last line
        self.sizes = [0] * len(Logs.FILES)  # at the checkpoint
        self.shown: list[Sample] = []
        self.whole = True  # False within an update: half of one is never saved
        flags = {"script": Path(script).name, "ranks": ranks(), **asdict(args)}
        flags |= {"task_name": task.name, "train_items": len(task.train_dataset)}
        flags["resume"] = None
        self.flags = json.loads(json.dumps(flags, default=str))  # as args.json has them
        same = gather(self.flags) == [self.flags] * ranks()
        require(same, f"task {task.name!r} has other items in every process")
        name = f"{Path(script).stem}__{task.name}__{args.seed}__"
        folder = Path(args.output_dir) / (name + time.strftime("%Y%m%d-%H%M%S"))
        while folder.exists():  # a second run within the second
            folder = folder.with_name(folder.name + "_")
        self.folder = gather(Path(args.resume or folder))[0]
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume:
            self.restore()

    def restore(self) -> None:
        """Take a run up where its checkpoint left it; one that was killed before its first
        begins anew. Raises InputError where this run differs from that one."""
        failure = f"{str(self.folder)!r} cannot be resumed"
        with attempting(failure):
            was = {**json.loads((self.folder / "args.json").read_text())}
        for name in sorted(self.flags.keys() - {flag.name for flag in fields(RunArgs)}):
            old, now = was.get(name), self.flags[name]
            require(old == now, f"{failure}: {name} was {old!r} and is {now!r}")
        if not self.checkpoint.exists():
            finished = (self.folder / self.learners[0].name).exists()
            require(not finished, f"{failure}: it is finished and has no checkpoint")
            return
        with attempting(f"checkpoint {str(self.checkpoint)!r} is damaged"):
            with zipfile.ZipFile(self.checkpoint) as file:
                require(file.testzip() is None, "a checksum is wrong")
            state = torch.load(self.checkpoint, "cpu", weights_only=True)
            for learner in self.learners:
                weights = learner.state_dict() | state["weights"][learner.name]
                learner.load_state_dict(weights)
                learner.optimizer.load_state_dict(state["optimizers"][learner.name])
        vars(self).update(state["counts"])
        fits = self.items <= self.total_items
        require(fits, f"{failure}: it has played {self.items} items already")

    def __enter__(self) -> Self:
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = self.folder / "args.unfinished"  # never a torn args.json
            aside.write_text(json.dumps(self.flags, indent=2) + "\n")
            aside.replace(self.folder / "args.json")
        self.logs = Logs(self.folder, self.sizes, self.flags, self.items)
        self.precision = torch.get_float32_matmul_precision()
        if self.args.dtype == "bfloat16":  # what it has in float32 may be rounded too
            torch.set_float32_matmul_precision("medium")
        gap = 0.1 if sys.stderr.isatty() else 30  # seconds between lines of the bar
        options = {"total": self.total_items, "initial": self.items, "unit": "item"}
        self.bar = tqdm(**options, mininterval=gap, maxinterval=gap, disable=rank() > 0)
        self.handlers = {}
        with suppress(ValueError):  # in another thread, which is sent no signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as in the background
                    self.handlers[number] = signal.signal(number, self.ask_to_stop)
        self.mark = time.perf_counter()  # when training began, or went on
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.bar.close()
        if isinstance(error, InputError):
            error.args = (f"{error} (rank {rank()}, after update {self.updates})",)
        if isinstance(error, Exception) and self.whole and self.updates > 0:
            with suppress(InputError):  # the error is what is to be read
                self.save_checkpoint()
        if rank() == 0 and error is None:
            for text in (*map(dialogue, self.shown), f"run folder: {self.folder}"):
                print(f"\n{text}")
        elif rank() == 0 and self.checkpoint.exists():
            count = os.environ.get("LOCAL_WORLD_SIZE")
            start = f"torchrun --nproc-per-node {count}" if count else "python"
            place = shlex.quote(str(self.folder))
            print(f"go on with: {start} {self.flags['script']} --resume {place}")
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.logs.close(failed=error is not None)
        torch.set_float32_matmul_precision(self.precision)

    def ask_to_stop(self, number: int, frame: object) -> None:
        """Handle a signal: stop once the update is done. If it comes a second time, stop at
        once; not a rank, which is asked by the terminal and by torchrun."""
        self.stop = number
        if ranks() == 1:
            signal.signal(number, self.handlers[number])
            os.write(2, b"\nstopping after this update; once more stops at once\n")

    def due(self, last: int, interval: int) -> bool:
        """Whether the run passed a multiple of `interval` items, or its end, since `last`."""
        step = interval or math.inf
        passed = last // step < self.items // step
        return last < self.items and (passed or self.items == self.total_items)

    def begin_update(self, samples: list[Sample]) -> None:
        """Measure the samples of all ranks. From here until the update is logged, nothing is
        saved: half an update never is."""
        self.samples = [sample for share in gather(samples) for sample in share]
        self.metrics = rollout_metrics(self.task, self.samples, "rollout", self.args)
        self.whole = False

    def log_update(self, losses: dict[str, float]) -> None:
        """Count the update's samples, write a line every logging_steps items, save if due."""
        samples, metrics = self.samples, self.metrics | losses
        self.items += sum(s.done for s in samples) // self.args.num_generations
        self.updates += 1
        rate = len(samples) / (time.perf_counter() - self.mark)
        for name, value in {**metrics, "time/samples_per_second": rate}.items():
            self.pending.setdefault(name, []).append(value)
        if self.due(self.logged, self.args.logging_steps):
            means = {name: float(np.mean(x)) for name, x in self.pending.items()}
            self.logs.metrics(means, self.items, self.updates)
            self.pending, self.logged = {}, self.items
        self.logs.samples(samples[: self.args.log_samples], self.items, "train")
        self.whole = True
        done = f"update {self.updates}, return {metrics['rollout/return']:.3f}"
        self.bar.set_postfix_str(f"{done}, {rate:.3g} samples/s", refresh=False)
        self.bar.update(self.items - self.bar.n)
        self.pause(due=self.updates % (self.args.save_interval or math.inf) == 0)

    def log_evaluation(self, samples: list[Sample]) -> None:
        """Write an evaluation's metrics and samples, if there are any."""
        samples = [sample for share in gather(samples) for sample in share]
        if samples:
            metrics = rollout_metrics(self.task, samples, "eval", self.args)
            self.whole = False
            self.logs.metrics(metrics, self.items, self.updates)
            self.logs.samples(samples[: self.args.log_samples], self.items, "eval")
            if rank() == 0:
                done = f"return {metrics['eval/return']:.3f}"
                tell = self.bar.write if sys.stderr.isatty() else print
                tell(f"evaluation after {self.items} items: {done}")
        self.evaluated, self.shown, self.whole = self.items, samples[:3], True
        self.pause(due=False)

    def pause(self, due: bool) -> None:
        """Save a checkpoint if it is due; save and exit if a signal asked a rank to stop."""
        stop = max(gather(self.stop))
        if due or stop:
            self.save_checkpoint()
            gather(None)  # no rank goes on, or ends, before the checkpoint is there
        if stop:
            raise SystemExit(128 + stop)
        self.mark = time.perf_counter()  # what came before was no training

    def save_checkpoint(self) -> None:
        """Write all that going on needs: aside, synced, renamed, so that the file is whole
        whenever the run is killed. Raises InputError where it cannot be written."""
        if rank() > 0:
            return
        aside = self.folder / "checkpoint.unfinished"
        with attempting(f"the checkpoint cannot be written to {str(self.folder)!r}"):
            self.sizes = [(self.folder / name).stat().st_size for name in Logs.FILES]
            counts = {name: getattr(self, name) for name in self.COUNTS}
            state = {"counts": counts, "weights": {}, "optimizers": {}}
            for learner in self.learners:  # without what is frozen
                every = learner.state_dict(keep_vars=True).items()
                trained = {name: x.detach() for name, x in every if x.requires_grad}
                state["weights"][learner.name] = trained
                state["optimizers"][learner.name] = learner.optimizer.state_dict()
            try:
                with open(aside, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(self.checkpoint)
            except RuntimeError as error:  # torch's zip writer hides what the disk said
                raise error.__context__ or error from None
            finally:
                aside.unlink(missing_ok=True)  # where the disk is full

    def save(self) -> None:
        """Write the last checkpoint, each agent as a folder, and curves.png."""
        if self.args.save_interval > 0:
            self.save_checkpoint()
        agents = [x for x in self.learners if x.name.startswith("agent")]
        for agent in agents if rank() == 0 else ():
            save_agent(agent, self.folder / agent.name)
        if rank() == 0:
            draw_curves(self.folder)
