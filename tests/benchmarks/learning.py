"""Measure learning: algorithms x tasks x seeds, whole runs as a user starts them.

    python tests/benchmarks/learning.py --processes 2                # the two figures of README
    python tests/benchmarks/learning.py --tasks two_agents --scripts maac --seeds 1 2
    python tests/benchmarks/learning.py --tasks tldr --model .cache/smollm2 --seeds 1

The runs are kept in OUTPUT/runs.jsonl, a line each, and one that stands there is not repeated.
From all lines come OUTPUT/learning.csv (every point of every curve), OUTPUT/learning.md (a table:
mean and standard deviation over the seeds) and OUTPUT/<task>.png (curves: mean, and the band of
one standard deviation). `--reference` adds the trainers of CoMLRL on the same game, with the same
tiny models, tokenizer and hyper-parameters; it has no entropy bonus, as our task without_bonus.

Reward is the mean in the last tenth of training. The samples to the threshold are the episodes
(with one turn, joint samples) until the mean of the last 600 reaches it; a run that never does
counts with its whole length.
"""

import csv
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from speed import install_reference

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("maac", "iac_separate", "iac_shared")
REAL_MODEL = (
    " --entropy-coef 0 --agent-learning-rate 2e-5 --critic-learning-rate 1e-4"
    " --value-loss-coef 0.1 --rollout-buffer-size 16 --logging-steps 16 --save-interval 0"
    " --eval-interval 0 --eval-num-samples 16 --eval-batch-size 16 --log-samples 16"
)


@dataclass
class Setting:
    """A task with its flags, and what a reader wants to know of it."""

    flags: str
    """Flags of the scripts."""
    threshold: float
    """0.8 of the optimum."""
    metric: str = "rollout/final_reward"
    """What is to rise."""
    offset: float = 0.0
    """Added to the metric: the cost of a turn in sum_to_target."""
    critics: bool = False
    """Whether the picture shows what the critics explain."""


SETTINGS = {
    "two_agents": Setting("", 0.8),
    "without_bonus": Setting("--entropy-coef 0", 0.8),
    "three_agents": Setting("--num-agents 3", 0.8),
    "two_turns": Setting(
        "--num-turns 2 --early-termination-threshold -0.01", 0.8, offset=1.0
    ),
    "hidden_cards": Setting(
        "--task hidden_cards --num-turns 2 --num-train-epochs 10",
        0.8,
        metric="rollout/right",
        critics=True,
    ),
    "length_ratio": Setting(
        "--task length_ratio --max-new-tokens 64 --num-train-epochs 8" + REAL_MODEL, 0.8
    ),
    "tldr": Setting(
        "--task tldr --train-file tests/posts.jsonl --max-new-tokens 64"
        " --num-train-epochs 8" + REAL_MODEL,
        0.8 * 2.98,
    ),
}
WINDOW = 600  # episodes
EXPLAINED, SPREAD = "critic/explained_variance", "critic/advantage_std"


@dataclass
class Args:
    """What to measure."""

    tasks: tuple[str, ...] = ("two_agents", "hidden_cards")
    """two_agents, without_bonus, three_agents, two_turns, hidden_cards, length_ratio, tldr."""
    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to run."""
    seeds: tuple[int, ...] = tuple(range(11, 21))
    """Seeds of the runs; the defaults were chosen on 1 to 10 and 101 to 104."""
    reference: bool = False
    """Run CoMLRL too, on the game of two agents."""
    reference_epochs: int = 10
    """Epochs of CoMLRL's runs."""
    environment: Path = Path(".cache/comlrl")
    """Where CoMLRL is installed."""
    model: str = ".cache/smollm2"
    """Model of length_ratio and tldr, made by tests/smollm2.py."""
    processes: int = 1
    """Runs at the same time; above 1 each has one thread."""
    flags: str = ""
    """Further flags of the scripts: --flags='--num-train-epochs 1'."""
    output: Path = Path("runs/learning")
    """Folder of the results."""


def threads(args: Args) -> dict[str, str]:
    """The environment of a run."""
    alone = {"OMP_NUM_THREADS": "1"} if args.processes > 1 else {}
    return {**os.environ, **alone}


def ours(script: str, task: str, seed: int, args: Args) -> dict:
    """One run as a user starts it: its curves and figures."""
    setting = SETTINGS[task]
    flags = [*shlex.split(setting.flags), "--seed", str(seed)]
    flags += ["--exp-name", f"{script}-{task}", *shlex.split(args.flags)]
    if "learning-rate 2e-5" in setting.flags:
        flags += ["--agent-model", args.model]
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=threads(args)
    )
    folder = Path(done.stdout.split("run folder: ")[-1].strip())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    train = [line for line in lines if setting.metric in line]
    evaluations = [line for line in lines if "eval/reward" in line]
    generations = json.loads((folder / "args.json").read_text())["num_generations"]
    keys = {"reward": setting.metric, EXPLAINED: EXPLAINED, SPREAD: SPREAD}
    curves = {
        name: [
            (
                generations * line["step"],
                line[key] + setting.offset * (name == "reward"),
            )
            for line in train
            if key in line
        ]
        for name, key in keys.items()
    }
    before = setting.metric.replace("rollout", "eval")
    return {
        "curves": curves,
        "untrained": evaluations[0][before] + setting.offset,
        "turns": float(np.mean([line["rollout/turns"] for line in train[-10:]])),
        "seconds": lines[-1]["time/seconds"],
        "folder": str(folder),
    }


def reference(script: str, seed: int, args: Args) -> dict:
    """One run of CoMLRL's trainer with our tiny models of that seed and our hyper-parameters."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoModel, AutoModelForCausalLM

    import common
    import maac

    ours = maac.Args(device="cpu", seed=seed)
    same = "rollout_buffer_size max_new_tokens temperature top_p value_loss_coef"
    same += " agent_learning_rate critic_learning_rate advantage_normalization"
    config = {name: getattr(ours, name) for name in same.split()}
    config |= {"top_k": 0, "num_train_epochs": args.reference_epochs}
    config |= {} if script == "maac" else {"value_clip_range": 0.2}
    with tempfile.TemporaryDirectory() as scratch:
        for role, auto_class in (
            ("agent", AutoModelForCausalLM),
            ("critic", AutoModel),
        ):
            for learner in common.load_learners(role, auto_class, ["tiny"] * 2, ours):
                learner.model.save_pretrained(Path(scratch) / learner.name)
                learner.tokenizer.save_pretrained(Path(scratch) / learner.name)
        spec = {"script": script, "task": "sum_to_target", "seed": seed}
        spec |= {"num_agents": 2, "config": config}
        for role in ("agent", "critic"):
            spec[f"{role}s"] = [f"{scratch}/{role}_{k}" for k in range(2)]
        file = Path(__file__).with_name("reference.py")
        python = install_reference(args.environment)
        done = subprocess.run(
            [str(python), str(file), json.dumps(spec)],
            check=True,
            capture_output=True,
            text=True,
            env={**threads(args), "CUDA_VISIBLE_DEVICES": ""},
        )
    result = json.loads(done.stdout.splitlines()[-1])
    rewards = np.array(result["rewards"])
    points = [
        (end, float(rewards[end - 100 : end].mean()))
        for end in range(100, len(rewards) + 1, 100)
    ]
    return {
        "curves": {"reward": points},
        "untrained": points[0][1],
        "seconds": result["seconds"],
    }


def measure(algorithm: str, task: str, seed: int, args: Args) -> dict:
    """One run, with its final reward and the samples to its threshold."""
    start = time.perf_counter()
    if algorithm.startswith("CoMLRL"):
        result = reference(algorithm.split()[-1], seed, args)
    else:
        result = ours(algorithm, task, seed, args)
    samples, rewards = map(np.array, zip(*result["curves"]["reward"], strict=True))
    tenth = max(1, len(rewards) // 10)
    reached = samples[-1]
    for end in samples:
        window = rewards[(samples > end - WINDOW) & (samples <= end)]
        if (
            end >= min(WINDOW, samples[-1])
            and window.mean() >= SETTINGS[task].threshold
        ):
            reached = end
            break
    quarter = max(1, len(rewards) // 4)
    first, last = rewards[:quarter], rewards[-quarter:]
    return {
        "task": task,
        "algorithm": algorithm,
        "seed": seed,
        "reward": float(rewards[-tenth:].mean()),
        "samples_to_threshold": int(reached),
        "reached": bool(reached < samples[-1]),
        "first_quarter": float(first.mean()),
        "last_quarter": float(last.mean()),
        "standard_error": float(np.sqrt(first.var() / quarter + last.var() / quarter)),
        "process_seconds": time.perf_counter() - start,
        **result,
    }


def groups(results: list[dict]) -> Iterator[tuple[str, str, list[dict]]]:
    """The runs of each task and algorithm."""
    for task, algorithm in dict.fromkeys((r["task"], r["algorithm"]) for r in results):
        runs = [r for r in results if (r["task"], r["algorithm"]) == (task, algorithm)]
        yield task, algorithm, runs


def at_the_end(runs: list[dict], name: str) -> str:
    """Mean and deviation over the runs of a critic's metric in the last tenth of training."""
    curves = [[v for _, v in r["curves"].get(name, [])] for r in runs]
    ends = [np.mean(c[-max(1, len(c) // 10) :]) for c in curves if c]
    return f"{np.mean(ends):.2f} ± {np.std(ends):.2f}" if ends else "-"


def table(results: list[dict]) -> str:
    """A Markdown table with a row per task and algorithm."""
    rows = [
        "| task | algorithm | seeds | untrained | reward | lowest, median"
        + " | samples to threshold | reached | explained variance | advantage std | seconds |",
        "|" + "---|" * 11,
    ]
    for task, algorithm, runs in groups(results):
        rewards = np.array([r["reward"] for r in runs])
        samples = np.array([r["samples_to_threshold"] for r in runs])
        cells = [task, algorithm, len(runs)]
        cells += [f"{max(r['untrained'] for r in runs):.2f}"]
        cells += [f"{rewards.mean():.3f} ± {rewards.std():.3f}"]
        cells += [f"{rewards.min():.3f}, {np.median(rewards):.3f}"]
        cells += [f"{samples.mean():.0f} ± {samples.std():.0f}"]
        cells += [f"{sum(r['reached'] for r in runs)} of {len(runs)}"]
        cells += [at_the_end(runs, EXPLAINED), at_the_end(runs, SPREAD)]
        cells += [f"{np.median([r['seconds'] for r in runs]):.0f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def draw(task: str, results: list[dict], path: Path) -> None:
    """The curves of a task: the mean over seeds, and the band of one standard deviation."""
    from matplotlib.figure import Figure

    names = {"reward": SETTINGS[task].metric.split("/")[1].replace("_", " ")}
    if SETTINGS[task].critics:
        names |= {EXPLAINED: "explained variance", SPREAD: "std of the advantages"}
    figure = Figure(figsize=(6.5 * len(names), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for _, algorithm, runs in groups(results):
            curves = [np.array(r["curves"].get(name) or [(0, 0)]).T for r in runs]
            grid = np.linspace(0, min(steps[-1] for steps, _ in curves), 200)
            if grid[-1] == 0:
                continue
            curves = [
                (steps, np.convolve(np.pad(values, 2, "edge"), np.ones(5) / 5, "valid"))
                for steps, values in curves
            ]
            values = np.array([np.interp(grid, *curve) for curve in curves])
            mean, spread = values.mean(0), values.std(0)
            style = "--" if "CoMLRL" in algorithm else "-"
            (line,) = axes.plot(grid, mean, style, label=f"{algorithm} ({len(runs)})")
            color = line.get_color()
            axes.fill_between(
                grid, mean - spread, mean + spread, alpha=0.2, color=color
            )
        axes.set(title=f"{task}: {title}", xlabel="episodes")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def write_csv(results: list[dict], path: Path) -> None:
    """Every point of every curve."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "algorithm", "seed", "metric", "samples", "value"])
        for r in results:
            for name, curve in r["curves"].items():
                for samples, value in curve:
                    key = [r["task"], r["algorithm"], r["seed"], name]
                    writer.writerow([*key, samples, f"{value:.5g}"])


def main(args: Args) -> None:
    """Run what has not been run; write the table, the CSV and the pictures of all."""
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "runs.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    done = {(r["task"], r["algorithm"], r["seed"]): r for r in map(json.loads, lines)}
    jobs = [
        (task, script, seed)
        for task, seed, script in itertools.product(
            args.tasks, args.seeds, args.scripts
        )
    ]
    if args.reference:
        pairs = itertools.product(args.seeds, args.scripts)
        jobs += [("without_bonus", f"CoMLRL {script}", seed) for seed, script in pairs]

    def run(job: tuple[str, str, int]) -> None:
        task, algorithm, seed = job
        result = measure(algorithm, task, seed, args)
        done[job] = result
        with open(store, "a") as file:
            file.write(json.dumps(result) + "\n")
        figures = {k: v for k, v in result.items() if k not in ("curves", "folder")}
        print(json.dumps(figures), flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(run, [job for job in jobs if job not in done]))
    results = [done[job] for job in sorted(done)]
    write_csv(results, args.output / "learning.csv")
    (args.output / "learning.md").write_text(table(results) + "\n")
    print(table(results))
    for task in dict.fromkeys(r["task"] for r in results):
        draw(
            task, [r for r in results if r["task"] == task], args.output / f"{task}.png"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
