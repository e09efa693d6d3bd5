"""Measure learning: algorithms x tasks x seeds, whole runs as a user starts them.

    python tests/benchmarks/learning.py --processes 2            # the two figures of README
    python tests/benchmarks/learning.py --tasks two_agents --scripts maac --seeds 1 2

Runs are kept in OUTPUT/runs.jsonl, and one that stands there is not repeated. From all of them
come OUTPUT/learning.md (mean and standard deviation over the seeds) and OUTPUT/<task>.png (the
same of curves, smoothed over five points).

Reward is the mean in the last tenth of training. Quarters of training are shown where every
episode is in samples.jsonl, as with a real model. The samples to the threshold are the episodes
(with one turn, joint samples) until the mean of the last 600 reaches it; a run that never does
counts with its whole length.

`--reference` adds the trainers of CoMLRL to the task as_comlrl: the same game, tiny models,
tokenizer and hyper-parameters, as many episodes, on both sides no entropy bonus, no gradient
clipping, Adam's β2 of 0.999. What is left of differences: its items are not shuffled, its Adam
decays the weights (0.01), its value heads do not start at zero, and a shared one learns at the
actor's rate. groups_of_4 is as_comlrl with our defaults for the three flags that CoMLRL lacks.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import tyro
from speed import SCRIPTS, install_reference, run, table

ROOT = Path(__file__).resolve().parents[2]
GROUPS = "--num-generations 4 --num-train-epochs 3"
CARDS = "--task tests/tasks/hidden_cards.py --num-train-epochs 10 --entropy-coef 0.05"
REAL_MODEL = (
    "--max-new-tokens 64 --entropy-coef 0 --agent-learning-rate 2e-5"
    " --critic-learning-rate 1e-4 --rollout-buffer-size 16"
    " --logging-steps 16 --save-interval 0 --num-train-epochs 8"
    " --eval-interval 0 --eval-num-samples 16 --eval-batch-size 16 --log-samples 16"
)


@dataclass
class Setting:
    """A task with its flags, and what a reader wants to know of it."""

    flags: str
    metric: str = "rollout/final_reward"  # what is to rise
    threshold: float = 0.8  # 0.8 of the optimum
    offset: float = 0.0  # added to the metric: the cost of a turn in sum_to_target


SETTINGS = {
    "two_agents": Setting(""),
    "as_comlrl": Setting(
        f"--entropy-coef 0 --max-grad-norm 0 --adam-beta2 0.999 {GROUPS}"
    ),
    "groups_of_4": Setting(GROUPS),
    "three_agents": Setting("--num-agents 3 --entropy-coef 0.1"),
    "two_turns": Setting(
        "--num-turns 2 --early-termination-threshold -0.01 --entropy-coef 0.15"
        " --num-train-epochs 30",
        offset=1.0,
    ),
    "hidden_cards": Setting(f"{CARDS} --num-turns 2", "rollout/right"),
    "one_hidden_card": Setting(CARDS, "rollout/right"),
    "length_ratio": Setting(f"--task tests/tasks/length_ratio.py {REAL_MODEL}"),
    "tldr": Setting(
        f"--task tests/tasks/tldr.py --train-file tests/posts.jsonl {REAL_MODEL}",
        threshold=0.8 * 2.98,
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


def ours(task: str, seed: int, script: str, args: Args) -> dict:
    """One run as a user starts it: its curves and figures."""
    setting = SETTINGS[task]
    command = [sys.executable, str(ROOT / f"{script}.py"), "--seed", str(seed)]
    command += shlex.split(f"{setting.flags} {args.flags}")
    if REAL_MODEL in setting.flags:
        command += ["--agent-model", args.model]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    folder = Path(done.stdout.split("run folder: ")[-1].strip())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    train = [line for line in lines if setting.metric in line]
    before = setting.metric.replace("rollout", "eval")
    untrained = next(line[before] for line in lines if before in line)
    generations = json.loads((folder / "args.json").read_text())["num_generations"]
    curves = {"reward": [], EXPLAINED: [], SPREAD: []}
    for line in train:
        line["reward"] = line[setting.metric] + setting.offset
        for name in curves.keys() & line.keys():
            curves[name].append((generations * line["step"], line[name]))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    rewards = [s["reward"] for s in samples if s["phase"] == "train"]
    whole = len(rewards) == generations * lines[-1]["step"]
    return {
        "curves": curves,
        "untrained": untrained + setting.offset,
        "turns": float(np.mean([line["rollout/turns"] for line in train[-10:]])),
        "seconds": lines[-1]["time/seconds"],
        "rewards": rewards if whole else None,
    }


def reference(task: str, seed: int, algorithm: str, args: Args) -> dict:
    """One run of CoMLRL's trainer with our tiny models of that seed and our hyper-parameters."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoModel, AutoModelForCausalLM

    import common
    import maac

    script = algorithm.split()[-1]
    flags = shlex.split(f"{SETTINGS[task].flags} {args.flags} --device cpu")
    ours = tyro.cli(maac.Args, args=[*flags, "--seed", str(seed)])
    same = "rollout_buffer_size max_new_tokens temperature top_p value_loss_coef"
    same += " agent_learning_rate critic_learning_rate advantage_normalization"
    same += " num_generations num_train_epochs"
    config = {name: getattr(ours, name) for name in same.split()} | {"top_k": 0}
    config |= {} if script == "maac" else {"value_clip_range": 0.2}
    spec = {"script": script, "seed": seed, "num_agents": 2, "config": config}
    with tempfile.TemporaryDirectory() as scratch:
        for role, auto_class in ("agent", AutoModelForCausalLM), ("critic", AutoModel):
            spec[f"{role}s"] = [f"{scratch}/{role}_{k}" for k in range(2)]
            for learner in common.load_learners(
                role, auto_class, ["tiny"] * 2, 2, ours
            ):
                learner.model.save_pretrained(f"{scratch}/{learner.name}")
                learner.tokenizer.save_pretrained(f"{scratch}/{learner.name}")
        file = Path(__file__).with_name("reference.py")
        python = install_reference(args.environment)
        out, _ = run([str(python), str(file), json.dumps(spec)])
    result = json.loads(out.splitlines()[-1])
    rewards = result["rewards"]  # one per item
    points = [
        (ours.num_generations * end, float(np.mean(rewards[end - 100 : end])))
        for end in range(100, len(rewards) + 1, 100)
    ]
    curves, seconds = {"reward": points}, result["seconds"]
    return {"curves": curves, "untrained": None, "turns": 1.0, "seconds": seconds}


def figures(run: dict) -> dict[str, float]:
    """What the curve of a run's reward says; a point counts as often as it has episodes."""
    samples, rewards = map(np.array, zip(*run["curves"]["reward"], strict=True))
    episodes = np.diff(samples, prepend=0)
    reached = []
    for end in samples[samples >= min(WINDOW, samples[-1])]:
        window = (samples > end - WINDOW) & (samples <= end)
        mean = np.average(rewards[window], weights=episodes[window])
        if mean >= SETTINGS[run["task"]].threshold:
            reached.append(int(end))
    tenth = samples > 0.9 * samples[-1]
    return {
        "reward": float(np.average(rewards[tenth], weights=episodes[tenth])),
        "samples": min([*reached, int(samples[-1])]),
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


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    if None in values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def at_the_end(run: dict, name: str) -> float | None:
    """A critic's metric in the last tenth of training."""
    curve = [value for _, value in run["curves"].get(name, [])]
    return float(np.mean(curve[-max(1, len(curve) // 10) :])) if curve else None


def row(task: str, algorithm: str, runs: list[dict]) -> list[str]:
    """The cells of a task and algorithm."""
    found = [figures(run) for run in runs]
    rewards = [f["reward"] for f in found]
    three = [np.min(rewards), np.median(rewards), np.max(rewards)]
    return [
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


def draw(task: str, algorithms: dict[str, list[dict]], path: Path) -> None:
    """The curves of a task, and where cards are hidden what the critics explain."""
    from matplotlib.figure import Figure

    names = {"reward": SETTINGS[task].metric.split("/")[1].replace("_", " ")}
    if "hidden" in task:
        names |= {EXPLAINED: "explained variance", SPREAD: "std of the advantages"}
    figure = Figure(figsize=(6.5 * len(names), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for algorithm, runs in algorithms.items():
            curves = [np.array(run["curves"][name]).T for run in runs]
            grid, values = np.linspace(0, min(x[-1] for x, _ in curves), 200), []
            for steps, points in curves:
                points = np.convolve(np.pad(points, 2, "edge"), np.ones(5) / 5, "valid")
                values.append(np.interp(grid, steps, points))
            mean, deviation = np.mean(values, 0), np.std(values, 0, ddof=len(runs) > 1)
            style = "--" if "CoMLRL" in algorithm else "-"
            (line,) = axes.plot(grid, mean, style, label=f"{algorithm} ({len(runs)})")
            band, color = (mean - deviation, mean + deviation), line.get_color()
            axes.fill_between(grid, *band, alpha=0.2, color=color)
        axes.set(title=f"{task}: {title}", xlabel="episodes")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def main(args: Args) -> None:
    """Run what has not been run; write the table and the pictures of all."""
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "runs.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    done = {(r["task"], r["seed"], r["algorithm"]): r for r in map(json.loads, lines)}
    jobs = list(itertools.product(args.tasks, args.seeds, args.scripts))
    if args.reference:
        theirs = [f"CoMLRL {script}" for script in args.scripts]
        jobs += itertools.product(["as_comlrl"], args.seeds, theirs)
    if args.processes > 1:
        os.environ["OMP_NUM_THREADS"] = "1"

    def measure(job: tuple[str, int, str]) -> None:
        task, seed, algorithm = job
        result = (ours if algorithm in SCRIPTS else reference)(*job, args)
        done[job] = {"task": task, "algorithm": algorithm, "seed": seed, **result}
        with open(store, "a") as file:
            file.write(json.dumps(done[job]) + "\n")
        print(*job, figures(done[job]), flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(measure, [job for job in jobs if job not in done]))
    results: dict[str, dict[str, list[dict]]] = {}  # by task and algorithm
    for one in sorted(done.values(), key=itemgetter("task", "algorithm", "seed")):
        results.setdefault(one["task"], {}).setdefault(one["algorithm"], []).append(one)
    rows = []
    for task, algorithms in results.items():
        rows += [row(task, *pair) for pair in algorithms.items()]
        draw(task, algorithms, args.output / f"{task}.png")
    heads = "task | algorithm | seeds | untrained | reward | lowest; median; highest"
    heads += " | samples to threshold | reached | quarters (standard error) | turns"
    text = table(f"{heads} | explained variance | advantage std | seconds", rows)
    (args.output / "learning.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
