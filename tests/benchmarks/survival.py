"""Runs that are killed, watched for long, saved often, or spread over processes.

    python tests/benchmarks/survival.py                      # all parts, more than an hour
    python tests/benchmarks/survival.py --parts kill --kills 20 --scripts maac

kill: the default run is killed (SIGKILL) at random moments, every fourth time within a save,
resumed until it ends, and compared with a run that nobody disturbed: weights and value heads
to the bit, metrics.jsonl and samples.jsonl line by line, times aside.
cost: the seconds that saving every 20 updates adds to the default run, and their share of it.
memory: resident memory after 500 updates and after --updates of them.
ranks: two processes of one thread each: that the default run learns, that the other process
ends soon when one is killed, and, with --model, the time per joint sample against one
process of two threads.

Exit status 1 if a part fails its bar.
"""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("maac", "iac_separate", "iac_shared")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@dataclass
class Args:
    """The parts to run and their sizes."""

    parts: tuple[str, ...] = ("kill", "cost", "memory", "ranks")
    """kill, cost, memory, ranks."""
    scripts: tuple[str, ...] = SCRIPTS
    """Scripts to try."""
    kills: int = 20
    """Killed runs per script."""
    processes: int = 2
    """Runs at the same time in the part kill, one thread each."""
    updates: int = 20_000
    """Updates of the part memory."""
    seeds: int = 1
    """Runs of two ranks per script in the part ranks."""
    model: str | None = None
    """Folder of SmolLM2, for the time per joint sample in the part ranks."""
    seed: int = 0
    """Seed of the moments at which runs are killed."""
    flags: str = ""
    """Flags for the runs of the parts kill, cost and ranks: '--num-train-epochs 2'."""


def start(script: str, flags: list[str], launcher: list[str] | None = None, **more):
    """A run as a process; output goes to a pipe, and what it says on stderr to a file."""
    command = [*(launcher or [sys.executable]), str(ROOT / f"{script}.py"), *flags]
    environment = more.pop("env", ONE_THREAD)
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    out = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
    run = subprocess.Popen(command, env=environment, **out, **more)
    run.said = said
    return run


def finish(run: subprocess.Popen) -> tuple[Path, float]:
    """Wait for a run; its folder and the seconds since the call."""
    begin = time.perf_counter()
    out, _ = run.communicate()
    if run.returncode:
        run.said.seek(0)
        sys.exit(f"{run.args} ended with {run.returncode}: {run.said.read()[-3000:]}")
    return Path(out.split("run folder: ")[-1].strip()), time.perf_counter() - begin


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs must have in common: weights, value heads, lines without times."""
    result: dict[str, object] = {}
    for path in sorted(folder.glob("*_*/*")):
        if path.suffix == ".safetensors":
            result[str(path.relative_to(folder))] = load_file(path)
        elif path.suffix == ".pt":
            weights = torch.load(path, weights_only=True)
            result[str(path.relative_to(folder))] = weights
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = map(json.loads, (folder / name).read_text().splitlines())
        result[name] = [
            {k: v for k, v in line.items() if not k.startswith("time/")}
            for line in lines
        ]
    return result


def same(one: dict, other: dict) -> bool:
    """Whether two outcomes are equal, weights to the bit."""
    if one.keys() != other.keys():
        return False
    for name, value in one.items():
        if isinstance(value, list):
            if value != other[name]:
                return False
        elif value.keys() != other[name].keys() or not all(
            torch.equal(value[k], other[name][k]) for k in value
        ):
            return False
    return True


def started(script: str, flags: list[str], scratch: str):
    """Start a run; it and its folder, as soon as that is there."""
    run = start(script, [*flags, "--output-dir", scratch])
    while not (found := list(Path(scratch).glob("*/args.json"))):
        time.sleep(0.001)
        if run.poll() is not None:
            sys.exit(f"{script} {' '.join(flags)} ended with {run.returncode}")
    return run, found[0].parent


def killed_run(
    script: str, flags: list[str], moment: float, in_save: bool
) -> tuple[Path, str]:
    """Start a run and kill it at `moment` seconds after its folder was made.

    in_save: kill it in the first save that is under way after that moment.
    Returns its folder, and where it stood.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run, folder = started(script, flags, scratch)
        time.sleep(moment)
        unfinished = folder / "checkpoint" / "unfinished"
        while in_save and run.poll() is None and not unfinished.exists():
            pass
        run.send_signal(signal.SIGKILL)
        run.communicate()
        if run.returncode != -signal.SIGKILL:  # it was faster than the undisturbed one
            return killed_run(script, flags, 0.9 * moment, in_save)
        torn = "in a save" if unfinished.exists() else ""
        saved = sorted(p.name[7:15] for p in folder.glob("checkpoint/update_*"))
        kept = Path(tempfile.mkdtemp()) / folder.name
        folder.rename(kept)
    return kept, f"{torn} checkpoints {saved}"


def part_kill(args: Args) -> bool:
    """Kill, resume, compare."""
    good = True
    for script in args.scripts:
        flags = [*args.flags.split(), "--save-interval", "20"]
        with tempfile.TemporaryDirectory() as scratch:
            folder, seconds = finish(started(script, flags, scratch)[0])
            undisturbed = outcome(folder)
        moments = random.Random(args.seed)
        plans = [(moments.uniform(0, seconds), k % 4 == 3) for k in range(args.kills)]

        def one(
            plan: tuple[float, bool], script=script, flags=flags, whole=undisturbed
        ):
            kept, where = killed_run(script, flags, *plan)
            folder, _ = finish(start(script, ["--resume", str(kept)]))
            equal = same(outcome(folder), whole)
            verdict = "same" if equal else f"DIFFERENT ({kept})"
            print(
                f"{script}, killed at {plan[0]:5.1f} s, {where}: {verdict}", flush=True
            )
            if equal:
                subprocess.run(["rm", "-r", str(kept.parent)], check=True)
            return equal

        with ThreadPoolExecutor(args.processes) as pool:
            results = list(pool.map(one, plans))
        print(f"{script}: {sum(results)} of {len(results)} bit-identical", flush=True)
        good &= all(results)
    return good


def part_cost(args: Args) -> bool:
    """Time what save_checkpoint takes in a default run."""
    code = (
        "import sys, time; sys.path.insert(0, {root!r}); import common, {script} as script\n"
        "spent = []; whole = common.Run.save_checkpoint\n"
        "def timed(run):\n"
        "    begin = time.perf_counter(); whole(run)\n"
        "    spent.append(time.perf_counter() - begin)\n"
        "common.Run.save_checkpoint = timed\n"
        "flags = {flags!r} + ['--output-dir', {folder!r}, '--save-interval', '20']\n"
        "args = common.parse_args(script.Args, flags)\n"
        "begin = time.perf_counter(); script.train(args)\n"
        "print('seconds', time.perf_counter() - begin, sum(spent), len(spent))\n"
    )
    good = True
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            text = code.format(
                root=str(ROOT), script=script, folder=folder, flags=args.flags.split()
            )
            done = subprocess.run(
                [sys.executable, "-c", text], check=True, capture_output=True, text=True
            )
        words = done.stdout.split("seconds ")[-1].split()
        whole, saves, count = float(words[0]), float(words[1]), int(words[2])
        share = saves / (whole - saves)
        print(
            f"{script}: {count} saves, {saves / count * 1000:.0f} ms each,"
            f" {100 * share:.1f} % of {whole:.0f} s",
            flush=True,
        )
        good &= share <= 0.05
    return good


def resident(process: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000


def part_memory(args: Args) -> bool:
    """Memory after 500 updates and at the end."""
    good = True
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as scratch:
            epochs = -(-args.updates * 8 // 1000)
            flags = ["--rollout-buffer-size", "8", "--num-train-epochs", str(epochs)]
            flags += ["--logging-steps", "8", "--output-dir", scratch]
            run = start(script, flags)
            measured: list[tuple[int, float]] = []
            while run.poll() is None:
                time.sleep(0.5)
                for path in Path(scratch).glob("*/metrics.jsonl"):
                    with open(path, "rb") as file:
                        file.seek(max(0, path.stat().st_size - 5000))
                        update = re.findall(rb'"update": (\d+)', file.read())
                    if update and run.poll() is None:
                        measured.append((int(update[-1]), resident(run.pid)))
            finish(run)
        first = next(memory for update, memory in measured if update >= 500)
        last, end = measured[-2]
        growth = 100 * (end / first - 1)
        print(
            f"{script}: {first:.0f} MB after 500 updates, {end:.0f} MB after {last}"
            f" ({growth:+.1f} %), at most {max(m for _, m in measured):.0f} MB",
            flush=True,
        )
        good &= growth <= 5
    return good


def learned(script: str, seed: int, flags: list[str], launcher: list[str]) -> float:
    """The mean reward in the last tenth of a default run."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = [*flags, "--seed", str(seed), "--output-dir", scratch]
        folder, _ = finish(start(script, flags, launcher))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    tenth = statistics.mean(rewards[-(len(rewards) // 10) :])
    print(
        f"{script}, 2 ranks, seed {seed}: {rewards[0]:.3f} at first, {tenth:.3f} in the"
        f" last tenth, {lines[-1]['time/seconds']:.0f} s",
        flush=True,
    )
    return tenth


def part_ranks(args: Args) -> bool:
    """Two processes: learning, the death of one, time per joint sample."""
    good = True
    pair = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    for script in args.scripts:
        flags = [*args.flags.split(), "--save-interval", "20"]
        seeds = range(1, args.seeds + 1)
        tenths = [learned(script, seed, flags, pair) for seed in seeds]
        good &= sum(tenth >= 0.9 for tenth in tenths) >= 0.9 * args.seeds
        for victim in (0, 1):
            with tempfile.TemporaryDirectory() as scratch:
                run = start(script, [*flags, "--output-dir", scratch], pair)
                while not list(Path(scratch).glob("*/checkpoint/update_*")):
                    time.sleep(0.1)
                workers = subprocess.run(
                    ["pgrep", "-P", str(run.pid)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout.split()
                os.kill(int(workers[victim]), signal.SIGKILL)
                begin = time.perf_counter()
                run.communicate()
                seconds = time.perf_counter() - begin
            alive = [w for w in workers if Path(f"/proc/{w}").exists()]
            print(
                f"{script}: rank {victim} killed, all ended after {seconds:.1f} s, alive {alive}",
                flush=True,
            )
            good &= seconds < 30 and not alive
        if args.model:
            good &= ranks_on_a_real_model(script, args.model)
    return good


def ranks_on_a_real_model(script: str, model: str) -> bool:
    """The time per joint sample of 2 ranks of one thread over that of a process of two."""
    flags = (
        f"--agent-model {model} --task length_ratio --max-new-tokens 64 --entropy-coef 0"
        " --agent-learning-rate 2e-5 --critic-learning-rate 1e-4 --rollout-buffer-size 16"
        " --micro-batch-size 4 --num-train-epochs 1 --logging-steps 1 --eval-num-samples 1"
        " --dtype bfloat16 --save-interval 0"
    ).split()
    rates = []
    for launcher, threads in (
        ([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], "1"),
        (None, "2"),
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        with tempfile.TemporaryDirectory() as scratch:
            run = start(
                script, [*flags, "--output-dir", scratch], launcher, env=environment
            )
            folder, _ = finish(run)
            lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
            rates.append(lines[-2]["time/samples_per_second"])
    ratio = rates[1] / rates[0]
    print(
        f"{script}, SmolLM2: {1 / rates[0]:.2f} s per joint sample with 2 ranks,"
        f" {1 / rates[1]:.2f} s with one process: {ratio:.2f}",
        flush=True,
    )
    return ratio <= 1.1


def main(args: Args) -> None:
    """Run the parts; exit 1 if one fails its bar."""
    parts = {
        "kill": part_kill,
        "cost": part_cost,
        "memory": part_memory,
        "ranks": part_ranks,
    }
    results = {part: parts[part](args) for part in args.parts}
    print(results)
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main(tyro.cli(Args))
