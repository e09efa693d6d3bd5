"""Measure learning: algorithms x tasks x seeds, whole runs as a user starts them.

    python tests/benchmarks/learning.py --processes 2                # the two figures of README
    python tests/benchmarks/learning.py --tasks two_agents --scripts maac --seeds 1 2
    python tests/benchmarks/learning.py --tasks tldr --model .cache/smollm2 --seeds 1

The runs are kept in OUTPUT/runs.jsonl, a line each, and one that stands there is not repeated.
From all lines come OUTPUT/learning.md (a table: mean and standard deviation over the seeds) and
OUTPUT/<task>.png (curves, smoothed over five points: mean over the seeds, and the band of one
standard deviation).

Reward is the mean in the last tenth of training. Quarters of training are shown where every
episode is in samples.jsonl, as with a real model. The samples to the threshold are the episodes
(with one turn, joint samples) until the mean of the last 600 reaches it; a run that never does
counts with its whole length.

`--reference` adds the trainers of CoMLRL to the task as_comlrl: the same game, tiny models,
tokenizer and hyper-parameters, as many episodes, on both sides no entropy bonus and no gradient
clipping. What is left of differences: its items are not shuffled, its Adam decays the
weights (0.01), its value heads do not start at zero, and a shared one learns at the actor's rate.
groups_of_4 is as_comlrl with our defaults for the two flags that CoMLRL does not have.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from speed import install_reference

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("maac", "iac_separate", "iac_shared")
CARDS = "--task tests/tasks/hidden_cards.py --num-train-epochs 10 --entropy-coef 0.05"
REAL_MODEL = (
    "--max-new-tokens 64 --entropy-coef 0 --agent-learning-rate 2e-5"
    " --critic-learning-rate 1e-4 --value-loss-coef 0.1 --rollout-buffer-size 16"
    " --logging-steps 16 --save-interval 0"
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
    "as_comlrl": Setting(
        "--entropy-coef 0 --max-grad-norm 0 --num-generations 4 --num-train-epochs 3",
        0.8,
    ),
    "groups_of_4": Setting("--num-generations 4 --num-train-epochs 3", 0.8),
    "three_agents": Setting(
        "--num-agents 3 --entropy-coef 0.15 --max-grad-norm 0.3", 0.8
    ),
    "two_turns": Setting(
        "--num-turns 2 --early-termination-threshold -0.01 --entropy-coef 0.1",
        0.8,
        offset=1.0,
    ),
    "hidden_cards": Setting(
        f"{CARDS} --num-turns 2",
        0.8,
        metric="rollout/right",
        critics=True,
    ),
    "one_hidden_card": Setting(
        CARDS,
        0.8,
        metric="rollout/right",
        critics=True,
    ),
    "length_ratio": Setting(
        f"--task tests/tasks/length_ratio.py --num-train-epochs 8 {REAL_MODEL}", 0.8
    ),
    "tldr": Setting(
        "--task tests/tasks/tldr.py --train-file tests/posts.jsonl"
        f" --num-train-epochs 8 {REAL_MODEL}",
        0.8 * 2.98,
    ),
}
WINDOW = 600  # episodes
EXPLAINED, SPREAD = "critic/explained_variance", "critic/advantage_std"


@dataclass
class Args:
    """What to measure."""

    tasks: tuple[str, ...] = ("two_agents", "hidden_cards")
    """two_agents, as_comlrl, groups_of_4, three_agents, two_turns, hidden_cards,
    one_hidden_card (the same with one turn), length_ratio, tldr."""
    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to run."""
    seeds: tuple[int, ...] = tuple(range(11, 21))
    """Seeds of the runs; the defaults were chosen on 1 to 10 and 101 to 104."""
    reference: bool = False
    """Run CoMLRL too, as another algorithm of as_comlrl."""
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
    flags += shlex.split(args.flags)
    if REAL_MODEL in setting.flags:
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
    curves = {"reward": [], EXPLAINED: [], SPREAD: []}
    for line in train:
        line["reward"] = line[setting.metric] + setting.offset
        for name in curves.keys() & line.keys():
            curves[name].append((generations * line["step"], line[name]))
    before = setting.metric.replace("rollout", "eval")
    episodes = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    rewards = [s["reward"] for s in episodes if s["phase"] == "train"]
    whole = len(rewards) == generations * lines[-1]["step"]
    return {
        "curves": curves,
        "untrained": evaluations[0][before] + setting.offset,
        "turns": float(np.mean([line["rollout/turns"] for line in train[-10:]])),
        "seconds": lines[-1]["time/seconds"],
        "rewards": rewards if whole else None,
        "folder": str(folder),
    }


def reference(script: str, seed: int, args: Args) -> dict:
    """One run of CoMLRL's trainer with our tiny models of that seed and our hyper-parameters."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoModel, AutoModelForCausalLM

    import common
    import maac

    flags = shlex.split(f"{SETTINGS['as_comlrl'].flags} {args.flags} --device cpu")
    ours = tyro.cli(maac.Args, args=[*flags, "--seed", str(seed)])
    same = "rollout_buffer_size max_new_tokens temperature top_p value_loss_coef"
    same += " agent_learning_rate critic_learning_rate advantage_normalization"
    same += " num_generations num_train_epochs"
    config = {name: getattr(ours, name) for name in same.split()} | {"top_k": 0}
    config |= {} if script == "maac" else {"value_clip_range": 0.2}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = ("agent", AutoModelForCausalLM), ("critic", AutoModel)
        for role, auto_class in pairs:
            two = common.load_learners(role, auto_class, ["tiny"] * 2, 2, ours)
            for learner in two:
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
    rewards = np.array(result["rewards"])  # one per item
    points = [
        (ours.num_generations * end, float(rewards[end - 100 : end].mean()))
        for end in range(100, len(rewards) + 1, 100)
    ]
    return {
        "curves": {"reward": points},
        "untrained": None,
        "turns": 1.0,
        "seconds": result["seconds"],
    }


def measure(algorithm: str, task: str, seed: int, args: Args) -> dict:
    """One run: its curves, and what it was."""
    start = time.perf_counter()
    if algorithm.startswith("CoMLRL"):
        result = reference(algorithm.split()[-1], seed, args)
    else:
        result = ours(algorithm, task, seed, args)
    result["process_seconds"] = time.perf_counter() - start
    return {"task": task, "algorithm": algorithm, "seed": seed, **result}


def figures(run: dict) -> dict[str, float]:
    """What the curve of a run's reward says; a point counts as often as it has episodes."""
    samples, rewards = map(np.array, zip(*run["curves"]["reward"], strict=True))
    episodes = np.diff(samples, prepend=0)
    needed, reached = samples[-1], False
    for end in samples[samples >= min(WINDOW, samples[-1])]:
        window = (samples > end - WINDOW) & (samples <= end)
        mean = np.average(rewards[window], weights=episodes[window])
        if mean >= SETTINGS[run["task"]].threshold:
            needed, reached = end, True
            break
    tenth = samples > 0.9 * samples[-1]
    return {
        "reward": float(np.average(rewards[tenth], weights=episodes[tenth])),
        "samples": int(needed),
        "reached": bool(reached),
    }


def quarters(runs: list[dict]) -> str:
    """The mean reward in each quarter of training, and its standard error, over the episodes of
    all runs; a dash unless samples.jsonl has all of them."""
    if not all(run.get("rewards") for run in runs):
        return "-"
    parts = zip(*(np.array_split(run["rewards"], 4) for run in runs), strict=True)
    joined = [np.concatenate(part) for part in parts]
    means = [f"{x.mean():.2f} ({x.std(ddof=1) / len(x) ** 0.5:.2f})" for x in joined]
    return " → ".join(means)


def groups(results: list[dict]) -> Iterator[tuple[str, str, list[dict]]]:
    """The runs of each task and algorithm."""
    for task, algorithm in dict.fromkeys((r["task"], r["algorithm"]) for r in results):
        runs = [r for r in results if (r["task"], r["algorithm"]) == (task, algorithm)]
        yield task, algorithm, runs


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def at_the_end(run: dict, name: str) -> float | None:
    """A critic's metric in the last tenth of training."""
    curve = [value for _, value in run["curves"].get(name, [])]
    return float(np.mean(curve[-max(1, len(curve) // 10) :])) if curve else None


def table(results: list[dict]) -> str:
    """A Markdown table with a row per task and algorithm."""
    heads = "task | algorithm | seeds | untrained | reward | lowest; median; highest"
    heads += " | samples to threshold | reached | quarters (standard error) | turns"
    heads += " | explained variance | advantage std | seconds"
    rows = [f"| {heads} |", "|" + "---|" * len(heads.split(" | "))]
    for task, algorithm, runs in groups(results):
        found = [figures(run) for run in runs]
        rewards = [f["reward"] for f in found]
        three = [np.min(rewards), np.median(rewards), np.max(rewards)]
        cells = [
            task,
            algorithm,
            str(len(runs)),
            spread([run["untrained"] for run in runs], 2),
            spread(rewards, 3),
            "; ".join(f"{value:.3f}" for value in three),
            spread([f["samples"] for f in found], 0),
            f"{sum(f['reached'] for f in found)} of {len(runs)}",
            quarters(runs),
            spread([run["turns"] for run in runs], 2),
            spread([at_the_end(run, EXPLAINED) for run in runs], 2),
            spread([at_the_end(run, SPREAD) for run in runs], 2),
            f"{np.median([run['seconds'] for run in runs]):.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
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
            mean, deviation = values.mean(0), values.std(0, ddof=min(1, len(runs) - 1))
            style = "--" if "CoMLRL" in algorithm else "-"
            (line,) = axes.plot(grid, mean, style, label=f"{algorithm} ({len(runs)})")
            color = line.get_color()
            axes.fill_between(
                grid, mean - deviation, mean + deviation, alpha=0.2, color=color
            )
        axes.set(title=f"{task}: {title}", xlabel="episodes")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


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
        jobs += [("as_comlrl", f"CoMLRL {script}", seed) for seed, script in pairs]

    def run(job: tuple[str, str, int]) -> None:
        task, algorithm, seed = job
        result = measure(algorithm, task, seed, args)
        done[job] = result
        with open(store, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(*job, figures(result), flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(run, [job for job in jobs if job not in done]))
    results = [done[job] for job in sorted(done)]
    (args.output / "learning.md").write_text(table(results) + "\n")
    print(table(results))
    for task in dict.fromkeys(r["task"] for r in results):
        draw(
            task, [r for r in results if r["task"] == task], args.output / f"{task}.png"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
