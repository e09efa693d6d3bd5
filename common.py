"""Helpers of maac.py, iac_separate.py and iac_shared.py: flags of a run, tasks, models, several
processes, the run folder and its checkpoints. The algorithms stand in the scripts."""

import ctypes
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
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

Prompt = str | list[dict[str, str]]  # text, or chat messages with role and content


class InputError(ValueError):
    """What a user gave cannot be used; the message is one sentence that says why."""


def require(condition: Any, sentence: str) -> None:
    """Raise InputError with `sentence` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


@contextmanager
def attempting(what: str, of_user: bool = False) -> Iterator[None]:
    """Turn an exception inside into an InputError: `what`, and the reason. Of a user's code
    (of_user) the sentence says what it raised, and where, or what is wrong with its result."""
    try:
        yield
    except InputError as error:
        if not of_user:
            raise
        raise InputError(f"{what}: {error}") from error
    except Exception as error:
        kind, reason = type(error).__name__, str(error).strip().split("\n")[0]
        if not of_user:
            raise InputError(f"{what}: {reason or kind}") from error
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if not f.filename.startswith((__file__, "<frozen"))]
        where = f" at {theirs[0].filename}, line {theirs[0].lineno}" if theirs else ""
        raise InputError(f"{what} raised {kind}: {reason}{where}") from error


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn an InputError into its sentence on standard error and exit status 2."""
    try:
        yield
    except InputError as error:
        off_the_bar = "\n" if ranks() > 1 else ""  # which is another rank's
        print(f"{off_the_bar}error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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
    """sum_to_target, a file of tests/tasks by its name, or a .py file of your own."""
    train_file: str | None = None
    """JSON lines, an item each, in place of the task's; the last tenth is for evaluation."""
    num_train_epochs: int = 20
    """Passes over the train dataset."""
    output_dir: str = "runs"
    """Where the run folder is made."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = cuda where there is one; under torchrun a GPU each."""
    agent_devices: tuple[str, ...] = ()
    """One device for all agents, or one for each; () = device."""
    critic_devices: tuple[str, ...] = ()
    """The same for critics; () = the agents'. iac_shared.py refuses it."""
    dtype: str = "float32"
    """Compute type: float32, or bfloat16 by autocast; weights are float32 always."""
    eval_only: bool = False
    """Evaluate the given agents and train nothing."""
    wandb_config: str | None = None
    """JSON keyword arguments of wandb.init, such as '{"project": "maac"}'; None = off."""
    save_interval: int = 50
    """Updates between checkpoints, and one at the end; 0 = only when a signal stops the run."""
    resume: str | None = None
    """Run folder to go on in; on the command line, flags not given are that run's."""

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


# Flags that may differ when a run is resumed: they prolong it, log it or place it, or name a
# file, whose content counts.
FREE_FLAGS = (
    "num_train_epochs", "save_interval", "resume", "eval_interval", "eval_num_samples",
    "eval_batch_size", "logging_steps", "log_samples", "wandb_config", "exp_name", "output_dir",
    "device", "agent_devices", "critic_devices", "task", "train_file",
)  # fmt: skip
LIMITS = (  # flags, what they must be, whether a value is that
    ("""num_agents num_turns num_generations num_train_epochs max_new_tokens top_k
        rollout_buffer_size train_batch_size micro_batch_size value_head_hidden_dim
        critic_value_head_hidden_dim eval_num_samples eval_batch_size logging_steps""",
     "at least 1", lambda v: v >= 1),
    ("agent_learning_rate critic_learning_rate value_clip_range temperature",
     "above 0", lambda v: 0 < v < math.inf),
    ("""value_loss_coef entropy_coef max_grad_norm eval_interval save_interval
        log_samples""", "at least 0", lambda v: 0 <= v < math.inf),
    ("top_p", "above 0 and at most 1", lambda v: 0 < v <= 1),
    ("discount", "from 0 to 1", lambda v: 0 <= v <= 1),
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
        flags = {field.name: saved[field.name] for field in fields(args_class)}
        flags = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()}
        run = args_class(**flags)
    return tyro.cli(args_class, args=arguments, default=run)


def check_args(args: Any) -> None:
    """Raise InputError for a flag that cannot be used, or not beside another."""
    for flags, wanted, fits in LIMITS:
        for flag in flags.split():
            value = getattr(args, flag, None)
            good = value is None or fits(value)
            require(good, f"{flag} must be {wanted}, got {value!r}")
    pick_device(args.device)
    config = json_object(args.model_config, "model_config")
    halved = {"dtype", "torch_dtype"} & set(config)
    require(not halved, "model_config cannot set a dtype: --dtype is the compute type")
    both = args.resume is not None and args.eval_only
    require(not both, "resume goes on with training, and eval_only trains nothing")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        placed = args.agent_devices or args.critic_devices or ":" in args.device
        wanted = "--device cpu or cuda, without a number, and no agent_devices or critic_devices"
        require(not placed, f"under torchrun give {wanted}")
    if args.wandb_config is not None:
        json_object(args.wandb_config, "wandb_config")
        found = importlib.util.find_spec("wandb")
        require(found, "wandb_config needs the package wandb: pip install wandb")


def json_object(text: str | dict, flag: str) -> dict[str, Any]:
    """The dict that a flag's JSON says, or is; InputError if it is anything else."""
    with attempting(f"{flag} takes a JSON object, got {text!r:.100}"):
        return {**(text if isinstance(text, dict) else json.loads(text))}


def one_each(flag: str, given: Sequence[str], default: Sequence[str]) -> list[str]:
    """What a flag lists, or the default; InputError if it lists more or less."""
    names, count = list(given or default), len(default)
    require(len(names) == count, f"{flag} lists {len(names)}, expected {count}")
    return names


def model_names(args: Any) -> list[str]:
    """One model name per agent; InputError if `agents` has more or less."""
    return one_each("agents", args.agents, [args.agent_model] * args.num_agents)


def critic_names(args: Any, agents: list[str]) -> list[str]:
    """One critic name for each of `agents`; InputError if `critics` has more or less."""
    return one_each("critics", args.critics, [args.critic_model or x for x in agents])


def refuse_critics(args: Any) -> None:
    """Raise InputError where a critic model, or its device, is given to shared actors."""
    given = args.critic_model is not None or args.critics or args.critic_devices
    takes = "iac_shared.py takes no critic_model, critics or critic_devices"
    require(not given, f"{takes}: its critics are value heads on the actors themselves")


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

    def parts(self) -> dict[str, Any]:
        """What has a state: the model, its value head, their optimizer."""
        kinds = ("model", "value_head", "optimizer")
        parts = {f"{self.name}/{kind}": getattr(self, kind) for kind in kinds}
        return {name: part for name, part in parts.items() if part is not None}

    def parameters(self) -> list[torch.nn.Parameter]:
        """What its optimizer steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

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


def check_finite(
    learner: Learner, what: str, values: Tensor, texts: Sequence[list[int]]
) -> None:
    """Raise InputError for a value (B,) that is not finite, naming the text (B token lists)."""
    for place in (~values.isfinite()).nonzero().flatten().tolist()[:1]:
        text = learner.tokenizer.decode(texts[place])
        given = f"{learner.name}: {what} {values[place].item()} for {text!r:.200}"
        raise InputError(f"{given}; no weight has it yet, try a smaller learning rate")


@dataclass
class Sample:
    """One turn of one episode: what N agents read and wrote, what the team was paid."""

    item: dict
    episode: int
    turn: int
    prompts: list[Prompt]  # one per agent, as in the four lists below
    history: "list[Sample]" = field(default_factory=list)  # the episode's turns before
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)  # with the end token
    completions: list[str] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)  # by an end-of-sequence token
    reward: float = math.nan
    done: bool = False  # the episode's last turn

    def add(self, actor: Learner, prompt: list[int], completion: list[int]) -> None:
        """Take what the next agent read and wrote; where that is nothing, it has ended."""
        ended = all(token in actor.end_ids for token in completion[-1:])
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
    formatters: Callable[[dict], Prompt] | Sequence[Callable] | None = None
    """item -> prompt: one for all agents, or one for each."""
    external_transition: Callable[..., Sequence[Prompt]] | None = None
    """Next prompts, one per agent, from the keywords prompt, agent_completions, num_agents,
    prompt_history_per_agent, response_history_per_agent; num_turns > 1 needs it."""
    metrics_callback: Callable[[list[Sample]], dict[str, float]] | None = None
    """Samples of an update or of an evaluation, of all ranks -> metrics of your own."""
    name: str = "task"
    """What messages and the run folder call it; --task sets it."""
    file_hash: str | None = None  # of the task file that it was loaded from


def sum_to_target(args: Any) -> Task:
    """Each agent writes a number, unseen by the others; together they should add up.

    A turn is paid 1 / (1 + |sum - target|), times the share of agents that wrote a number: 1 at
    best, 0.37 for a team that does not read the target. Of several turns each costs 1, so that
    being right at once, which may end the episode, is never worse.
    """
    cost = 0.0 if args.num_turns == 1 else 1.0

    def numbers(texts: Sequence[str]) -> list[int | None]:
        found = [re.fullmatch(r"\s*[0-9]{1,9}\s*", text) for text in texts]
        return [int(match[0]) if match else None for match in found]

    def reward(*completions: list[str], batch_items: list[dict]) -> list[float]:
        rewards = []
        for written in map(numbers, zip(*completions, strict=True)):
            error = abs(sum(n or 0 for n in written) - batch_items[0]["target"])
            readable = sum(n is not None for n in written) / len(written)
            rewards.append(readable / (1 + error) - cost)
        return rewards

    def correct(prompt: str, agent_completions: list[str], **_: Any) -> list[str]:
        written = numbers(agent_completions)
        total = sum(n or 0 for n in written)
        return [f"{prompt}yours {n}, sum {total}\n" for n in written]

    items = [{"prompt": f"target {n}\n", "target": n} for n in range(10)]
    return Task(items * 100, reward, items * 10, external_transition=correct)


def run_task_file(args: Any) -> Task:
    """The task that the file named by args.task defines; InputError if there is none."""
    folder = Path(__file__).parent / "tests" / "tasks"
    named = Path(args.task).suffix != ".py"
    path = folder / f"{args.task}.py" if named else Path(args.task)
    known = ", ".join(["sum_to_target", *sorted(p.stem for p in folder.glob("*.py"))])
    require(path.is_file(), f"no task {args.task!r}: give {known}, or a .py file")
    with attempting(f"task file {str(path)!r}", of_user=True):
        spec = importlib.util.spec_from_file_location(f"task_file_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        file_hash = digest(path)
        spec.loader.exec_module(module)
        make = getattr(module, "make_task", None)
        task = make(args) if make else getattr(module, "task", None)
    wanted = "must define `task` (a common.Task) or `make_task(args)` that returns one"
    got = f"task file {str(path)!r} {wanted}, got {type(task).__name__}"
    require(isinstance(task, Task), got)
    task.file_hash = file_hash
    return task


def load_task(args: Any, task: Task | None) -> Task:
    """The given task, or the one that args.task names, with the items of args.train_file.
    Raises InputError if there is none, or if it does not fit num_agents and num_turns."""
    if task is None:
        with fresh_randomness(args.seed):  # items drawn at random are the same again
            built_in = args.task == "sum_to_target"
            task = sum_to_target(args) if built_in else run_task_file(args)
        task.name = Path(args.task).stem
    if args.train_file is not None:
        source = f"train_file {args.train_file!r}"
        with attempting(f"{source} cannot be read"):
            lines = Path(args.train_file).read_text("utf-8-sig").split("\n")
        items = []
        for number, line in enumerate(lines, start=1):
            with attempting(f"{source}, line {number}, is no JSON"):
                items += [json.loads(line)] if line.strip() else []
        texts = [x.get("prompt") if isinstance(x, dict) else None for x in items]
        good = len(items) > 1 and all(isinstance(t, str) and t.strip() for t in texts)
        wanted = "expected 2 items or more, each with a text as its prompt"
        require(good, f"{source}: {wanted}")
        kept = len(items) - math.ceil(len(items) / 10)
        task.train_dataset, task.eval_dataset = items[:kept], items[kept:]
    name, agents, turns = f"task {task.name!r}", args.num_agents, args.num_turns
    require(callable(task.reward_func), f"{name} has no callable reward_func")
    datasets = {"train_dataset": task.train_dataset, "eval_dataset": task.eval_dataset}
    if task.eval_dataset is None and not args.eval_only:
        del datasets["eval_dataset"]
    for key, dataset in datasets.items():
        good = hasattr(dataset, "__len__") and len(dataset) > 0
        wanted = "must be a list, or a dataset with a length, of one item or more"
        require(good, f"{name}: {key} {wanted}, got {dataset!r:.100}")
    if isinstance(task.formatters, Sequence):
        count = len(task.formatters)
        require(count == agents, f"{name}: formatters lists {count}, expected {agents}")
    ready = turns == 1 or task.external_transition is not None
    require(ready, f"{name} has no external_transition, which num_turns {turns} needs")
    return task


# ---------------------------------------------------- calls of a user's functions


def calling(task: Task, item: Any, function: str) -> AbstractContextManager:
    """Around a call of a task's function, and the checks of what it returned."""
    who = f"task {task.name!r}, item {item!r:.200}: {function}"
    return attempting(who, of_user=True)


def check_prompt(prompt: Any) -> Prompt:
    """The prompt; InputError unless it is text or a list of chat messages."""
    good = isinstance(prompt, str)
    if isinstance(prompt, list) and prompt:
        keys = {"role", "content"}
        good = all(isinstance(m, dict) and keys <= set(m) for m in prompt)
    require(good, f"expected a prompt, text or chat messages, got {prompt!r:.100}")
    return prompt


def check_numbers(values: Any, count: int) -> list[float]:
    """The values as floats; InputError unless they are a list of `count` finite numbers."""
    rows = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    good = isinstance(rows, list | tuple) and len(rows) == count
    types = int | float | np.number
    good = good and all(isinstance(v, types) and math.isfinite(v) for v in rows)
    require(good, f"expected a list of {count} finite numbers, got {values!r:.100}")
    return [float(value) for value in rows]


def format_prompt(task: Task, item: dict, agent: int) -> Prompt:
    """An agent's prompt for an item: the item's own, or its formatter's."""
    formatter = task.formatters
    if isinstance(formatter, Sequence):
        formatter = formatter[agent]
    own = formatter is None
    name = "without a formatter" if own else f"formatter of agent {agent}"
    with calling(task, item, name):
        require(isinstance(item, dict), "an item must be a dict")
        return check_prompt(item.get("prompt") if own else formatter(item))


def first_turn(task: Task, items: list, args: Any) -> list[Sample]:
    """The samples that open num_generations episodes of each item, without completions yet."""
    samples: list[Sample] = []
    for item in [item for item in items for _ in range(args.num_generations)]:
        prompts = [format_prompt(task, item, k) for k in range(args.num_agents)]
        samples.append(Sample(item, len(samples), 0, prompts))
    return samples


def first_samples(task: Task, actors: list[Learner], args: Any) -> Iterator[list]:
    """The first turns of all items, a thousand at a time, without completions, to see before a
    run that every prompt can be read. Raises InputError for one that cannot."""
    for dataset in (task.train_dataset, task.eval_dataset or []):
        for part in slices(len(dataset), 1000):
            with attempting(f"task {task.name!r}: a dataset", of_user=True):
                items = [dataset[k] for k in range(len(dataset))[part]]
            with fresh_randomness(args.seed):
                samples = first_turn(task, items, replace(args, num_generations=1))
            for agent, actor in enumerate(actors):
                prompts = [sample.prompts[agent] for sample in samples]
                ids = encode(actor, prompts, room=args.max_new_tokens)
                for sample, prompt_ids in zip(samples, ids, strict=True):
                    sample.add(actor, prompt_ids, [])
            yield samples


def per_agent(rows: Iterable[list]) -> list[list]:
    """From lists with one thing per agent, for each agent the list of its things."""
    return [list(column) for column in zip(*rows, strict=True)]


def pay(task: Task, samples: list[Sample]) -> None:
    """Set the rewards of the joint samples of one item, which the task must pay a number each."""
    item, count = samples[0].item, len(samples)
    with calling(task, item, "reward_func"):
        prompts = per_agent(sample.prompts for sample in samples)
        options = {"batch_items": [item], "prompts": prompts}
        parameters = inspect.signature(task.reward_func).parameters.values()
        taken = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            options = {key: options[key] for key in taken & set(options)}
        given = task.reward_func(*per_agent(s.completions for s in samples), **options)
        rewards = check_numbers(given, count)
    if task.reward_processor is not None:
        with calling(task, item, "reward_processor"):
            given = [task.reward_processor(reward) for reward in rewards]
            rewards = check_numbers(given, count)
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = reward


def end_turn(task: Task, samples: list[Sample], args: Any) -> None:
    """Pay a turn; an episode ends at the turn limit, or with a reward over the threshold."""
    for _, joint in groupby(samples, lambda s: s.episode // args.num_generations):
        pay(task, list(joint))
    threshold = args.early_termination_threshold
    for sample in samples:
        early = threshold is not None and sample.reward > threshold
        sample.done = early or sample.turn + 1 == args.num_turns


def next_turn(task: Task, samples: list[Sample], args: Any) -> list[Sample]:
    """The next samples of the episodes that go on, prompted by the task's transition."""
    following, count = [], args.num_agents
    for sample in (sample for sample in samples if not sample.done):
        item, history = sample.item, [*sample.history, sample]
        with calling(task, item, "external_transition"):
            prompts = task.external_transition(
                prompt=item.get("prompt"),
                agent_completions=list(sample.completions),
                num_agents=count,
                prompt_history_per_agent=per_agent(s.prompts for s in history),
                response_history_per_agent=per_agent(s.completions for s in history),
            )
            fits = isinstance(prompts, list | tuple) and len(prompts) == count
            require(fits, f"expected {count} prompts, got {prompts!r:.100}")
            prompts = [check_prompt(prompt) for prompt in prompts]
        if not args.external_prompt_passthrough:
            items = [{**item, "prompt": prompt} for prompt in prompts]
            prompts = [format_prompt(task, items[k], k) for k in range(count)]
        turn = sample.turn + 1
        following.append(Sample(item, sample.episode, turn, prompts, history))
    return following


# ----------------------------------------------------------- models and tokenizers


@contextmanager
def fresh_randomness(seed: int) -> Iterator[None]:
    """Seed everything inside, and put every random state back afterwards."""
    states = random_states()
    transformers.set_seed(seed)
    try:
        yield
    finally:
        set_random_states(states)


def random_states() -> dict[str, Any]:
    """Every random state of this process, in types that load without running code."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    states |= {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what random_states gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])


def pick_device(device: str) -> torch.device:
    """The torch device of that name; `auto` is a GPU, this process's own, where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with attempting(f"device {device!r} cannot be used"):
        found = torch.zeros(0, device=device).device
    require(found.type in ("cpu", "cuda"), f"device {device!r} is no cpu and no cuda")
    return found


def autocast(learner: Learner, args: Any) -> torch.autocast:
    """The context in which a learner's model computes in args.dtype."""
    device, on = learner.model.device.type, args.dtype == "bfloat16"
    return torch.autocast(device, torch.bfloat16, enabled=on)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A character-level tokenizer over printable ASCII and the newline."""
    characters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {character: k for k, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TINY = {  # the built-in model: a Llama of 0.1 million parameters over those characters
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def load_model(
    auto_class: Any, name: str, index: int, device: torch.device, args: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A model in float32 without dropout, and its tokenizer. Each index gives a tiny model its
    own weights. Of a checkpoint's generation config only the end-of-sequence ids count."""
    options = json_object(args.model_config, "model_config")
    reader = args.tokenizer or name
    hub = {"trust_remote_code": False}  # not None, which would ask on the terminal
    shared = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")
    hub |= {key: options[key] for key in shared if key in options}
    with attempting(f"tokenizer {reader!r} cannot be loaded"):
        if reader == "tiny":
            tokenizer = tiny_tokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(reader, **hub)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lacks = "has neither a pad nor an end-of-sequence token: give it one"
    require(tokenizer.pad_token is not None, f"tokenizer {reader!r} {lacks}")
    failure = f"model {name!r} cannot be loaded"
    with attempting(failure), fresh_randomness(args.seed + 1000 * index):
        if name == "tiny":
            config = LlamaConfig(**{**TINY, **options})
        else:
            options = {**options, **hub, "return_unused_kwargs": True}
            config, options = AutoConfig.from_pretrained(name, **options)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if name == "tiny":
            model, missing = auto_class.from_config(config), []
        else:
            options |= {"config": config, **hub, "dtype": torch.float32}
            options["output_loading_info"] = True
            model, loaded = auto_class.from_pretrained(name, **options)
            missing = sorted(loaded["missing_keys"])
    lacks = f"is no {auto_class.__name__}: its weights lack {', '.join(missing)[:100]}"
    require(not missing, f"model {name!r} {lacks}")
    needed = ["position_ids"] + ["cache"] * model.can_generate()
    takes = inspect.signature(model.forward).parameters
    lacks = f"takes no {' or no '.join(needed)}, which left-padded batches need"
    require(all(x in takes for x in needed), f"model {name!r} {lacks}")
    fits = len(tokenizer) <= model.get_input_embeddings().num_embeddings
    require(fits, f"tokenizer {reader!r} has more tokens than model {name!r} embeds")
    if model.can_generate():
        end, pad = model.generation_config.eos_token_id, tokenizer.pad_token_id
        ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        ends = sorted(ends - {None})
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return model.to(device), tokenizer


def load_learners(role: str, auto_class: Any, names: list, args: Any) -> list[Learner]:
    """The actors or the critics, without optimizers or value heads yet."""
    flag, first = f"{role}_devices", 0 if role == "agent" else args.num_agents
    given = getattr(args, flag) or args.agent_devices[: len(names)] or [args.device]
    devices = list(given) * (len(names) if len(given) == 1 else 1)
    learners = []
    for k, device in enumerate(map(pick_device, one_each(flag, devices, names))):
        loaded = load_model(auto_class, names[k], first + k, device, args)
        learners.append(Learner(f"{role}_{k}", names[k], *loaded))
    return learners


def restore_heads(critics: list[Learner], args: Any) -> None:
    """Load the value heads that a run saved in the folders that were given."""
    given = args.critics or args.critic_model or critics[0].name == "agent_0"
    for critic in critics if given and not args.eval_only else ():
        path = Path(critic.source) / "value_head.pt"
        if path.is_file():
            with attempting(f"value head {str(path)!r} cannot be loaded"):
                weights = torch.load(path, map_location="cpu", weights_only=True)
                critic.value_head.load_state_dict(weights)


def encode(
    learner: Learner, prompts: list[Prompt], actions: list | None = None, room: int = 0
) -> list[list[int]]:
    """Token ids of each prompt, and of its action behind it. Text is taken to the letter;
    messages go through the chat template, where there is one. Raises InputError for an empty
    prompt, and where the model's positions leave no `room` for as many new tokens."""
    tokenizer, ids = learner.tokenizer, []
    template = tokenizer.chat_template is not None
    options = {"tokenize": False, "add_generation_prompt": True}
    for chat, some in groupby(prompts, lambda p: template and not isinstance(p, str)):
        some = list(some)
        with attempting(f"{learner.name}'s tokenizer cannot read {some[0]!r:.200}"):
            if chat:
                texts = tokenizer.apply_chat_template(some, **options)
            else:
                texts = list(map(render, some))
            ids += tokenizer(texts, add_special_tokens=not chat).input_ids
    require(all(ids), f"{learner.name} was given an empty prompt")
    if actions:
        encoded = tokenizer(actions, add_special_tokens=False).input_ids
        ids = [prompt + action for prompt, action in zip(ids, encoded, strict=True)]
    config = learner.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    longest = max(map(len, ids), default=0)
    reads = f"{learner.name} is to read {longest} tokens and to write {room}"
    require(longest + room <= limit, f"{reads}: its model takes {limit} in all")
    return ids


def render(prompt: Prompt) -> str:
    """A prompt as text; of messages, the contents."""
    is_text = isinstance(prompt, str)
    return prompt if is_text else "\n".join(message["content"] for message in prompt)


# ------------------------------------------------------- the processes of torchrun


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The place of this process among them; the one at 0 writes and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_ranks() -> bool:
    """Join the processes that torchrun started, if it did; whether it was done here."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    joins = several and not dist.is_initialized()
    if joins:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with attempting("the processes of torchrun cannot be joined"):
            dist.init_process_group(backend)
    return joins


def with_others(collective: Callable, *args: Any) -> Any:
    """What a collective returns. It runs in a thread, so that a signal reaches this one while
    it waits for other ranks. Raises InputError where one of them has stopped."""
    failure = f"rank {rank()} is without the others, one of which says why"
    with attempting(failure), ThreadPoolExecutor(1) as pool:
        return pool.submit(collective, *args).result()


def gather(mine: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks."""
    everyone = [mine] * ranks()
    if ranks() > 1:
        with_others(dist.all_gather_object, everyone, mine)
    return everyone


def total(*numbers: float) -> list[float]:
    """Each number's sum over the ranks."""
    return [sum(column) for column in zip(*gather(numbers), strict=True)]


def optimizer_step(
    learner: Learner, sums: dict[str, float], texts: list, args: Any
) -> dict[str, float]:
    """Sum the gradients and these numbers over the ranks, clip, and step. Returns the sums and
    the gradient's norm before clipping; InputError where that, from `texts`, is not finite."""
    if ranks() > 1:
        tensors = [torch.tensor(list(sums.values()), device=learner.model.device)]
        for p in learner.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            tensors.append(p.grad)
        flat = parameters_to_vector(tensors)

        def reduce() -> list[float]:
            dist.all_reduce(flat)
            return flat[: len(sums)].tolist()  # waits for the device, too

        sums = dict(zip(sums, with_others(reduce), strict=True))
        vector_to_parameters(flat, tensors)
    limit = args.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), limit)
    what = f"gradient (of {len(texts)} texts, the first named)"
    check_finite(learner, what, norm.expand(max(len(texts), 1)), texts or [[]])
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    role = "critic" if learner.name.startswith("critic") else "actor"
    sums = {**sums, f"{role}_grad_norm": norm.item()}
    return {f"{name}/{learner.name}": value for name, value in sums.items()}


# -------------------------------------------------------------------- checkpoints


def digest(path: Path) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_checkpoint(folder: Path, update: int, state: dict) -> None:
    """Save `state` under a name that holds its SHA-256, and keep the one of the update before.
    It is written aside and renamed; where that fails, what was there before is unharmed."""
    aside = folder / "unfinished"
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"update_{update:08}_{digest(aside)}.pt"
        aside.replace(path)
    except Exception:
        aside.unlink(missing_ok=True)
        raise
    others = sorted(p for p in folder.glob("update_*.pt") if p != path)
    before = [other for other in others if other.name[:15] < path.name[:15]]
    for other in set(others) - set(before[-1:]):
        other.unlink()


def read_checkpoint(folder: Path) -> tuple[dict | None, list[Path]]:
    """The newest whole checkpoint, None where none was written yet, and the damaged ones
    before it, which are named on standard error. Raises InputError if all are damaged."""
    damaged: list[Path] = []
    for path in sorted(folder.glob("update_*.pt"), reverse=True):
        with suppress(OSError):
            if path.stem.endswith(digest(path)):
                with attempting(f"checkpoint {path} cannot be loaded"):
                    return torch.load(path, "cpu", weights_only=True), damaged
        damaged.append(path)
        if rank() == 0:
            print(f"checkpoint {path} is damaged and left out", file=sys.stderr)
    given = f"every checkpoint in {str(folder)!r} is damaged"
    require(not damaged, f"{given}: start a new run")
    return None, []


# ------------------------------------------------------------ batches and metrics


def slices(count: int, size: int | None) -> list[slice]:
    """0..count in pieces of `size`; None = one piece."""
    step = size or max(count, 1)
    return [slice(start, start + step) for start in range(0, count, step)]


def minibatches(samples: list[Sample], args: Any) -> list[tuple[list[int], float]]:
    """The places of a buffer's samples in random order, train_batch_size at a time, and each
    minibatch's share in the buffer, both counted over all ranks, which have as many each.
    Within one, samples stand by length, so that micro-batches need little padding."""
    order = torch.randperm(len(samples)).tolist()
    lengths = [sum(map(len, s.prompt_ids + s.completion_ids)) for s in samples]
    size = args.train_batch_size and math.ceil(args.train_batch_size / ranks())
    parts = slices(len(order), size)
    batches = [sorted(order[part], key=lengths.__getitem__) for part in parts]
    everyones = gather(list(map(len, batches)))
    sizes = [sum(column) for column in zip_longest(*everyones, fillvalue=0)]
    batches += [[]] * (len(sizes) - len(batches))
    return [(b, size / sum(sizes)) for b, size in zip(batches, sizes, strict=True)]


def evaluation_batches(task: Task, args: Any) -> Iterator[list[dict]]:
    """This rank's share of the first eval_num_samples items, eval_batch_size at a time."""
    size = len(task.eval_dataset or [])
    places = range(min(args.eval_num_samples, size))[rank() :: ranks()]
    for part in slices(len(places), args.eval_batch_size):
        yield [task.eval_dataset[k] for k in places[part]]


def diagnostics(
    critic: Learner, samples: list[Sample], values: Tensor, targets: Tensor, args: Any
) -> dict[str, float]:
    """What a critic was worth to an update, over all ranks' samples; values, targets: (B,).

    Explained variance is 1 - Var(G - V) / Var(G), with G the discounted return from the sample
    to the end of its episode: 1 for a critic that foresees it, 0 for one that says a constant.
    The advantages are those before whitening.
    """
    returns, future = torch.zeros(len(samples)), 0.0
    for place in reversed(range(len(samples))):
        sample = samples[place]
        future = sample.reward + args.discount * (0.0 if sample.done else future)
        returns[place] = future
    weights = targets - values if args.critic_type == "v" else values
    everyones = gather(torch.stack([values, returns, weights]).double())
    values, returns, weights = torch.cat(everyones, dim=1)
    found = {"value_mean": values.mean(), "advantage_std": weights.std(correction=0)}
    spread = returns.var(correction=0)
    if spread > 0:
        found["explained_variance"] = 1 - (returns - values).var(correction=0) / spread
    return {f"critic/{name}/{critic.name}": v.item() for name, v in found.items()}


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
        with attempting(f"task {task.name!r}: metrics_callback", of_user=True):
            own = task.metrics_callback(samples)
            metrics |= {key: float(value) for key, value in own.items()}
    return {f"{prefix}/{key}": float(value) for key, value in metrics.items()}


def dialogues(sample: Sample) -> list[str]:
    """What each agent read and wrote."""
    pairs = zip(sample.prompts, sample.completions, strict=True)
    return [f"{render(prompt).rstrip()}\n-> {text}" for prompt, text in pairs]


def side_by_side(sample: Sample) -> str:
    """A joint sample to read, a column per agent."""
    texts = dialogues(sample)
    width = max(16, shutil.get_terminal_size((100, 24)).columns // len(texts) - 3)
    columns = [[f"agent {agent}"] for agent in range(len(texts))]
    for column, text in zip(columns, texts, strict=True):
        for line in text.splitlines():
            column += textwrap.wrap(line, width) or [""]
    rows = zip_longest(*columns, fillvalue="")
    table = [" | ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]
    return "\n".join([*table, f"reward {sample.reward:.3f}"])


PANELS = {  # of curves.png: title -> metrics
    "return of an episode": "(rollout|eval)/return",
    "losses": "losses/(policy|value)_loss",
    "explained variance of the returns": "critic/explained_variance/.*",
    "completion length (tokens)": "rollout/completion_tokens/.*",
    "entropy (nats per token)": "losses/entropy/.*",
    "shares of the training time": "time/.*_share",
}


def draw_curves(folder: Path) -> None:
    """Draw a run's metrics.jsonl as curves.png beside it, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("curves.png needs matplotlib: pip install matplotlib")
        return
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    keys = dict.fromkeys(key for line in lines for key in line)
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True)
    for axes, (title, pattern) in panels:
        for key in filter(re.compile(pattern).fullmatch, keys):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), ".-", markersize=3, label=key)
        if axes.lines:
            axes.legend(fontsize="small")
        if title.startswith("explained"):  # far below 0 where returns hardly vary
            axes.set_ylim(bottom=max(-1.0, axes.get_ylim()[0]))
        axes.set(title=title, xlabel="items")
    figure.savefig(folder / "curves.png", dpi=100)
    print(f"curves: {folder / 'curves.png'}")


# -------------------------------------------------------------------------- a run


def identity(task: Task, script: str) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes, and every rank with all."""
    items = hashlib.sha256()
    with attempting(f"the items of task {task.name!r} cannot be hashed"):
        options = {"default": lambda x: str(type(x)), "skipkeys": True}
        for k in range(len(task.train_dataset)):  # odd objects count by their type
            items.update(json.dumps(task.train_dataset[k], **options).encode())
    return {
        "script": script,
        "number of ranks": ranks(),
        "task's name": task.name,
        "task file's hash": task.file_hash,
        "number of train items": len(task.train_dataset),
        "train items' hash": items.hexdigest()[:16],
    }


class Run:
    """A run's folder, progress, checkpoints and loggers; a context manager. All ranks count
    alike, for each is told what the others did; the one at 0 writes."""

    FILES = ("metrics.jsonl", "samples.jsonl")
    STATE = (  # in a checkpoint, beside the learners and the ranks' own states
        "items", "updates", "samples", "evaluated_items", "logged_items", "order", "pending",
        "train_seconds", "elapsed",
    )  # fmt: skip

    def __init__(self, args: Any, task: Task, script: str, learners: list[Learner]):
        self.joined = join_ranks()
        self.args, self.task, self.script = args, task, script
        self.learners = {learner.name: learner for learner in learners}
        self.parts = {k: v for x in learners for k, v in x.parts().items()}
        epochs = 0 if args.eval_only else args.num_train_epochs
        self.total_items = epochs * len(task.train_dataset)
        self.items = self.updates = self.samples = 0
        self.evaluated_items, self.logged_items = -1, 0  # at the last time
        self.order, self.taken = [], 0  # this epoch's items; how many this rank took
        self.pending: dict[str, list[float]] = {}  # metrics since the last line
        self.seconds: Counter[str] = Counter()  # by phase, since the last line
        self.train_seconds = self.elapsed = 0.0
        self.shown: list[Sample] = []
        self.tensorboard = self.wandb = None
        self.stop = 0  # the signal that asked for it
        if rank() > 0:
            transformers.set_seed(args.seed + 100_003 * rank())
        self.random = random_states()
        flags = asdict(args) | {"resume": None} | identity(task, script)
        self.flags = json.loads(json.dumps(flags, default=str))  # as args.json has them
        same = all(self.flags == other for other in gather(self.flags))
        differ = "has other items in every process: draw them from a seed"
        require(same, f"task {task.name!r} {differ}")
        name = f"{args.exp_name or script}__{task.name}__{args.seed}__"
        folder = Path(args.output_dir) / (name + time.strftime("%Y%m%d-%H%M%S"))
        if rank() == 0 and not args.resume:
            with attempting(f"run folder {str(folder)!r} cannot be made"):
                while folder.exists():  # a second run within the second
                    folder = folder.with_name(folder.name + "_")
                folder.mkdir(parents=True)
        self.folder = gather(Path(args.resume or folder))[0]
        self.sizes, self.damaged = dict.fromkeys(self.FILES, 0), []
        if args.resume:
            self.restore()

    def restore(self) -> None:
        """Take a run up where its newest checkpoint left it; one that was killed before its
        first begins anew. Raises InputError where this run differs from that one."""
        failure = f"{str(self.folder)!r} cannot be resumed"
        with attempting(failure):
            was = json.loads((self.folder / "args.json").read_text())
        changes = [
            f"{name} was {was.get(name)!r} and is {now!r}"
            for name, now in self.flags.items()
            if name not in FREE_FLAGS and was.get(name) != now
        ]
        require(not changes, f"{failure}: {', '.join(changes)}")
        state, self.damaged = read_checkpoint(self.folder / "checkpoint")
        if state is None:
            finished = (self.folder / next(iter(self.learners))).exists()
            require(not finished, f"{failure}: it is finished and has no checkpoint")
            return
        with attempting(failure):
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        vars(self).update(state["run"])
        self.sizes = state["sizes"]
        self.taken, self.random = state["ranks"][rank()]
        epochs, total = self.args.num_train_epochs, self.total_items
        few = f"it has played {self.items} items, and num_train_epochs {epochs} has {total}"
        require(self.items <= total, f"{failure}: {few}")
        if self.items == total and rank() == 0:
            print(f"{self.folder} is finished: a larger num_train_epochs goes on")

    def __enter__(self) -> Self:
        self.cleanup, self.handlers = ExitStack(), {}
        self.start = time.perf_counter() - self.elapsed
        if rank() == 0:
            failure = f"run folder {str(self.folder)!r} cannot be written, or is in use"
            with attempting(failure):
                self.open_folder()
            self.start_loggers()
        options = {"initial": self.items, "disable": self.args.eval_only or rank() > 0}
        bar = tqdm(unit="item", total=self.total_items, **options)
        self.bar = self.cleanup.enter_context(bar)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
        set_random_states(self.random)
        self.mark = time.perf_counter()  # what came before is no training time
        return self

    def open_folder(self) -> None:
        """Lock the folder, cut its files to what is resumed, and write args.json."""
        lock = self.cleanup.enter_context(open(self.folder / "lock", "w"))  # noqa: SIM115
        with suppress(ImportError):  # on Windows nothing is locked
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in self.damaged:
            path.unlink()
        for name in self.FILES:
            with open(self.folder / name, "ab") as file:
                shorter = file.tell() < self.sizes[name]
                require(not shorter, f"{name} is shorter than its checkpoint says")
                file.truncate(self.sizes[name])
        aside = self.folder / "args.unfinished"  # never a torn args.json
        aside.write_text(json.dumps(self.flags, indent=2) + "\n")
        aside.replace(self.folder / "args.json")

    def start_loggers(self) -> None:
        """Start TensorBoard, where it is installed, and W&B, where it is asked for."""
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder), purge_step=self.items + 1)
            self.tensorboard = self.cleanup.enter_context(writer)
        if self.args.wandb_config is not None:
            import wandb

            name = self.folder.name
            options = {"id": name, "name": name, "resume": "allow"}
            config = json_object(self.args.wandb_config, "wandb_config")
            self.wandb = wandb.init(**{**options, "config": self.flags, **config})

    def __exit__(self, kind: object, error: BaseException | None, trace: object):
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error is not None))
        with suppress(OSError):  # of TensorBoard, on a full disk
            self.cleanup.close()
        checkpoints = list(self.folder.glob("checkpoint/update_*.pt"))
        if isinstance(error, InputError):
            place = f", rank {rank()}" if ranks() > 1 else ""
            error.args = (f"{error} (after update {self.updates}{place})",)
        elif rank() == 0 and error is None:
            print(*(f"\n{side_by_side(sample)}" for sample in self.shown), sep="\n")
            print(f"\nrun folder: {self.folder}")
        elif rank() == 0 and checkpoints:
            command = f"train(replace(args, resume={str(self.folder)!r}), task)"
            if Path(sys.argv[0]).stem == self.script:
                here = os.environ.get("LOCAL_WORLD_SIZE", ranks())
                start = f"torchrun --nproc-per-node {here}" if ranks() > 1 else "python"
                resume = [sys.argv[0], "--resume", str(self.folder)]
                command = f"{start} {shlex.join(resume)}"
            print(f"go on with: {command}")
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.stop and ranks() > 1:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.joined and (error is None or isinstance(error, SystemExit)):
            dist.destroy_process_group()

    def ask_to_stop(self, number: int, frame: object) -> None:
        """Handle a signal: stop once the step is done. If it comes a second time, stop at once;
        a rank, which torchrun asks twice, five seconds before torchrun would kill it."""
        self.stop = number
        if ranks() == 1:
            signal.signal(number, self.handlers[number])
            os.write(2, b"\nstopping after this step; once more stops at once\n")
        else:  # it may be waiting for a rank that is dead
            grace = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) - 5
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
            signal.setitimer(signal.ITIMER_REAL, grace)

    def buffers(self, play: Callable[[list[dict]], list[Sample]]) -> Iterator[list]:
        """This rank's share of one buffer after another: whole episodes, by `play`, of as many
        items at once as the buffer is sure to need, until it is full or the epoch is over."""
        args, dataset = self.args, self.task.train_dataset
        size = math.ceil(args.rollout_buffer_size / ranks())
        at_most = args.num_turns * args.num_generations  # samples of an item
        while self.items < self.total_items:
            if self.items % len(dataset) == 0:
                self.order = gather(torch.randperm(len(dataset)).tolist())[0]
                self.taken = 0
            share = iter(self.order[rank() :: ranks()][self.taken :])
            samples: list[Sample] = []
            while needed := math.ceil(max(size - len(samples), 0) / at_most):
                if not (places := list(islice(share, needed))):
                    break
                samples += play([dataset[k] for k in places])
            yield samples  # maybe none, where only other ranks have items left

    def due(self, last: int, interval: int) -> bool:
        """Whether the run passed a multiple of `interval` items since `last`, or is over."""
        step = interval or math.inf
        passed = last // step < self.items // step
        return last < self.items and (passed or self.items == self.total_items)

    def evaluation_due(self) -> bool:
        """Whether to evaluate now: at the start, every eval_interval items, at the end."""
        return self.due(self.evaluated_items, self.args.eval_interval)

    def log_update(self, samples: list[Sample], losses: dict[str, float]) -> None:
        """Count an update's samples, write a line every logging_steps items, save if due."""
        generations, interval = self.args.num_generations, self.args.save_interval
        self.taken += sum(sample.done for sample in samples) // generations
        samples = list(chain(*gather(samples)))
        items = sum(sample.done for sample in samples) // generations
        self.items += items
        self.samples += len(samples)
        self.updates += 1
        metrics = rollout_metrics(self.task, samples, "rollout") | losses
        for name, value in metrics.items():
            self.pending.setdefault(name, []).append(value)
        self.log_samples(samples, "train")
        lap = self.lap()
        self.seconds.update(lap)
        self.train_seconds += lap.total()
        rate = self.samples / self.train_seconds
        if self.due(self.logged_items, self.args.logging_steps):
            line = {name: float(np.mean(v)) for name, v in self.pending.items()}
            for phase, seconds in self.seconds.items():
                line[f"time/{phase}_share"] = seconds / self.seconds.total()
            self.log(line | {"time/samples_per_second": rate})
            self.pending, self.seconds, self.logged_items = {}, Counter(), self.items
        reward = f"reward {metrics['rollout/return']:.3f}"
        self.bar.update(items)
        shown = f"update {self.updates}, {reward}, {rate:.3g} samples/s"
        self.bar.set_postfix_str(shown)
        more = self.items < self.total_items
        self.pause(interval > 0 and more and self.updates % interval == 0)

    def log_evaluation(self, samples: list[Sample]) -> None:
        """Write an evaluation's metrics and samples, if there are any."""
        samples = list(chain(*gather(samples)))
        self.evaluated_items = self.items
        if samples:
            with fresh_randomness(self.args.seed):
                metrics = rollout_metrics(self.task, samples, "eval")
            self.log(metrics)
            self.log_samples(samples, "eval")
            if rank() == 0:
                reward = f"reward {metrics['eval/return']:.3f}"
                self.bar.write(f"evaluation after {self.items} items: {reward}")
        self.lap()  # it is no training time
        self.pause(self.args.save_interval > 0 and self.items == self.total_items)

    def pause(self, due: bool) -> None:
        """Save a checkpoint if it is due; save and exit if a signal asked a rank to stop."""
        stop = max(gather(self.stop))
        if (due or stop) and not self.args.eval_only:
            self.save_checkpoint()
            self.lap()  # nor is this
        if stop:
            raise SystemExit(128 + stop)

    def save_checkpoint(self) -> None:
        """Write all that going on needs; raises InputError where it cannot be written."""
        everyone = gather((self.taken, random_states()))
        folder = self.folder / "checkpoint"
        if rank() == 0:
            with attempting(f"the checkpoint cannot be written to {str(folder)!r}"):
                folder.mkdir(exist_ok=True)
                for name in self.FILES:
                    with open(self.folder / name, "ab") as file:
                        os.fsync(file.fileno())
                        self.sizes[name] = file.tell()
                self.elapsed = time.perf_counter() - self.start
                state = {"run": {name: getattr(self, name) for name in self.STATE}}
                state |= {"ranks": everyone, "sizes": self.sizes}
                parts = self.parts.items()
                state["parts"] = {name: part.state_dict() for name, part in parts}
                write_checkpoint(folder, self.updates, state)
        gather(None)  # no rank goes on, or ends, before the checkpoint is there

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

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, and tell the other loggers."""
        teams: dict[str, list[float]] = {}  # name/agent_0, name/agent_1, ... as name
        for key, value in metrics.items():
            teams.setdefault(re.sub(r"/(agent|critic)_\d+$", "", key), []).append(value)
        line = {"step": self.items, "update": self.updates}
        line |= {name: float(np.mean(values)) for name, values in teams.items()}
        line |= metrics
        line["time/seconds"] = time.perf_counter() - self.start
        self.append("metrics.jsonl", line)
        if self.tensorboard is not None:
            with attempting(f"TensorBoard cannot write to {str(self.folder)!r}"):
                for name, value in line.items():
                    self.tensorboard.add_scalar(name, value, self.items)
        if self.wandb is not None:
            self.wandb.log(line, step=self.items)

    def log_samples(self, samples: list[Sample], phase: str) -> None:
        """Append the first log_samples joint samples to samples.jsonl; of an evaluation, show
        three to the other loggers, and at the end of the run."""
        keys = ("turn", "item", "prompts", "completions", "reward")
        for sample in samples[: self.args.log_samples]:
            line = {"step": self.items, "phase": phase}
            self.append("samples.jsonl", line | {k: getattr(sample, k) for k in keys})
        if phase == "train":
            return
        self.shown = samples[:3]
        if self.tensorboard is not None:
            text = "\n\n".join(map(side_by_side, self.shown))
            text = textwrap.indent(text, "    ", lambda line: True)  # as it stands
            self.tensorboard.add_text("eval/samples", text, self.items)
        if self.wandb is not None:
            from wandb import Table

            columns = [*(f"agent {k}" for k in range(self.args.num_agents)), "reward"]
            rows = [[*dialogues(sample), sample.reward] for sample in self.shown]
            table = Table(columns=columns, data=rows)
            self.wandb.log({"eval/samples": table}, step=self.items)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append a line of JSON to a file of the run folder."""
        path = self.folder / name
        with attempting(f"{str(path)!r} cannot be written"):
            if rank() == 0:
                with open(path, "a") as file:
                    file.write(json.dumps(line, default=str, skipkeys=True) + "\n")

    def save(self) -> None:
        """Write each model as a folder, with its value head, and curves.png."""
        writes = rank() == 0 and not self.args.eval_only
        for name, learner in self.learners.items() if writes else ():
            folder, head = self.folder / name, learner.value_head
            with attempting(f"{str(folder)!r} cannot be written"):
                learner.model.save_pretrained(folder)
                learner.tokenizer.save_pretrained(folder)
                if head is not None:
                    torch.save(head.state_dict(), folder / "value_head.pt")
        with attempting(f"curves.png cannot be written to {str(self.folder)!r}"):
            if rank() == 0:
                draw_curves(self.folder)
