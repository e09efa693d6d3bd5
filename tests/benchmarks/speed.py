"""Measure the README's speed tables: one process at a time, each a whole run.

    python tests/benchmarks/speed.py                     # against the reference and the floor
    python tests/benchmarks/speed.py --parts growth      # agents, buffer, tokens, micro-batches
    python tests/benchmarks/speed.py --parts default     # the default run on the tiny model

`compare` runs, in turn, each script, the same job with the reference trainer (CoMLRL, which it
installs into an environment of its own) and the floor (floor.py): one update of 16 joint samples,
the first of its process, every completion of full length, loading left out. A line per process is
printed and added to --output; the table is of all lines there: medians over the rounds, and the
range of the ratios. --rounds 0 prints the table alone. bfloat16 is autocast, set against the
reference in float32. Everything runs on the CPU.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
SCRIPTS = ("maac", "iac_separate", "iac_shared")
REFERENCE = "comlrl==1.4.3"
UNUSED_TOKEN = "<jupyter_output>"  # of SmolLM2; never sampled, so nothing ends early
PHASES = ("generation", "values", "update", "rest")
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

    parts: tuple[Literal["compare", "growth", "default"], ...] = ("compare",)
    """Tables to make."""
    scripts: tuple[Literal["maac", "iac_separate", "iac_shared"], ...] = SCRIPTS
    """Scripts to measure."""
    cases: tuple[Literal["float32", "bfloat16", "four_generations"], ...] = (
        "float32",
        "bfloat16",
        "four_generations",
    )
    """Cases of `compare`."""
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
    micro_batch_size: int = 4
    """Of our scripts and the floor: the peak of memory depends on it."""
    output: Path = Path("runs/speed.jsonl")
    """File to which each process's line is appended."""


@dataclass
class Job:
    """One process: what it computes."""

    who: str  # ours, reference or floor
    script: str
    dtype: str = "float32"
    num_generations: int = 1
    num_agents: int = 2
    buffer: int = 16
    max_new_tokens: int = 64
    micro_batch_size: int | None = None

    @property
    def prompts(self) -> list[str]:
        """The items of one update."""
        return PROMPTS[: self.buffer // self.num_generations]


def make_task(args):
    """The task of our scripts: one update's items, paid their share of vowels."""
    from common import Task

    def vowels(*completions: list[str]) -> list[float]:
        joint = ["".join(texts).lower() for texts in zip(*completions, strict=True)]
        return [sum(map(text.count, "aeiou")) / max(1, len(text)) for text in joint]

    items = PROMPTS[: args.rollout_buffer_size // args.num_generations]
    return Task([{"prompt": text} for text in items], vowels)


def endless(model: Path, folder: Path) -> Path:
    """The model without an end-of-sequence token, so that all completions have full length."""
    changes = {
        "config.json": {"eos_token_id": None},
        "generation_config.json": {"eos_token_id": None, "pad_token_id": None},
        "tokenizer_config.json": {"eos_token": None, "pad_token": UNUSED_TOKEN},
    }
    target = folder / "endless"
    target.mkdir()
    for path in model.resolve().iterdir():
        if path.name not in changes:
            (target / path.name).symlink_to(path)
            continue
        values = json.loads(path.read_text()) | changes[path.name]
        kept = {key: value for key, value in values.items() if value is not None}
        (target / path.name).write_text(json.dumps(kept))
    return target


def install_reference(folder: Path) -> Path:
    """The Python of an environment that has the reference, and our torch and transformers."""
    python = folder / "bin" / "python"
    if not python.is_file():
        import torch
        import transformers

        venv.create(folder, with_pip=True)
        same = [
            f"torch=={torch.__version__.split('+')[0]}",
            f"transformers=={transformers.__version__}",
            "tyro",  # which common.py imports
        ]
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
    """Run one job: joint samples per second, shares of the time, peak memory."""
    if len(job.prompts) * job.num_generations != job.buffer:
        raise SystemExit(
            f"a buffer of {job.buffer} is not made of {job.num_generations} generations"
            f" of each of 1 to {len(PROMPTS)} prompts"
        )
    if job.who == "ours":
        flags = {
            "task": HERE / "speed.py",
            "output-dir": folder,
            "agent-model": model,
            "num-agents": job.num_agents,
            "num-generations": job.num_generations,
            "rollout-buffer-size": job.buffer,
            "max-new-tokens": job.max_new_tokens,
            "agent-learning-rate": 1e-5,
            "critic-learning-rate": 1e-5,
            "entropy-coef": 0,
            "num-train-epochs": 1,
            "dtype": job.dtype,
            "log-samples": 0,
            "save-interval": 0,
        }
        if job.micro_batch_size is not None:
            flags["micro-batch-size"] = job.micro_batch_size
        words = [
            str(word) for key, value in flags.items() for word in (f"--{key}", value)
        ]
        out, memory = run(
            [sys.executable, str(HERE.parents[1] / f"{job.script}.py"), *words]
        )
        lines = metrics(Path(out.split("run folder: ")[-1].strip()))
        lengths = [lines[-1]["rollout/completion_tokens"]]
        rate = lines[-1]["time/samples_per_second"]
        times = {phase: lines[-1][f"time/{phase}_share"] for phase in PHASES}
    else:
        config = {
            "num_generations": job.num_generations,
            "max_new_tokens": job.max_new_tokens,
        }
        if job.who == "reference":
            config |= {"rollout_buffer_size": job.buffer, "top_k": 0}
            config |= {"temperature": 1.0, "top_p": 1.0}
        spec = asdict(job) | {"model": str(model), "prompts": job.prompts}
        spec |= {"agents": [str(model)], "task": "vowels"}
        spec["config"] = config
        file = str(HERE / f"{job.who}.py")
        out, memory = run([python, file, json.dumps(spec)])
        result = json.loads(out.splitlines()[-1])
        lengths, times = result["lengths"], {}
        rate = job.buffer / result["seconds"]
    if set(lengths) != {job.max_new_tokens}:
        raise SystemExit(f"{job}: completions of {set(lengths)} tokens")
    return asdict(job) | {"samples_per_second": rate, "memory": memory, "times": times}


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's training, without those of evaluations."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "rollout/reward" in line]


CASES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "four_generations": {"num_generations": 4},
}


def compare(args: Args, measured: Callable[[Job], dict]) -> str:
    """Our scripts, the reference and the floor, in turn; a table of all in --output."""
    base = {"buffer": args.buffer, "max_new_tokens": args.max_new_tokens}
    ours = {"micro_batch_size": args.micro_batch_size}
    pairs = list(itertools.product(args.scripts, args.cases))
    for _ in range(args.rounds):
        for script, case in pairs:
            measured(Job("ours", script, **base, **CASES[case], **ours))
            measured(Job("floor", script, **base, **CASES[case], **ours))
            if case != "bfloat16":
                measured(Job("reference", script, **base, **CASES[case]))
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]

    def results(who: str, script: str, case: str) -> list[dict]:
        size = {} if who == "reference" else ours
        wanted = asdict(Job(who, script, **base, **CASES[case], **size))
        return [line for line in lines[::-1] if wanted.items() <= line.items()]

    rows = [
        "| script | case | joint samples/s | reference, float32 | ratio | time over floor | "
        + ", ".join(PHASES)
        + " | peak MB, reference's, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for script, case in pairs:
        mine, floor = results("ours", script, case), results("floor", script, case)
        against = "float32" if case == "bfloat16" else case
        theirs = results("reference", script, against)
        if not mine:
            continue
        shares = [
            f"{100 * median(r['times'][phase] for r in mine):.0f} %" for phase in PHASES
        ]
        peak = median(r["memory"] for r in mine)
        memory = f"{peak:.0f}"
        if theirs:
            other = median(r["memory"] for r in theirs)
            memory += f", {other:.0f}, {peak / other:.2f}"
        cells = [
            f"{script}.py",
            case,
            f"{rate(mine):.3f}",
            f"{rate(theirs):.3f}" if theirs else "-",
            spread(mine, theirs),
            spread(floor, mine),
            ", ".join(shares),
            memory,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def rate(results: list[dict]) -> float:
    """The median of the joint samples per second."""
    return median(result["samples_per_second"] for result in results)


def spread(upper: list[dict], lower: list[dict]) -> str:
    """Median and range of the rounds' ratios of joint samples per second, latest first."""
    ratios = [
        one["samples_per_second"] / other["samples_per_second"]
        for one, other in zip(upper, lower)
    ]
    if not ratios:
        return "-"
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def growth(args: Args, measured: Callable[[Job], dict]) -> str:
    """Seconds per joint sample and peak memory over agents, buffer and tokens."""
    sizes = [
        *({"num_agents": count} for count in (1, 2, 4)),
        *({"buffer": count} for count in (8, 32, 128)),
        *({"max_new_tokens": count} for count in (32, 128)),
        *({"buffer": count, "micro_batch_size": 1} for count in (8, 32, 128)),
    ]
    rows = [
        "| script | change | seconds per joint sample | peak MB |",
        "|---|---|---|---|",
    ]
    for script in args.scripts:
        for size in sizes:
            job = {
                "micro_batch_size": args.micro_batch_size,
                "dtype": "bfloat16",
            } | size
            result = measured(Job("ours", script, **job))
            change = ", ".join(f"{key} {value}" for key, value in size.items())
            seconds = 1 / result["samples_per_second"]
            rows.append(
                f"| {script}.py | {change} | {seconds:.2f} | {result['memory']} |"
            )
    return "\n".join(rows)


def default(args: Args, folder: Path) -> str:
    """Where the time of the default run goes."""
    rows = [
        "| script | joint samples/s | generation | values | update | rest |",
        "|---|---|---|---|---|---|",
    ]
    for script in args.scripts:
        file = str(HERE.parents[1] / f"{script}.py")
        out, _ = run([sys.executable, file, "--output-dir", str(folder)])
        lines = metrics(Path(out.split("run folder: ")[-1].strip()))
        shares = [
            f"{100 * sum(line[f'time/{phase}_share'] for line in lines) / len(lines):.0f} %"
            for phase in PHASES
        ]
        speed = lines[-1]["time/samples_per_second"]
        rows.append(f"| {script}.py | {speed:.0f} | {' | '.join(shares)} |")
    return "\n".join(rows)


def main(args: Args) -> None:
    """Run the parts that were asked for and print their tables."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        against = "compare" in args.parts and set(args.cases) != {"bfloat16"}
        python = install_reference(args.environment) if against else None
        if set(args.parts) & {"compare", "growth"}:
            model = endless(args.model, folder)

        def measured(job: Job) -> dict:
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                interpreter = str(python) if job.who == "reference" else sys.executable
                result = measure(job, model, interpreter, Path(runs))
            line = json.dumps(result)
            print(line, flush=True)
            with open(args.output, "a") as file:
                file.write(line + "\n")
            return result

        if "compare" in args.parts:
            tables.append(compare(args, measured))
        if "growth" in args.parts:
            tables.append(growth(args, measured))
        if "default" in args.parts:
            tables.append(default(args, folder))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main(tyro.cli(Args))
