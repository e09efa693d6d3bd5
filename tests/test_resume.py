"""Runs that are killed, stopped, damaged or refused, and what is left of them."""

import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from benchmarks.survival import outcome, same, weights
from conftest import small_task, tiny_args

import common
import iac_separate
import maac


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """Neither curves nor TensorBoard, which would take longer than the runs."""
    monkeypatch.setattr(common, "draw_curves", lambda folder: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def flags(script, folder, **changes):
    """A run with everything that could get lost: turns, early ends, minibatches, sampling."""
    busy = {"num_turns": 2, "early_termination_threshold": -0.4, "num_generations": 2}
    busy |= {"train_batch_size": 5, "temperature": 0.9, "num_train_epochs": 2}
    busy |= {"save_interval": 2, "logging_steps": 5, "eval_interval": 7}
    return tiny_args(script, folder, **{**busy, "device": ("cpu",), **changes})


def game(items=10):
    """The default game with every function a user may write; the reward draws random numbers."""
    own = {"formatters": lambda item: item["prompt"]}
    own["metrics_callback"] = lambda samples: {"of_mine": len(samples)}
    task = small_task(items, **own)

    def reward(*completions, batch_items, **_):
        noise = (random.random() + np.random.rand() + torch.rand(()).item()) / 3 - 1
        paid = task.reward_func(*completions, batch_items=batch_items)
        return [x + noise for x in paid]

    return replace(task, reward_func=reward)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """From a script to the folder of its run that nobody disturbed, made once."""
    place = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda script: script.train(flags(script, place), game()))


def saved(folder):
    """The number of updates in a run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["counts"]["updates"]


def ends(script, args, owner, name, patch):
    """The exit status of the script with these arguments, where `owner` has another `name`."""

    def work():
        setattr(owner, name, patch)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal
        common.parse_args = lambda _: args
        common.main(script.Args, lambda args: script.train(args, game()))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def go_on(script, out):
    """The outcome of the command that an ended run printed, with a checkpoint at its end."""
    words = out.split(f"go on with: python {script.__name__}.py ")[1].split()
    words += ["--save-interval", "2"]
    return outcome(script.train(common.parse_args(script.Args, words), game()))


def killed(script, folder, place, call, **changes):
    """The arguments to go on with, once a run was killed (SIGKILL) at the `call`th call of the
    function at `place`, such as "Run.save"; where that writes, with half of it written."""
    args, calls = flags(script, folder, **changes), count(1)
    owner, name = place.split(".")
    owner = {"script": script, "torch": torch}.get(owner) or getattr(common, owner)
    inner = getattr(owner, name)

    def dies(*given, **more):
        if next(calls) == call:
            if place == "torch.save":
                given[1].write(b"half of it")
                given[1].flush()
            if place == "Logs.write":
                (given[0].folder / given[1]).open("a").write("{'half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **more)

    assert ends(script, args, owner, name, dies) == -signal.SIGKILL
    (left,) = folder.iterdir()
    return replace(args, resume=str(left))


@pytest.mark.parametrize(
    "place, call, files",
    [("Run.log_evaluation", 1, 0), ("script.update", 2, 0), ("script.step", 28, 1),
     ("Logs.write", 20, 1), ("script.evaluate", 3, 1), ("torch.save", 2, 2),
     ("Path.replace", 3, 2), ("Run.save", 1, 1)],
)  # fmt: skip
def test_20_a_resumed_run_is_the_run(script, whole, place, call, files, tmp_path):
    """Killed anywhere, with half a line or checkpoint written too: the same to the bit."""
    args = killed(script, tmp_path, place, call)
    assert len(list(Path(args.resume).glob("checkpoint*"))) == files
    folder = script.train(args, game())
    assert str(folder) == args.resume
    assert same(outcome(folder), outcome(whole(script)))
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.parametrize("how", ["cut", "flip", "zero"])
def test_a_damaged_checkpoint_is_refused_by_name(whole, how, tmp_path):
    """At ten places each; where the damaged bytes mean nothing, what is loaded is the same."""
    data, refused = (whole(maac) / "checkpoint.pt").read_bytes(), 0
    for k in range(10):
        left, at = tmp_path / f"{k}", k * (len(data) - 1) // 9
        checkpoint = shutil.copytree(whole(maac), left) / "checkpoint.pt"
        ways = {"cut": b"", "zero": bytes(64) + data[at + 64 :]}
        ways["flip"] = bytes([data[at] ^ 1 << k % 8]) + data[at + 1 :]
        checkpoint.write_bytes(data[:at] + ways[how])
        try:
            maac.train(flags(maac, tmp_path, resume=str(left)), game())
        except common.InputError as error:
            assert f"checkpoint '{checkpoint}' is damaged" in str(error)
            refused += 1
        else:
            assert same(outcome(left), outcome(whole(maac)))
    assert refused >= 5


def test_a_checkpoint_runs_no_code(whole, tmp_path):
    """A pickle that would run a command is refused, though its checksums are right."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    left = shutil.copytree(whole(maac), tmp_path / "left")
    torch.save({"weights": Evil()}, left / "checkpoint.pt")
    with pytest.raises(common.InputError, match="is damaged: UnpicklingError: Weights"):
        maac.train(flags(maac, tmp_path, resume=str(left)), game())
    assert not (tmp_path / "ran").exists()


def test_another_run_is_not_resumed(script, whole, tmp_path):
    """What differs is named, whatever it is but one of RunArgs, and nothing is touched; nor does
    one of another script go on, or one whose args.json is nonsense."""
    left = shutil.copytree(whole(script), tmp_path / "left")
    args, file = flags(script, tmp_path, resume=str(left)), left / "args.json"
    own, free = json.loads(file.read_text()), vars(common.RunArgs())
    assert {"script", "ranks", "task_name", "train_items", "seed"} < own.keys() - free
    for name in own.keys() - free:
        file.write_text(json.dumps({**own, name: "another"}))
        before = {path: path.read_bytes() for path in left.rglob("*.*")}
        why = f"cannot be resumed: {name} was 'another' and is {own[name]!r}"
        with pytest.raises(common.InputError, match=re.escape(why)):
            script.train(args, game())
        assert {path: path.read_bytes() for path in left.rglob("*.*")} == before
    (left / "checkpoint.pt").unlink()
    with pytest.raises(common.InputError, match=re.escape(why)):
        script.train(args, game())
    other = iac_separate if script is maac else maac
    file.write_text(json.dumps(own))
    with pytest.raises(common.InputError, match=f"it is one of {script.__name__}.py"):
        common.parse_args(other.Args, ["--resume", str(left)])
    for text in ("", '{"colour": 1}', "[]"):
        file.write_text(text)
        with pytest.raises(common.InputError, match="cannot be resumed"):
            script.train(args, game())
        with pytest.raises(common.InputError, match="is no run of this script"):
            common.parse_args(script.Args, ["--resume", str(left)])


def test_what_prolongs_places_or_logs_a_run_may_change(script, whole, tmp_path):
    """One epoch, then a second, with every flag of RunArgs but W&B's another: the weights are
    those of two at once. On the command line the run's own stand for the other flags."""
    args = flags(script, tmp_path, num_train_epochs=1)
    folder = script.train(args, game())
    again, one = replace(args, resume=str(folder)), weights(folder)
    script.train(again, game())
    assert same(weights(folder), one)
    line = f"--resume {folder} --num-train-epochs 2 --output-dir y --device cpu cpu"
    line += " --save-interval 1 --eval-interval 0 --eval-num-samples 2"
    line += " --eval-batch-size 1 --logging-steps 3 --log-samples 0"
    parsed = common.parse_args(script.Args, line.split())
    changed = {k for k, v in vars(parsed).items() if v != getattr(args, k)}
    assert changed == {x.name for x in fields(common.RunArgs)} - {"wandb_config"}
    assert script.train(parsed, game()) == folder
    assert same(weights(folder), weights(whole(script)))
    with pytest.raises(common.InputError, match="has played 20 items already"):
        script.train(again, game())
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(common.InputError, match="is finished and has no checkpoint"):
        script.train(replace(again, num_train_epochs=5), game())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_signals(script, whole, number, times, tmp_path, capfd):
    """One in an update, which is finished, saved and gone on with; a second stops at once."""
    calls = count(1)

    def update(*given, inner=script.update):
        for _ in range(times if next(calls) == 3 else 0):
            signal.raise_signal(number)
        return inner(*given)

    args = flags(script, tmp_path, save_interval=0)
    status = ends(script, args, script, "update", update)
    (left,), (out, err) = tmp_path.iterdir(), capfd.readouterr()
    assert "stopping after this update; once more stops at once" in err
    if times == 2:
        assert status == (130 if number == signal.SIGINT else -signal.SIGTERM)
        assert not (left / "checkpoint.pt").exists() and "go on" not in out
    else:
        assert status == 128 + number and saved(left) == 3
        assert same(go_on(script, out), outcome(whole(script)))


def test_a_signal_that_was_ignored_stops_nothing(script, tmp_path):
    """Ctrl-C is not meant for what a shell script started in the background."""
    raised = lambda samples: signal.raise_signal(signal.SIGINT) or {}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        script.train(
            tiny_args(script, tmp_path), small_task(8, metrics_callback=raised)
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_disk_is_one_sentence(script, whole, tmp_path, capfd):
    """From update 4 on no file may grow beyond 500 KB: the checkpoint of update 2 is left."""

    def full(run, inner=common.Run.save_checkpoint):
        if run.updates == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        inner(run)

    args = flags(script, tmp_path)
    assert ends(script, args, common.Run, "save_checkpoint", full) == 2
    (left,), (out, err) = tmp_path.iterdir(), capfd.readouterr()
    sentence = err.strip().split("\n")[-1]
    assert sentence.startswith("error: the checkpoint cannot be written to")
    assert sentence.endswith("(rank 0, after update 4)") and "Traceback" not in err
    assert saved(left) == 2 and not (left / "checkpoint.unfinished").exists()
    assert same(go_on(script, out), outcome(whole(script)))


def test_an_evaluation_that_fails(script, whole, tmp_path, monkeypatch, capsys):
    """The third: what was done is saved, and gone on with. In training: test_cases.py."""
    task, evaluate = game(), Mock(wraps=script.evaluate)

    def fails(*texts, **more):
        if evaluate.call_count == 3:
            raise KeyError("mine")
        return task.reward_func(*texts, **more)

    monkeypatch.setattr(script, "evaluate", evaluate)
    args = flags(script, tmp_path, save_interval=0)
    with pytest.raises(common.InputError) as error:
        script.train(args, replace(task, reward_func=fails))
    (left,), message = tmp_path.iterdir(), str(error.value)
    assert "reward_func: KeyError: 'mine' at" in message
    assert message.endswith(f"(rank 0, after update {saved(left)})")
    assert same(go_on(script, capsys.readouterr().out), outcome(whole(script)))


def test_a_gradient_that_is_not_finite(script, tmp_path):
    """One sentence that names learner and update; of the half update nothing is saved."""
    changes = {"agent_learning_rate": 1e30, "train_batch_size": None}
    with pytest.raises(common.InputError, match=r"^agent_0: .*finite.* update 1\)$"):
        script.train(flags(script, tmp_path, **changes, save_interval=0), game())
    assert not list(tmp_path.glob("*/checkpoint*"))
