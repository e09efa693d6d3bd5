"""Measure the README's learning table: whole runs, one process at a time.

    python tests/benchmarks/learning.py                          # every bar but the last
    python tests/benchmarks/learning.py --scripts maac --seeds 1 2 --bars two_agents
    python tests/benchmarks/learning.py --bars length_ratio --model .cache/smollm2

A bar is a setting of the scripts and what its runs must reach; a line per run is printed and
kept in --output, then a Markdown table with a row per script.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("maac", "iac_separate", "iac_shared")
BARS = {
    "two_agents": [],
    "three_agents": ["--num-agents", "3"],
    "two_turns": ["--num-turns", "2", "--early-termination-threshold", "-0.01"],
    "two_turns_to_the_end": ["--num-turns", "2"],
    "length_ratio": shlex.split(
        "--task length_ratio --max-new-tokens 64 --agent-learning-rate 2e-5"
        " --critic-learning-rate 1e-4 --value-loss-coef 0.1 --entropy-coef 0"
        " --rollout-buffer-size 16 --num-train-epochs 8 --logging-steps 16 --eval-interval 0 --eval-num-samples 16"
        " --eval-batch-size 16 --log-samples 16 --dtype bfloat16 --save-interval 0"
    ),
}


@dataclass
class Args:
    """What to measure."""

    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to run."""
    bars: tuple[str, ...] = (
        "two_agents",
        "three_agents",
        "two_turns",
        "two_turns_to_the_end",
    )
    """Settings to run: two_agents, three_agents, two_turns, two_turns_to_the_end, length_ratio."""
    seeds: tuple[int, ...] = tuple(range(1, 11))
    """Seeds of the runs."""
    model: str = ".cache/smollm2"
    """Model of length_ratio, made by tests/smollm2.py."""
    processes: int = 1
    """Runs at the same time; above 1 each has one thread."""
    flags: str = ""
    """Further flags of the scripts: --flags='--num-train-epochs 1'."""
    output: Path = Path("runs/learning.jsonl")
    """File to which each run's line is appended."""


def measure(script: str, bar: str, seed: int, args: Args) -> dict[str, object]:
    """One run as a user starts it, and its figures."""
    flags = [
        *BARS[bar],
        "--seed",
        str(seed),
        "--exp-name",
        f"{script}-{bar}",
        *args.flags.split(),
    ]
    if bar == "length_ratio":
        flags += ["--agent-model", args.model]
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    threads = {"OMP_NUM_THREADS": "1"} if args.processes > 1 else {}
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **threads},
    )
    folder = Path(done.stdout.split("run folder: ")[-1].strip())
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    train = [line for line in lines if "rollout/reward" in line]
    cost = 1.0 if bar.startswith("two_turns") else 0.0  # of a turn, see sum_to_target
    evaluations = [line for line in lines if "eval/reward" in line]
    final = np.array([line["rollout/final_reward"] for line in train]) + cost
    quarter = max(1, len(final) // 4)
    first, last = final[:quarter], final[-quarter:]
    return {
        "script": script,
        "bar": bar,
        "seed": seed,
        "untrained": evaluations[0]["eval/final_reward"] + cost,
        "last_tenth": float(final[-max(1, len(final) // 10) :].mean()),
        "turns": float(
            np.mean([line["rollout/turns"] for line in train[-len(train) // 10 :]])
        ),
        "first_quarter": float(first.mean()),
        "last_quarter": float(last.mean()),
        "standard_error": float(np.sqrt(first.var() / quarter + last.var() / quarter)),
        "training_seconds": lines[-1]["time/seconds"],
        "process_seconds": time.perf_counter() - start,
        "folder": str(folder),
    }


def table(results: list[dict]) -> str:
    """A Markdown table with a row per bar and script."""
    rows = [
        "| bar | script | runs | untrained | last tenth: min, median, max | seconds |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for bar, script in dict.fromkeys((r["bar"], r["script"]) for r in results):
        runs = [r for r in results if (r["bar"], r["script"]) == (bar, script)]
        last = np.array([r["last_tenth"] for r in runs])
        untrained = max(r["untrained"] for r in runs)
        seconds = np.median([r["training_seconds"] for r in runs])
        spread = f"{last.min():.3f}, {np.median(last):.3f}, {last.max():.3f}"
        rows.append(
            f"| {bar} | {script} | {len(runs)} | {untrained:.2f} | {spread} | {seconds:.0f} |"
        )
    return "\n".join(rows)


def main(args: Args) -> None:
    """Run everything, and print the table."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    jobs = list(itertools.product(args.bars, args.scripts, args.seeds))
    results = []
    with ThreadPoolExecutor(args.processes) as pool:
        runs = pool.map(lambda job: measure(job[1], job[0], job[2], args), jobs)
        for result in runs:
            results.append(result)
            print(json.dumps(result), flush=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(result) + "\n")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Args))
