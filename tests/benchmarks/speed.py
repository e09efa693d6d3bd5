"""Measure the README's speed tables: one process at a time, each a whole run.

    python tests/benchmarks/speed.py                     # against the reference and the floor
    python tests/benchmarks/speed.py --parts default     # the default run on the tiny model

`compare` runs, in turn, each script, the same job with the reference trainer (CoMLRL, which it
installs into an environment of its own) and the floor (floor.py): one update of 16 joint samples,
the first of its process, every completion of full length, loading left out. A line per process is
printed and added to --output; the table is of all lines there: medians over the rounds, and the
range of the ratios. --rounds 0 prints the table alone. bfloat16 (autocast) and LoRA, which has no
floor, are set against the reference in float32 with all weights. Everything runs on the CPU.
`default` takes the time of a script's functions from outside, in a process per script, without
evaluations.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import tyro

HERE = Path(__file__).resolve().parent
SCRIPTS = ("maac", "iac_separate", "iac_shared")
REFERENCE = "comlrl==1.4.3"
UNUSED_TOKEN = "<jupyter_output>"  # of SmolLM2; never sampled, so nothing ends early
CASES = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}}
CASES |= {"four_generations": {"num_generations": 4}, "lora": {"lora_rank": 16}}
CASES["lora_bfloat16"] = CASES["lora"] | CASES["bfloat16"]
OURS_ALONE = {"bfloat16", "lora", "lora_bfloat16"}  # against the reference in float32
PHASES = {  # functions of a script, none of which calls another
    "generation": ("generate",),
    "values": ("estimate_values",),
    "update": ("update_critic", "update_actor"),
}
SUBJECTS = """a lighthouse keeper, a lost dog, a brave mouse, a talking tree, a stolen crown,
a kind giant, a tiny robot, a hungry fox, a wise owl, a clumsy wizard, a friendly ghost,
a stubborn donkey, a red balloon, a paper boat, a silver key, a broken clock"""
PLACES = """in the first snow, on a night train, by the sea, in a secret garden on the hill,
at the market, in an empty theatre after the last show, on a desert road, in spring"""
PROMPTS = [
    "<|im_start|>user\nWrite a story about "
    f"{' '.join(subject.split())} {' '.join(place.split())}, in one or two sentences."
    "<|im_end|>\n<|im_start|>assistant\n"
    for place in PLACES.split(",")
    for subject in SUBJECTS.split(",")
]


@dataclass
class Args:
    """What to measure."""

    parts: tuple[str, ...] = ("compare",)
    """Tables to make: compare, default."""
    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to measure."""
    cases: tuple[str, ...] = tuple(CASES)
    """Cases of `compare`: float32, bfloat16, four_generations, lora, lora_bfloat16."""
    buffer: int = 16
    """Joint samples of an update in `compare`."""
    max_new_tokens: int = 64
    """Tokens of every completion in `compare`."""
    rounds: int = 3
    """Rounds of `compare`; in each every process runs once."""
    model: Path = Path(".cache/smollm2")
    """SmolLM2, made by tests/smollm2.py."""
    environment: Path = Path(".cache/comlrl")
    """Where the reference is installed."""
    output: Path = Path("runs/speed.jsonl")
    """File to which each process's line is appended."""


@dataclass
class Job:
    """One process: what it computes."""

    who: str  # ours, reference or floor
    script: str
    dtype: str = "float32"
    num_generations: int = 1
    lora_rank: int | None = None
    num_agents: int = 2
    buffer: int = 16
    max_new_tokens: int = 64
    micro_batch_size: int | None = None

    @property
    def prompts(self) -> list[str]:
        """The items of one update."""
        return PROMPTS[: self.buffer // self.num_generations]


def vowels(*completions: list[str]) -> list[float]:
    """The share of vowels in each joint completion."""
    joint = ["".join(texts).lower() for texts in zip(*completions, strict=True)]
    return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in joint]


def make_task(args):
    """The task of our scripts: one update's items, paid their share of vowels."""
    from common import Task

    items = PROMPTS[: args.rollout_buffer_size // args.num_generations]
    return Task([{"prompt": text} for text in items], vowels)


def endless(model: Path, folder: Path) -> Path:
    """The model without an end-of-sequence token, so that all completions have full length."""
    changes = {"config.json": {"eos_token_id": None}}
    changes["generation_config.json"] = {"eos_token_id": None, "pad_token_id": None}
    changes["tokenizer_config.json"] = {"eos_token": None, "pad_token": UNUSED_TOKEN}
    target = folder / "endless"
    target.mkdir()
    for path in model.resolve().iterdir():
        if path.name in changes:
            values = json.loads(path.read_text()) | changes[path.name]
            kept = {key: value for key, value in values.items() if value is not None}
            (target / path.name).write_text(json.dumps(kept))
        else:
            (target / path.name).symlink_to(path)
    return target


def install_reference(folder: Path) -> Path:
    """The Python of an environment that has the reference, and our torch and transformers."""
    python = folder / "bin" / "python"
    if not python.is_file():
        import torch
        import transformers

        venv.create(folder, with_pip=True)
        same = f"torch=={torch.__version__.split('+')[0]} tyro"  # for common.py
        same = [*same.split(), f"transformers=={transformers.__version__}"]
        install = [str(python), "-m", "pip", "install", "--quiet", *same, REFERENCE]
        subprocess.run(install, check=True)
    return python


def run(command: list[str]) -> tuple[str, int]:
    """The standard output of a process that succeeds, and its peak memory in MB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        alone = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, stdout=out, stderr=err, env=alone)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss // 1024


def measure(job: Job, model: Path, python: str, folder: Path) -> dict:
    """Run one job: joint samples per second, peak memory."""
    assert len(job.prompts) * job.num_generations == job.buffer, job
    if job.who == "ours":
        flags = {"task": HERE / "speed.py", "output-dir": folder, "agent-model": model}
        flags |= {"agent-learning-rate": 1e-5, "critic-learning-rate": 1e-5}
        flags |= {"entropy-coef": 0, "rollout-buffer-size": job.buffer}
        flags |= {"num-train-epochs": 1, "log-samples": 0, "save-interval": 0}
        own = {**asdict(job), "who": None, "script": None, "buffer": None}
        flags |= {name: value for name, value in own.items() if value is not None}
        words = [str(word) for key, x in flags.items() for word in (f"--{key}", x)]
        script = str(HERE.parents[1] / f"{job.script}.py")
        out, memory = run([sys.executable, script, *words])
        file = Path(out.split("run folder: ")[-1].strip()) / "metrics.jsonl"
        (line,) = map(json.loads, file.open())  # of one update, without evaluations
        lengths = [line["rollout/completion_tokens"]]
        rate = line["time/samples_per_second"]
    else:
        spec = asdict(job) | {"model": str(model), "prompts": job.prompts}
        spec |= {"agents": [str(model)] * job.num_agents, "seed": 1}
        spec["critics"] = spec["agents"]
        config = {"max_new_tokens": job.max_new_tokens, "top_k": 0, "top_p": 1.0}
        config |= {"num_generations": job.num_generations, "temperature": 1.0}
        spec["config"] = config | {"rollout_buffer_size": job.buffer}
        file = str(HERE / f"{job.who}.py")
        out, memory = run([python, file, json.dumps(spec)])
        result = json.loads(out.splitlines()[-1])
        lengths, rate = result["lengths"], job.buffer / result["seconds"]
    if set(lengths) != {job.max_new_tokens}:
        raise SystemExit(f"{job}: completions of {set(lengths)} tokens")
    return asdict(job) | {"samples_per_second": rate, "memory": memory}


def compare(args: Args) -> str:
    """Our scripts, the reference and the floor, in turn; a table of all in --output."""

    def job(who: str, script: str, case: str) -> Job:
        sizes = {"buffer": args.buffer, "max_new_tokens": args.max_new_tokens}
        sizes["micro_batch_size"] = None if who == "reference" else 4
        return Job(who, script, **sizes, **CASES[case])

    args.output.parent.mkdir(parents=True, exist_ok=True)
    pairs = list(itertools.product(args.scripts, args.cases))
    for _, (script, case) in itertools.product(range(args.rounds), pairs):
        whose = {"ours": sys.executable}
        if "lora" not in case:
            whose["floor"] = sys.executable
        if case not in OURS_ALONE:
            whose["reference"] = str(install_reference(args.environment))
        for who, python in whose.items():
            with tempfile.TemporaryDirectory() as folder:
                model = endless(args.model, Path(folder))
                result = measure(job(who, script, case), model, python, Path(folder))
            print(json.dumps(result), flush=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(result) + "\n")
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]

    def results(who: str, script: str, case: str) -> list[dict]:
        wanted = asdict(job(who, script, case)).items()
        return [line for line in lines[::-1] if wanted <= line.items()]

    rows = []
    for script, case in pairs:
        mine, floor = results("ours", script, case), results("floor", script, case)
        against = "float32" if case in OURS_ALONE else case
        theirs = results("reference", script, against)
        if not mine:
            continue
        peak, rates = median(r["memory"] for r in mine), [f"{rate(mine):.3f}", "-"]
        memory = f"{peak:.0f}"
        if theirs:
            other, rates[1] = median(r["memory"] for r in theirs), f"{rate(theirs):.3f}"
            memory += f", {other:.0f}, {peak / other:.2f}"
        ratios = [spread(mine, theirs), spread(floor, mine)]
        rows.append([f"{script}.py", case, *rates, *ratios, memory])
    heads = "script | case | joint samples/s | reference, float32 | ratio"
    return table(f"{heads} | time over floor | peak MB, reference's, ratio", rows)


def table(heads: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, " | ".join(["---"] * len(heads.split(" | ")))]
    return "\n".join(f"| {x} |" for x in [*lines, *map(" | ".join, rows)])


def rate(results: list[dict]) -> float:
    """The median of the joint samples per second."""
    return median(result["samples_per_second"] for result in results)


def spread(upper: list[dict], lower: list[dict]) -> str:
    """Median and range of the rounds' ratios of joint samples per second, latest first."""
    ratios = [rate([one]) / rate([other]) for one, other in zip(upper, lower)]
    found = [f"{choose(ratios):.2f}" for choose in (median, min, max) if ratios]
    return "{} ({} to {})".format(*found) if found else "-"


def default(args: Args) -> str:
    """Where the time of the default run goes."""
    rows = []
    for script in args.scripts:
        path = f"import sys; sys.path.insert(0, {str(HERE)!r}); import speed"
        out, _ = run([sys.executable, "-c", f"{path}; speed.take_times({script!r})"])
        rows.append(json.loads(out.splitlines()[-1]))
    return table(f"script | joint samples/s | {' | '.join(PHASES)} | rest", rows)


def take_times(script: str) -> None:
    """Train with the default flags. Prints a row: the samples per second, and the shares of
    PHASES and of the rest (prompts, rewards, targets, logs) in the time of all of these."""
    sys.path.insert(0, str(HERE.parents[1]))
    import common

    module, seconds = importlib.import_module(script), defaultdict(float)

    def timed(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: object, **options: object) -> object:
            start = time.perf_counter()
            result = function(*args, **options)
            seconds[name] += time.perf_counter() - start
            return result

        setattr(owner, name, wrapper)

    timed(common.Run, "log_update")
    for name in ("collect", "update", *itertools.chain(*PHASES.values())):
        if hasattr(module, name):  # iac_shared.py has no update_critic
            timed(module, name)
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(output_dir=folder)
        task = replace(common.load_task(args, None), eval_dataset=None)
        module.train(args, task)
    whole = seconds["collect"] + seconds["update"] + seconds["log_update"]
    samples = args.num_train_epochs * len(task.train_dataset)
    shares = [sum(seconds[x] for x in names) / whole for names in PHASES.values()]
    cells = [f"{100 * share:.0f} %" for share in (*shares, 1 - sum(shares))]
    print(json.dumps([f"{script}.py", f"{samples / whole:.0f}", *cells]))


def main(args: Args) -> None:
    """Run the parts that were asked for and print their tables."""
    makers = {"compare": compare, "default": default}
    tables = [makers[part](args) for part in args.parts]
    print("", *tables, sep="\n\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
