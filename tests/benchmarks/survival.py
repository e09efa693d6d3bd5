"""Runs that are killed, or spread over processes.

    python tests/benchmarks/survival.py                      # all parts, hours
    python tests/benchmarks/survival.py --parts kill --kills 20 --scripts maac

kill: the default run is killed (SIGKILL) at random moments, every fourth time within a save,
resumed until it ends, and compared with a run that nobody disturbed.
kill_ranks: the same with two processes: torchrun and both are killed at once.
ranks: two processes of one thread each: that the default run learns, that the other ends soon
when one is killed, and, with --model, the time per joint sample against one process of two
threads.

Exit status 1 if a part fails its bar.
"""

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PAIR = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]


@dataclass
class Args:
    """The parts to run and their sizes."""

    parts: tuple[str, ...] = ("kill", "kill_ranks", "ranks")
    """Functions below."""
    scripts: tuple[str, ...] = ("maac", "iac_separate", "iac_shared")
    """Scripts to try."""
    kills: int = 20
    """Killed runs per script in the part kill, four times those in kill_ranks."""
    model: str | None = None
    """Folder of SmolLM2, for the time per joint sample in the part ranks."""
    flags: str = ""
    """Flags for the runs on the tiny model: --flags='--num-train-epochs 2'."""


def start(script: str, flags: list, launcher: list | None = None, threads="1", **more):
    """A run as a process; output goes to a pipe, and `said` is a file of its stderr."""
    command = [*(launcher or [sys.executable]), str(ROOT / f"{script}.py"), *flags]
    more |= {"env": {**os.environ, "OMP_NUM_THREADS": threads}, "text": True}
    more |= {"stdout": subprocess.PIPE, "stderr": tempfile.TemporaryFile("w+")}  # noqa: SIM115
    run = subprocess.Popen(command, **more)
    run.said = more["stderr"]
    return run


def started(script: str, flags: list, scratch: str, *more):
    """Start a run; it and its folder, as soon as that is there."""
    run = start(script, [*flags, "--output-dir", scratch], *more)
    while not (found := list(Path(scratch).glob("*/metrics.jsonl"))):
        time.sleep(0.001)
        if run.poll() is not None:
            finish(run)
    return run, found[0].parent


def finish(run: subprocess.Popen) -> tuple[Path, float]:
    """Wait for a run; its folder and the seconds since the call."""
    begin = time.perf_counter()
    out, _ = run.communicate()
    if run.returncode:
        run.said.seek(0)
        sys.exit(f"{run.args} ended with {run.returncode}: {run.said.read()[-3000:]}")
    return Path(out.split("run folder: ")[-1].strip()), time.perf_counter() - begin


def children(run: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, none for a plain run."""
    found = subprocess.run(["pgrep", "-P", str(run.pid)], stdout=subprocess.PIPE)  # noqa: PLW1510
    return [int(word) for word in found.stdout.split()]


def weights(folder: Path) -> dict[str, object]:
    """The tensors of a run's checkpoint and of its agents' folders."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors = dict(state["weights"])
    for name, optimizer in state["optimizers"].items():
        for number, moments in optimizer["state"].items():
            tensors[f"{name} optimizer {number}"] = moments
    for path in folder.glob("agent_*/model.safetensors"):
        tensors[path.parent.name + " saved"] = load_file(path)
    return {f"{x}: {k}": t for x, named in tensors.items() for k, t in named.items()}


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs must have in common: weights, moments, lines without times."""
    result = weights(folder)
    for name in ("metrics.jsonl", "samples.jsonl"):
        result[name] = [json.loads(line) for line in (folder / name).open()]
        for line in result[name]:
            for key in [key for key in line if key.startswith("time/")]:
                del line[key]
    return result


def same(one: dict, other: dict) -> bool:
    """Whether two outcomes are equal, weights to the bit."""
    return one.keys() == other.keys() and all(
        value == other[name] if isinstance(value, list) else value.equal(other[name])
        for name, value in one.items()
    )


def killed_run(script, flags, launcher, moment: float, in_save: bool) -> tuple:
    """Kill a run `moment` seconds after its folder was made, or in the first save that is under
    way after that; its folder, and where it stood."""
    with tempfile.TemporaryDirectory() as scratch:
        run, folder = started(script, flags, scratch, launcher)
        time.sleep(moment)
        unfinished = folder / "checkpoint.unfinished"
        while in_save and run.poll() is None and not unfinished.exists():
            pass
        if run.poll() is None:
            subprocess.call(["kill", "-KILL", str(run.pid), *map(str, children(run))])
        run.communicate()
        if run.returncode != -signal.SIGKILL:  # it was faster than the undisturbed one
            return killed_run(script, flags, launcher, 0.9 * moment, in_save)
        kept = Path(tempfile.mkdtemp()) / folder.name
        folder.rename(kept)
    saved, torn = kept / "checkpoint.pt", (kept / unfinished.name).exists()
    updates = torch.load(saved)["counts"]["updates"] if saved.exists() else "no"
    return kept, f"{updates} updates saved{', in a save' * torn}"


def kill(args: Args, script: str, launcher: list[str] | None = None) -> bool:
    """Kill, resume, compare."""
    flags = [*args.flags.split(), "--save-interval", "20"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, seconds = finish(started(script, flags, scratch, launcher)[0])
        whole = outcome(folder)

    def one(plan: tuple[float, bool]) -> bool:
        kept, where = killed_run(script, flags, launcher, *plan)
        folder, _ = finish(start(script, ["--resume", str(kept)], launcher))
        equal = same(outcome(folder), whole)
        verdict = "same" if equal else f"DIFFERENT, see {kept}"
        print(f"{script}, killed after {plan[0]:5.1f} s, {where}: {verdict}")
        if equal:
            shutil.rmtree(kept.parent)
        return equal

    kills, moments = math.ceil(args.kills / (4 if launcher else 1)), random.Random(0)
    plans = [(moments.uniform(0, seconds), k % 4 == 3) for k in range(kills)]
    with ThreadPoolExecutor(1 if launcher else 2) as pool:
        results = list(pool.map(one, plans))
    print(f"{script}, ranks {1 + bool(launcher)}: {sum(results)} of {kills} the same")
    return all(results)


kill_ranks = partial(kill, launcher=PAIR)


def learns(script: str, flags: list[str]) -> bool:
    """Whether a default run of two ranks ends with a mean reward of 0.9 in the last tenth."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, seconds = finish(started(script, flags, scratch, PAIR)[0])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    tenth = statistics.mean(rewards[-math.ceil(len(rewards) / 10) :])
    print(f"{script}, 2 ranks: {tenth:.3f} at the end, {seconds:.0f} s")
    return tenth >= 0.9


def survives(script: str, flags: list[str], victim: int) -> bool:
    """Kill one of two ranks; whether all have ended within 30 s."""
    with tempfile.TemporaryDirectory() as scratch:
        run, folder = started(script, flags, scratch, PAIR)
        while not (folder / "checkpoint.pt").exists():
            time.sleep(0.1)
        workers, begin = children(run), time.perf_counter()
        os.kill(workers[victim], signal.SIGKILL)
        run.communicate()
    seconds = time.perf_counter() - begin
    alive = [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    print(f"{script}: rank {victim} killed, {alive} left, {seconds:.1f} s")
    return seconds < 30 and not alive


def ranks(args: Args, script: str) -> bool:
    """Two processes: learning, the death of one, time per joint sample."""
    flags = [*args.flags.split(), "--save-interval", "20"]
    good = learns(script, flags)
    good &= survives(script, flags, 0) & survives(script, flags, 1)
    return good & (args.model is None or ranks_on_a_real_model(script, args.model))


def ranks_on_a_real_model(script: str, model: str) -> bool:
    """The time per joint sample of 2 ranks of one thread over that of a process of two."""
    flags = f"--agent-model {model} --task {ROOT}/tests/tasks/length_ratio.py"
    flags += " --max-new-tokens 64 --rollout-buffer-size 16 --micro-batch-size 4"
    flags += " --agent-learning-rate 2e-5 --critic-learning-rate 1e-4 --entropy-coef 0"
    flags += " --num-train-epochs 1 --eval-num-samples 1 --logging-steps 1"
    flags += " --dtype bfloat16 --save-interval 0"
    rates = []
    for more in ((PAIR, "1"), (None, "2")):
        with tempfile.TemporaryDirectory() as scratch:
            folder, _ = finish(started(script, flags.split(), scratch, *more)[0])
            lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
            rates.append(lines[-2]["time/samples_per_second"])
    two, one = (1 / rate for rate in rates)
    text = f"{two:.2f} s per joint sample with 2 ranks, {one:.2f} s with one process"
    print(f"{script}, SmolLM2: {text}: {two / one:.2f}")
    return two / one <= 1.1


def main(args: Args) -> None:
    """Run the parts; exit 1 if one fails its bar."""
    sys.stdout.reconfigure(line_buffering=True)
    results = {p: [globals()[p](args, s) for s in args.scripts] for p in args.parts}
    print(results)
    sys.exit(not all(map(all, results.values())))


if __name__ == "__main__":
    main(tyro.cli(Args))
