"""Helpers of maac.py, iac_separate.py and iac_shared.py: everything but the algorithms.

Flags of a run, tasks, the calls of a user's functions, models and tokenizers, the run folder.
Generation, log-probabilities, values, advantages, losses and updates stand in the scripts.
"""

import ctypes
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# An update takes and frees gigabytes, again and again. On a CPU, most of the time of a forward
# pass can go into fetching their pages anew: take them in huge pages, and keep what is freed.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first tensor
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # torch has the cores
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h; older glibc refuses the first
    _ = libc.mallopt(-3, 2**31 - 1) and libc.mallopt(-1, 2**31 - 1)

HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")
Prompt = str | list[dict[str, str]]  # text, or chat messages with role and content


class InputError(ValueError):
    """What a user gave cannot be used; the message is one sentence that says why."""


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn an InputError into its sentence on standard error and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def require(condition: bool, sentence: str) -> None:
    """Raise InputError with `sentence` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Let an exception pass with its traceback and a line that says what raised it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        error.add_note(f"raised by {what}")
        raise


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn a failure to load something into an InputError of one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{what} cannot be loaded: {reason}") from error


# -------------------------------------------------------------------- arguments


@dataclass
class RunArgs:
    """The flags that are no algorithm's: task, models, evaluation, logging."""

    # the run

    exp_name: str | None = None
    """First part of the run folder's name; None = the script's name."""
    seed: int = 1
    """Seed of the weights, of the order of the items and of the sampling."""
    task: str = "sum_to_target"
    """sum_to_target, length_ratio, or a .py file with `task` or `make_task(args)`."""
    output_dir: str = "runs"
    """Where the run folder is made."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = cuda where there is one."""
    dtype: str = "float32"
    """Compute type: float32, or bfloat16 by autocast; weights are float32 always."""
    eval_only: bool = False
    """Evaluate the given agents and train nothing."""
    wandb_config: str | None = None
    """JSON keyword arguments of wandb.init, such as '{"project": "maac"}'; None = off."""

    # the models

    num_agents: int = 2
    """Agents in the team, at least 1."""
    agent_model: str = "tiny"
    """Model of every agent: tiny (built in), a folder, or a name on the hub."""
    agents: tuple[str, ...] = ()
    """One model per agent, where they differ; overrides agent_model."""
    critic_model: str | None = None
    """Model of every critic; None = its agent's, or the first agent's for maac.py."""
    critics: tuple[str, ...] = ()
    """One model per critic (one for maac.py); iac_shared.py refuses both flags."""
    tokenizer: str | None = None
    """Tokenizer of every model; None = each model's own."""
    model_config: str = "{}"
    """JSON keyword arguments of from_pretrained, or of the tiny model's LlamaConfig."""
    external_prompt_passthrough: bool = False
    """Use the transition's prompts as they are, not through the formatters."""

    # evaluation and logging

    eval_interval: int = 5000
    """Items (training batches) between evaluations; 0 = before and after training."""
    eval_num_samples: int = 100
    """Items of an evaluation."""
    eval_batch_size: int = 100
    """Items generated at once in an evaluation."""
    logging_steps: int = 100
    """Items between lines of metrics.jsonl, each the mean since the line before."""
    log_samples: int = 2
    """Joint samples written to samples.jsonl at each update."""


def check_args(args: Any) -> None:
    """Raise InputError for a flag out of its range, naming the flag and the range."""
    counts = (
        "num_agents num_turns num_generations num_train_epochs max_new_tokens top_k"
        " rollout_buffer_size train_batch_size micro_batch_size critic_value_head_hidden_dim"
        " value_head_hidden_dim eval_num_samples eval_batch_size logging_steps"
    )
    ranges: dict[str, tuple[str, Callable[[Any], bool]]] = {
        **dict.fromkeys(counts.split(), ("at least 1", lambda v: v >= 1)),
        "critic_type": ("v or q", lambda v: v in ("v", "q")),
        "dtype": ("float32 or bfloat16", lambda v: v in ("float32", "bfloat16")),
        "agent_learning_rate": ("above 0", lambda v: 0 < v < math.inf),
        "critic_learning_rate": ("above 0", lambda v: 0 < v < math.inf),
        "value_clip_range": ("above 0", lambda v: 0 < v < math.inf),
        "temperature": ("above 0", lambda v: 0 < v < math.inf),
        "top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1),
        "discount": ("from 0 to 1", lambda v: 0 <= v <= 1),
        "early_termination_threshold": ("a number", lambda v: not math.isnan(v)),
        "value_loss_coef": ("at least 0", lambda v: 0 <= v < math.inf),
        "entropy_coef": ("at least 0", lambda v: 0 <= v < math.inf),
        "max_grad_norm": ("at least 0", lambda v: 0 <= v < math.inf),
        "eval_interval": ("at least 0", lambda v: v >= 0),
        "log_samples": ("at least 0", lambda v: v >= 0),
        "seed": ("from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32),
    }
    for flag, (wanted, holds) in ranges.items():
        value = getattr(args, flag, None)
        require(
            value is None or holds(value), f"{flag} must be {wanted}, got {value!r}"
        )
    pick_device(args.device)
    options = json_object(args.model_config, "model_config")
    require(
        not {"dtype", "torch_dtype"} & set(options),
        "model_config cannot set a dtype: weights are float32, and --dtype sets the compute type",
    )
    if args.wandb_config is not None:
        json_object(args.wandb_config, "wandb_config")
        require(
            importlib.util.find_spec("wandb") is not None,
            "wandb_config needs the package wandb: pip install wandb",
        )


def json_object(text: str | dict, flag: str) -> dict[str, Any]:
    """The dict that a flag's JSON says, or is; InputError if it is anything else."""
    try:
        value = text if isinstance(text, dict) else json.loads(text)
    except (TypeError, json.JSONDecodeError):
        value = None
    require(isinstance(value, dict), f"{flag} takes a JSON object, got {text!r:.100}")
    return value


def model_names(args: Any) -> list[str]:
    """One model name per agent; InputError if `agents` has more or less."""
    names = list(args.agents) or [args.agent_model] * args.num_agents
    require(
        len(names) == args.num_agents,
        f"agents lists {len(names)} models for num_agents {args.num_agents}: give one each",
    )
    return names


def critic_names(args: Any, default: list[str]) -> list[str]:
    """One critic name for each of `default`; InputError if `critics` has more or less."""
    names = list(args.critics) or [args.critic_model or name for name in default]
    require(
        len(names) == len(default),
        f"critics lists {len(names)} models, and this script has {len(default)}: give one each",
    )
    return names


def refuse_critics(args: Any) -> None:
    """Raise InputError where a critic model is given to shared actors."""
    require(
        args.critic_model is None and not args.critics,
        "iac_shared.py takes no critic_model or critics: its critics are value heads on the"
        " actors' own backbones; use iac_separate.py or maac.py for critic models",
    )


# ----------------------------------------------------------- learners and samples


@dataclass
class Learner:
    """An actor or a critic, and the tokenizer it reads with."""

    name: str
    source: str  # what it was loaded from
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer | None = None
    value_head: torch.nn.Module | None = None
    seconds: Counter[str] = field(default_factory=Counter)  # by phase, see timed

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an actor's completion."""
        return self.model.generation_config.eos_token_id


def timed(phase: str) -> Callable[[Callable], Callable]:
    """Decorator: adds a call's time to `seconds[phase]` of the learner it is given first."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed_function(learner: Learner, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(learner, *args, **kwargs)
            learner.seconds[phase] += time.perf_counter() - start
            return result

        return timed_function

    return decorate


@dataclass
class Sample:
    """One turn of one episode: what N agents read and wrote, what the team was paid."""

    item: dict
    episode: int
    turn: int
    prompts: list[Prompt]  # one per agent, as in the four lists below
    previous: "Sample | None" = None  # the episode's turn before
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)  # with the end token
    completions: list[str] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # by an end-of-sequence token
    reward: float = math.nan
    done: bool = False  # the episode's last turn

    def add(self, actor: Learner, prompt: list[int], completion: list[int]) -> None:
        """Take what the next agent read and wrote."""
        ended = completion[-1] in actor.end_ids
        ids = completion[:-1] if ended else completion
        self.prompt_ids.append(prompt)
        self.completion_ids.append(completion)
        self.completions.append(actor.tokenizer.decode(ids, skip_special_tokens=True))
        self.ended.append(ended)

    def actions(self, critic: Learner) -> list[str]:
        """The completions as a critic reads them, their ends marked."""
        end = critic.tokenizer.eos_token or ""
        pairs = zip(self.completions, self.ended, strict=True)
        return [text + (end if ended else "") for text, ended in pairs]


# ------------------------------------------------------------------------ tasks


@dataclass
class Task:
    """A cooperative problem: the whole interface between a user and the algorithms."""

    train_dataset: Sequence[dict]
    """Items; an item's `prompt` is what an agent without a formatter is shown."""
    reward_func: Callable[..., list[float]]
    """One list of texts per agent (the joint samples of ONE item) -> one float per joint
    sample. Given the keywords batch_items=[item] and prompts=[one list per agent], if taken."""
    eval_dataset: Sequence[dict] | None = None
    """Items of the evaluation; None = no evaluation."""
    reward_processor: Callable[[float], float] | None = None
    """Applied to every reward."""
    formatters: Callable[[dict], Prompt] | Sequence[Callable[[dict], Prompt]] | None = (
        None
    )
    """item -> prompt: one for all agents, or one for each."""
    external_transition: Callable[..., Sequence[Prompt]] | None = None
    """Next prompts, one per agent, from the keywords prompt, agent_completions, num_agents,
    prompt_history_per_agent, response_history_per_agent; num_turns > 1 needs it."""
    metrics_callback: Callable[[list[Sample]], dict[str, float]] | None = None
    """Samples of an update or of an evaluation -> metrics of your own."""
    name: str = "task"
    """What messages and the run folder call it; --task sets it."""

    @functools.cached_property
    def reward_keywords(self) -> set[str] | None:
        """The names that reward_func takes as keywords; None = any."""
        parameters = inspect.signature(self.reward_func).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        return {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}


def sum_to_target(args: Any) -> Task:
    """Each agent writes a number, unseen by the others; together they should add up.

    A turn is paid 1 / (1 + |sum - target|), times the share of agents that wrote a number: 1 at
    best, 0.37 for a team that does not read the target. Where there are several turns each
    costs 1, so that being right at once, which may end the episode, is never worse.
    """
    cost = 0.0 if args.num_turns == 1 else 1.0

    def number(text: str) -> int | None:
        return int(text) if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else None

    def reward(*completions: list[str], batch_items: list[dict]) -> list[float]:
        rewards = []
        for texts in zip(*completions, strict=True):
            numbers = [number(text) for text in texts]
            error = abs(sum(n or 0 for n in numbers) - batch_items[0]["target"])
            readable = sum(n is not None for n in numbers) / len(numbers)
            rewards.append(readable / (1 + error) - cost)
        return rewards

    def correct(prompt: str, agent_completions: list[str], **_: Any) -> list[str]:
        numbers = [number(text) for text in agent_completions]
        total = sum(n or 0 for n in numbers)
        return [f"{prompt}yours {n}, sum {total}\n" for n in numbers]

    items = [{"prompt": f"target {n}\n", "target": n} for n in range(10)]
    return Task(items * 100, reward, items * 10, external_transition=correct)


TOPICS = """a lighthouse keeper, a lost dog, the first snow, a broken clock, a brave mouse,
an old ship, a secret garden, a talking tree, a rainy day, a stolen crown, a kind giant,
a tiny robot, a night train, a magic pencil, a hungry fox, a paper boat, a haunted house,
a wise owl, a desert road, a red balloon, a sleepy village, a silver key, a clumsy wizard,
a river crossing, a forgotten song, a mountain hut, a friendly ghost, a market day,
a shooting star, a stubborn donkey, an empty theatre, a long winter"""


def length_ratio(args: Any) -> Task:
    """Each agent writes a story, 2 to 3 times as long as that of the agent before it.

    The reward is the mean over neighbours of 1 within those bounds (in characters), falling
    linearly outside, to 0 at ratios 0 and 5; it is -1 if a text is empty.
    """

    def closeness(short: str, long: str) -> float:
        ratio = len(long) / len(short)
        return max(0.0, min(1.0, ratio / 2, (5 - ratio) / 2))

    def reward(*completions: list[str]) -> list[float]:
        return [
            float(np.mean([closeness(*pair) for pair in pairwise(texts)]))
            if all(text.strip() for text in texts)
            else -1.0
            for texts in zip(*completions, strict=True)
        ]

    def ask(item: dict) -> Prompt:
        request = f"Write a story about {item['prompt']} in one or two sentences."
        return [{"role": "user", "content": request}]

    require(
        args.num_agents > 1,
        "task length_ratio compares agents: num_agents must be 2 or more",
    )
    items = [{"prompt": " ".join(topic.split())} for topic in TOPICS.split(",")]
    return Task(items, reward, items, formatters=ask)


TASKS = {"sum_to_target": sum_to_target, "length_ratio": length_ratio}


def load_task(args: Any, task: Task | None) -> Task:
    """The given task, or the one that args.task names; checked against args.

    Raises InputError if there is none, or if it does not fit num_agents and num_turns.
    """
    if task is None:
        task = TASKS[args.task](args) if args.task in TASKS else load_task_file(args)
        task.name = Path(args.task).stem
    name = f"task {task.name!r}"
    require(callable(task.reward_func), f"{name} has no callable reward_func")
    for field_name in ("train_dataset", "eval_dataset"):
        dataset = getattr(task, field_name)
        optional = field_name == "eval_dataset" and not args.eval_only
        require(optional or dataset is not None, f"{name} has no {field_name}")
        sized = dataset is None or hasattr(dataset, "__len__")
        require(
            sized, f"{name}: {field_name} must be a list or a dataset with a length"
        )
        require(
            dataset is None or len(dataset) > 0, f"{name} has an empty {field_name}"
        )
    if isinstance(task.formatters, Sequence):
        require(
            len(task.formatters) == args.num_agents,
            f"{name} has {len(task.formatters)} formatters for {args.num_agents} agents:"
            " give one callable, or one per agent",
        )
    require(
        args.num_turns == 1 or task.external_transition is not None,
        f"{name} has no external_transition, which num_turns {args.num_turns} needs",
    )
    return task


def load_task_file(args: Any) -> Task:
    """The task that the file args.task defines; InputError if it defines none."""
    path = Path(args.task)
    known = ", ".join(TASKS)
    require(
        path.suffix == ".py", f"unknown task {args.task!r}: give {known}, or a .py file"
    )
    require(path.is_file(), f"task file {args.task!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"task_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with naming(f"task file {args.task!r}"):
        spec.loader.exec_module(module)
        make = getattr(module, "make_task", None)
        task = make(args) if make else getattr(module, "task", None)
    require(
        isinstance(task, Task),
        f"task file {args.task!r} must define `task` (a common.Task) or `make_task(args)` that"
        f" returns one, got {type(task).__name__}",
    )
    return task


# ---------------------------------------------------- calls of a user's functions


def format_prompt(task: Task, item: dict, agent: int) -> Prompt:
    """An agent's prompt for an item.

    Raises InputError for an item without a prompt, and for what is neither text nor messages.
    """
    several = isinstance(task.formatters, Sequence)
    formatter = task.formatters[agent] if several else task.formatters
    who = f"task {task.name!r}, item {item!r:.200}"
    require(isinstance(item, dict), f"{who}: an item must be a dict")
    if formatter is None:
        require(
            "prompt" in item,
            f"{who}: the item has no prompt, and there is no formatter",
        )
        return check_prompt(item["prompt"], who)
    who = f"{who}: formatter of agent {agent}"
    with naming(who):
        prompt = formatter(item)
    return check_prompt(prompt, who)


def check_prompt(prompt: Any, who: str) -> Prompt:
    """The prompt; InputError unless it is text or a list of chat messages."""
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt
    )
    require(
        isinstance(prompt, str) or (messages and len(prompt) > 0),
        f"{who}: expected a prompt, text or chat messages, got {prompt!r:.100}",
    )
    return prompt


def first_samples(
    task: Task, actors: Sequence[Learner], args: Any
) -> Iterator[list[Sample]]:
    """The first turns of all items, a thousand at a time, with empty completions.

    They show whether every prompt can be read before a run starts. Raises InputError for one
    that is missing, empty or too long for its actor.
    """
    for dataset in (task.train_dataset, task.eval_dataset or []):
        for part in slices(len(dataset), 1000):
            items = [dataset[k] for k in range(len(dataset))[part]]
            with fresh_randomness(args.seed):
                samples = first_turn(task, items, 1, args)
            for agent, actor in enumerate(actors):
                prompts = [sample.prompts[agent] for sample in samples]
                ids = encode(actor, prompts, room=args.max_new_tokens)
                for sample, prompt_ids in zip(samples, ids, strict=True):
                    sample.prompt_ids.append(prompt_ids)
                    sample.completion_ids.append([])
                    sample.completions.append("")
                    sample.ended.append(True)
            yield samples


def first_turn(
    task: Task, items: list[dict], generations: int, args: Any
) -> list[Sample]:
    """The samples that open `generations` episodes of each item, without completions yet."""
    samples = []
    for item in items:
        for _ in range(generations):
            prompts = [format_prompt(task, item, k) for k in range(args.num_agents)]
            samples.append(Sample(item, len(samples), 0, prompts))
    return samples


def end_turn(task: Task, samples: list[Sample], generations: int, args: Any) -> None:
    """Set rewards and ends of one turn of episodes, which stand in the order of their items.

    An episode ends at the turn limit, or with a reward over the threshold.
    """
    for _, joint in groupby(samples, key=lambda sample: sample.episode // generations):
        pay(task, list(joint))
    threshold = args.early_termination_threshold
    for sample in samples:
        early = threshold is not None and sample.reward > threshold
        sample.done = early or sample.turn + 1 == args.num_turns


def pay(task: Task, samples: list[Sample]) -> None:
    """Set the rewards of the joint samples of one item.

    Raises InputError unless the task returns as many finite numbers as there are samples.
    """
    item = samples[0].item
    completions = [list(texts) for texts in zip(*(s.completions for s in samples))]
    optional = {"batch_items": [item]}
    optional["prompts"] = [list(texts) for texts in zip(*(s.prompts for s in samples))]
    if task.reward_keywords is not None:
        optional = {k: optional[k] for k in optional.keys() & task.reward_keywords}
    who = f"task {task.name!r}, item {item!r:.200}: reward_func"
    with naming(who):
        rewards = task.reward_func(*completions, **optional)
    given = rewards
    if isinstance(rewards, torch.Tensor | np.ndarray):
        rewards = rewards.tolist()
    require(
        isinstance(rewards, list | tuple) and len(rewards) == len(samples),
        f"{who}: expected a list of {len(samples)} numbers, got {given!r:.100}",
    )
    check_numbers(rewards, who)
    if task.reward_processor is not None:
        who = f"task {task.name!r}, item {item!r:.200}: reward_processor"
        with naming(who):
            rewards = [task.reward_processor(reward) for reward in rewards]
        check_numbers(rewards, who)
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = float(reward)


def check_numbers(values: Sequence[Any], who: str) -> None:
    """Raise InputError unless all values are finite numbers."""
    numbers = [
        isinstance(v, int | float | np.number) and math.isfinite(v) for v in values
    ]
    require(all(numbers), f"{who}: expected finite numbers, got {values!r:.100}")


def next_turn(task: Task, samples: list[Sample], args: Any) -> list[Sample]:
    """The samples after those of the last turn whose episodes go on."""
    live = [sample for sample in samples if not sample.done]
    return [
        Sample(s.item, s.episode, s.turn + 1, next_prompts(task, s, args), s)
        for s in live
    ]


def next_prompts(task: Task, sample: Sample, args: Any) -> list[Prompt]:
    """The prompts of the turn after `sample`, by the task's transition.

    Raises InputError if it does not give one prompt per agent.
    """
    history = [sample]
    while history[0].previous is not None:
        history.insert(0, history[0].previous)
    agents = range(args.num_agents)
    who = f"task {task.name!r}, item {sample.item!r:.200}: external_transition"
    with naming(who):
        given = task.external_transition(
            prompt=sample.item.get("prompt"),
            agent_completions=list(sample.completions),
            num_agents=args.num_agents,
            prompt_history_per_agent=[[s.prompts[i] for s in history] for i in agents],
            response_history_per_agent=[
                [s.completions[i] for s in history] for i in agents
            ],
        )
    require(
        isinstance(given, list | tuple) and len(given) == args.num_agents,
        f"{who}: expected {args.num_agents} prompts, got {given!r:.100}",
    )
    prompts = [check_prompt(prompt, who) for prompt in given]
    if args.external_prompt_passthrough:
        return prompts
    return [
        format_prompt(task, {**sample.item, "prompt": prompts[agent]}, agent)
        for agent in agents
    ]


# ----------------------------------------------------------- models and tokenizers


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def fresh_randomness(seed: int) -> Iterator[None]:
    """Seed everything inside, and put every random state back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def pick_device(device: str) -> torch.device:
    """The torch device of that name; `auto` is the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(f"device {device!r}"):
        return torch.zeros(0, device=device).device


def autocast(args: Any) -> Any:
    """The context that computes in args.dtype."""
    if args.dtype == "float32":
        return nullcontext()
    return torch.autocast(pick_device(args.device).type, torch.bfloat16)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A character-level tokenizer over printable ASCII and the newline."""
    characters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {character: k for k, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    """The built-in model: a Llama of 0.1 million parameters."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    }
    special = {"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaConfig(
        vocab_size=len(tiny_tokenizer()), **special, **{**sizes, **changes}
    )


def load_tokenizer(name: str, hub: dict) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of that name; its end token pads where it has no pad token.

    Raises InputError if it cannot be loaded, or has neither.
    """
    if name == "tiny":
        return tiny_tokenizer()
    with loading(f"tokenizer {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    if tokenizer.pad_token_id is None:
        require(
            tokenizer.eos_token_id is not None,
            f"tokenizer {name!r} has neither a pad nor an end-of-sequence token: give it one",
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    auto_class: Any, name: str, index: int, args: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A model in float32 without dropout, and its tokenizer.

    auto_class: AutoModelForCausalLM for an actor, AutoModel for a critic's backbone. Each
    index gives a tiny model weights of its own. Of a checkpoint's generation config only the
    end-of-sequence ids count. Raises InputError if it cannot be loaded.
    """
    options = json_object(args.model_config, "model_config")
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    tokenizer = load_tokenizer(args.tokenizer or name, hub)
    with loading(f"model {name!r}"), fresh_randomness(args.seed + 1000 * index):
        if name == "tiny":
            model = auto_class.from_config(tiny_config(**options))
        else:
            config, options = AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, **options
            )
            for key, value in config.to_dict().items():
                if "drop" in key and isinstance(value, float):
                    setattr(config, key, 0.0)
            options |= {"config": config, **hub, "dtype": torch.float32}
            model = auto_class.from_pretrained(name, **options)
    require(
        len(tokenizer) <= model.get_input_embeddings().num_embeddings,
        f"tokenizer {args.tokenizer or name!r} has more tokens than model {name!r} embeds",
    )
    if model.can_generate():
        end = model.generation_config.eos_token_id
        end_ids = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        model.generation_config = GenerationConfig(
            eos_token_id=sorted(end_ids - {None}), pad_token_id=tokenizer.pad_token_id
        )
    return model.to(pick_device(args.device)), tokenizer


def load_learners(
    role: str, auto_class: Any, names: list[str], args: Any
) -> list[Learner]:
    """The actors or the critics, without optimizers or value heads yet."""
    first = 0 if role == "agent" else args.num_agents
    return [
        Learner(f"{role}_{k}", name, *load_model(auto_class, name, first + k, args))
        for k, name in enumerate(names)
    ]


def restore_heads(critics: list[Learner], args: Any) -> None:
    """Load the value heads that a run saved in the folders that were given."""
    given = args.critics or args.critic_model or critics[0].name == "agent_0"
    for critic in critics if given and not args.eval_only else ():
        path = Path(critic.source) / "value_head.pt"
        if path.is_file():
            with loading(f"value head {str(path)!r} (of another hidden dimension?)"):
                weights = torch.load(path, map_location="cpu", weights_only=True)
                critic.value_head.load_state_dict(weights)


def encode(
    learner: Learner,
    prompts: list[Prompt],
    actions: list[str] | None = None,
    room: int = 0,
) -> list[list[int]]:
    """Token ids of each prompt, and of its action behind it, by the learner's tokenizer.

    Text is taken to the letter; messages go through the chat template, or become plain text
    where there is none. Raises InputError for an empty prompt, and for a text that leaves no
    `room` for new tokens in the model's positions.
    """
    tokenizer = learner.tokenizer
    ids: list[list[int]] = [[] for _ in prompts]
    chats = [is_chat(prompt, tokenizer) for prompt in prompts]
    for chat in set(chats):
        rows = [k for k, is_one in enumerate(chats) if is_one == chat]
        texts = [render(prompts[k], tokenizer if chat else None) for k in rows]
        encoded = tokenizer(texts, add_special_tokens=not chat).input_ids
        for row, row_ids in zip(rows, encoded, strict=True):
            ids[row] = row_ids
    require(all(ids), f"{learner.name} was given an empty prompt")
    if actions is not None:
        encoded = tokenizer(actions, add_special_tokens=False).input_ids
        ids = [prompt + action for prompt, action in zip(ids, encoded, strict=True)]
    limit = getattr(learner.model.config, "max_position_embeddings", None) or math.inf
    longest = max(map(len, ids))
    writes = f" and is to write {room}" if room else ""
    require(
        longest + room <= limit,
        f"{learner.name} is to read {longest} tokens{writes}: its model takes {limit} in all",
    )
    return ids


def is_chat(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether a chat template turns the prompt into text."""
    return not isinstance(prompt, str) and tokenizer.chat_template is not None


def render(prompt: Prompt, tokenizer: Any | None = None) -> str:
    """A prompt as text: by the tokenizer's chat template, or the contents alone."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        return "\n".join(message["content"] for message in prompt)
    return tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )


# ---------------------------------------------------------------- batches and runs


def slices(count: int, size: int | None) -> list[slice]:
    """0..count in pieces of `size`; None = one piece."""
    step = size or max(count, 1)
    return [slice(start, start + step) for start in range(0, count, step)]


def minibatches(samples: list[Sample], args: Any) -> list[list[int]]:
    """The places of a buffer's samples in random order, train_batch_size at a time.

    Within a minibatch they stand by length, so that micro-batches need little padding.
    """
    order = torch.randperm(len(samples)).tolist()
    lengths = [sum(map(len, s.prompt_ids + s.completion_ids)) for s in samples]
    parts = slices(len(order), args.train_batch_size)
    return [sorted(order[part], key=lengths.__getitem__) for part in parts]


def evaluation_batches(task: Task, args: Any) -> Iterator[list[dict]]:
    """The first eval_num_samples evaluation items, eval_batch_size at a time."""
    count = min(args.eval_num_samples, len(task.eval_dataset or []))
    for part in slices(count, args.eval_batch_size):
        yield [task.eval_dataset[k] for k in range(count)[part]]


def rollout_metrics(task: Task, samples: list[Sample], prefix: str) -> dict[str, float]:
    """Means over the samples or the episodes of what the team was paid and wrote."""
    rewards = [sample.reward for sample in samples]
    last_rewards = [sample.reward for sample in samples if sample.done]
    metrics = {
        "reward": np.mean(rewards),
        "final_reward": np.mean(last_rewards),
        "return": np.sum(rewards) / len(last_rewards),
        "turns": len(samples) / len(last_rewards),
    }
    for agent in range(len(samples[0].prompts)):
        lengths = [len(sample.completion_ids[agent]) for sample in samples]
        metrics[f"completion_tokens/agent_{agent}"] = np.mean(lengths)
        metrics[f"ended/agent_{agent}"] = np.mean([s.ended[agent] for s in samples])
    if task.metrics_callback is not None:
        with naming(f"task {task.name!r}: metrics_callback"):
            metrics |= task.metrics_callback(samples)
    return {f"{prefix}/{key}": float(value) for key, value in metrics.items()}


def with_team_means(metrics: dict[str, float]) -> dict[str, float]:
    """Before `name/agent_0`, `name/critic_0`, ... their mean as `name`."""
    teams: dict[str, list[float]] = {}
    for key, value in metrics.items():
        teams.setdefault(re.split("/(?:agent|critic)_", key)[0], []).append(value)
    return {name: float(np.mean(values)) for name, values in teams.items()} | metrics


class Run:
    """A run's folder, its loggers and its progress bar; a context manager."""

    def __init__(
        self, args: Any, task: Task, script: str, learners: list[Learner]
    ) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.exp_name or script}__{task.name}__{args.seed}__{stamp}"
        self.folder = Path(args.output_dir) / name
        while self.folder.exists():  # a second run within the second
            self.folder = self.folder.with_name(self.folder.name + "_")
        with loading(f"run folder {str(self.folder)!r}"):
            self.folder.mkdir(parents=True)
        (self.folder / "args.json").write_text(
            json.dumps(asdict(args), indent=2) + "\n"
        )
        self.args, self.task = args, task
        self.learners = {learner.name: learner for learner in learners}
        self.seconds: Counter[str] = Counter()  # by phase, since the last line
        self.epochs = 0 if args.eval_only else args.num_train_epochs
        self.total_items = self.epochs * len(task.train_dataset)
        self.items = self.items_before = self.updates = self.samples = 0
        self.pending: list[dict[str, float]] = []
        self.shown: list[Sample] = []
        self.tensorboard = self.wandb = None
        self.start = self.mark = time.perf_counter()
        self.train_seconds = 0.0

    def __enter__(self) -> Self:
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.folder))
        if self.args.wandb_config is not None:
            import wandb

            options = json_object(self.args.wandb_config, "wandb_config")
            options = {"name": self.folder.name, "config": asdict(self.args)} | options
            self.wandb = wandb.init(**options)
        self.bar = tqdm(
            total=self.total_items, unit="item", disable=self.args.eval_only
        )
        self.lap()  # what the loggers took to start is no training time
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))
        if error is None:
            for sample in self.shown[:3]:
                print(f"prompts {list(map(render, sample.prompts))}")
                print(f"  completions {sample.completions}  reward {sample.reward:.3f}")
            print(f"run folder: {self.folder}")

    def crossed(self, interval: int) -> bool:
        """Whether the last update passed a multiple of `interval` items, or was the last."""
        passed = interval > 0 and self.items_before // interval < self.items // interval
        return passed or self.items == self.total_items

    def evaluation_due(self) -> bool:
        """Whether to evaluate after the last update."""
        return self.crossed(self.args.eval_interval)

    def log_update(self, samples: list[Sample], losses: dict[str, float]) -> None:
        """Count an update's samples, and write a line every logging_steps items."""
        episodes = sum(sample.done for sample in samples)
        self.items_before = self.items
        self.items += episodes // self.args.num_generations
        self.samples += len(samples)
        self.updates += 1
        self.pending.append(rollout_metrics(self.task, samples, "rollout") | losses)
        self.log_samples(samples, "train")
        lap = self.lap()
        self.seconds.update(lap)
        self.train_seconds += lap.total()
        rate = self.samples / self.train_seconds
        if self.crossed(self.args.logging_steps):
            keys = dict.fromkeys(key for metrics in self.pending for key in metrics)
            means = {
                k: float(np.mean([m[k] for m in self.pending if k in m])) for k in keys
            }
            total = self.seconds.total()
            times = {f"time/{k}_share": s / total for k, s in self.seconds.items()}
            self.write(means | times | {"time/samples_per_second": rate})
            self.pending = []
            self.seconds.clear()
        self.bar.update(self.items - self.items_before)
        reward = sum(sample.reward for sample in samples) / episodes
        self.bar.set_postfix_str(
            f"update {self.updates}, reward {reward:.3f}, {rate:.3g} samples/s"
        )

    def log_evaluation(self, samples: list[Sample]) -> None:
        """Write an evaluation's metrics and samples, if there are any."""
        if samples:
            with fresh_randomness(self.args.seed):
                metrics = rollout_metrics(self.task, samples, "eval")
            self.write(metrics)
            self.log_samples(samples, "eval")
            self.shown = samples
            reward = metrics["eval/return"]
            self.bar.write(f"evaluation after {self.items} items: reward {reward:.3f}")
        self.lap()  # nor is this

    def lap(self) -> Counter[str]:
        """The seconds of each phase, and of the rest, since this was last asked."""
        seconds: Counter[str] = Counter()
        for learner in self.learners.values():
            seconds.update(learner.seconds)
            learner.seconds.clear()
        now = time.perf_counter()
        seconds["rest"] = now - self.mark - seconds.total()
        self.mark = now
        return seconds

    def log_samples(self, samples: list[Sample], phase: str) -> None:
        """Append the first log_samples joint samples to samples.jsonl."""
        with open(self.folder / "samples.jsonl", "a") as file:
            for s in samples[: self.args.log_samples]:
                line = {
                    "step": self.items,
                    "phase": phase,
                    "turn": s.turn,
                    "item": s.item,
                }
                line |= {
                    "prompts": s.prompts,
                    "completions": s.completions,
                    "reward": s.reward,
                }
                file.write(json.dumps(line, default=str) + "\n")

    def write(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, and tell the other loggers."""
        line = {"step": self.items, "update": self.updates} | with_team_means(metrics)
        line["time/seconds"] = time.perf_counter() - self.start
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name, value in line.items():
                self.tensorboard.add_scalar(name, value, self.items)
        if self.wandb is not None:
            self.wandb.log(line, step=self.items)

    def save(self) -> None:
        """Write each model as a Hugging Face folder, a value head as value_head.pt in it."""
        for name, learner in self.learners.items() if not self.args.eval_only else ():
            folder = self.folder / name
            learner.model.save_pretrained(folder)
            learner.tokenizer.save_pretrained(folder)
            if learner.value_head is not None:
                torch.save(learner.value_head.state_dict(), folder / "value_head.pt")
