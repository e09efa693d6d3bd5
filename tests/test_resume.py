"""Runs that are killed, stopped, damaged or refused, and what is left of them."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.survival import outcome, same
from conftest import ROOT, micro_learner, sample, small_task, tiny_args
from test_pitfalls import save_model

import common

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Killed(BaseException):
    """What stands for SIGKILL inside this process."""


def flags(script, folder, **changes):
    """A run with everything that could get lost: turns, early ends, minibatches, sampling."""
    busy = {
        "num_turns": 2,
        "early_termination_threshold": -0.9,
        "num_generations": 2,
        "train_batch_size": 3,
        "temperature": 0.9,
        "num_train_epochs": 3,
        "save_interval": 2,  # of 3 updates an epoch
        "logging_steps": 5,
        "eval_interval": 7,
    }
    return tiny_args(script, folder, **{**busy, **changes})


def game():
    """The default game of several turns, with a reward that draws random numbers."""
    task = small_task(10)
    inner = task.reward_func

    def reward(*completions, batch_items):
        noise = torch.rand(()).item() - 1
        return [r + noise for r in inner(*completions, batch_items=batch_items)]

    return replace(task, reward_func=reward)


WHOLE = {}


@pytest.fixture
def whole(script, tmp_path_factory):
    """The outcome of a run that nobody disturbed, made once per script."""
    if script not in WHOLE:
        folder = tmp_path_factory.mktemp("whole")
        WHOLE[script] = outcome(script.train(flags(script, folder), game()))
    return WHOLE[script]


def killed(script, folder, method, call, monkeypatch, **changes):
    """A run that dies at the `call`th call of a method of Run; its arguments to go on with."""
    calls = []
    whole = getattr(common.Run, method)

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return whole(*args, **kwargs)

    args = flags(script, folder, **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, method, dies)
        script.train(args, game())
    (left,) = Path(folder).iterdir()
    return replace(args, resume=str(left))


@pytest.mark.parametrize(
    "moment",
    [("log_evaluation", 1), ("log_update", 2), ("log_update", 5), ("log_update", 8),
     ("save_checkpoint", 3), ("log_evaluation", 3), ("append", 20), ("save", 1)],
    ids=str,
)  # fmt: skip
def test_20_a_resumed_run_is_the_run(script, whole, moment, tmp_path, monkeypatch):
    """Before, after and within a save, before the first, in an evaluation, at the end."""
    args = killed(script, tmp_path / "killed", *moment, monkeypatch)
    folder = script.train(args, game())
    assert str(folder) == args.resume
    assert same(outcome(folder), whole)
    assert len(list((folder / "checkpoint").glob("update_*"))) == 2


def test_a_kill_in_the_middle_of_writing(script, whole, tmp_path, monkeypatch):
    """A half-written checkpoint beside two whole ones changes nothing, and is cleared away."""
    save = torch.save

    def torn(state, file):
        if "ranks" in state and state["run"]["updates"] == 9:
            file.write(b"half")
            raise Killed
        save(state, file)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", torn)
        script.train(flags(script, tmp_path / "killed"), game())
    (left,) = (tmp_path / "killed").iterdir()
    assert (left / "checkpoint" / "unfinished").read_bytes() == b"half"
    args = flags(script, tmp_path / "killed", resume=str(left))
    assert same(outcome(script.train(args, game())), whole)
    assert not (left / "checkpoint" / "unfinished").exists()


DAMAGES = [
    (how, place / 9) for how in ("cut", "flip", "zero") for place in range(10)
]  # 30 ways


def damage(path, how, place):
    """Cut a file at a place (0 to 1), flip a bit there, or blank 64 bytes."""
    data = bytearray(path.read_bytes())
    at = min(int(place * len(data)), len(data) - 1)
    if how == "cut":
        data = data[:at]
    elif how == "flip":
        data[at] ^= 1 << (at % 8)
    else:
        before = bytes(data)
        data[at : at + 64] = bytes(len(data[at : at + 64]))
        if data == before:  # there were only zeros
            data[at] = 255
    path.write_bytes(bytes(data))


def test_damaged_checkpoints_are_named_and_passed_over(
    script, whole, tmp_path, monkeypatch, capsys
):
    """Each of 30 ways: the newest is named, the run goes on from the one before."""
    args = killed(script, tmp_path / "killed", "log_update", 9, monkeypatch)
    for number, way in enumerate(DAMAGES):
        left = tmp_path / f"copy{number}"
        shutil.copytree(args.resume, left)
        older, newest = sorted((left / "checkpoint").glob("update_*"))
        damage(newest, *way)
        capsys.readouterr()
        if number % 10 == 0:  # the whole way, too; the others as far as the choice
            folder = script.train(replace(args, resume=str(left)), game())
            assert same(outcome(folder), whole)
        else:
            state, damaged = common.read_checkpoint(left / "checkpoint")
            assert damaged == [newest] and state["run"]["updates"] == 6
        assert f"{newest} is damaged" in capsys.readouterr().err
        if number % 10:
            damage(older, *way)
            with pytest.raises(common.InputError, match="every checkpoint .*damaged"):
                script.train(replace(args, resume=str(left)), game())


def test_a_checkpoint_runs_no_code(script, tmp_path, monkeypatch):
    """A pickle that would run a command is refused, even under a right hash."""
    args = killed(script, tmp_path / "killed", "log_update", 4, monkeypatch)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = Path(args.resume) / "checkpoint"
    torch.save({"ranks": Evil()}, folder / "evil")
    (folder / "evil").rename(folder / f"update_9_{common.digest(folder / 'evil')}.pt")
    with pytest.raises(common.InputError, match="cannot be loaded"):
        script.train(args, game())
    assert not (tmp_path / "executed").exists()


def test_a_model_s_own_code_does_not_run_unasked(script, tmp_path):
    """A repository with code of its own is refused, without a question on the terminal."""
    name = Path(save_model(tmp_path / "model"))
    config = json.loads((name / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "code.Own",
        "AutoModelForCausalLM": "code.OwnModel",
    }
    (name / "config.json").write_text(json.dumps(config))
    (name / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(common.InputError, match="contains custom code"):
        script.train(tiny_args(script, tmp_path, agent_model=str(name)), small_task())
    assert not (tmp_path / "ran").exists()


REFUSED = [
    ({"agent_learning_rate": 1e-4}, "agent_learning_rate was 0.002 and is 0.0001"),
    ({"discount": 0.5}, "discount was 1.0 and is 0.5"),
    ({"seed": 2}, "seed was 1 and is 2"),
    ({"agents": ("tiny", "tiny")}, r"agents was \[\] and is \['tiny', 'tiny'\]"),
    ({"model_config": '{"hidden_size": 32}'}, "model_config was '{}' and is"),
    ({"micro_batch_size": 1}, "micro_batch_size was None and is 1"),
    ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=str)
def test_another_run_is_not_resumed(script, change, message, tmp_path, monkeypatch):
    args = killed(script, tmp_path / "killed", "log_update", 4, monkeypatch)
    before = outcome(Path(args.resume))
    with pytest.raises(common.InputError, match=message):
        script.train(replace(args, **change), game())
    assert same(outcome(Path(args.resume)), before)


def test_a_run_without_a_checkpoint_is_not_another_either(
    script, tmp_path, monkeypatch
):
    args = killed(script, tmp_path / "killed", "log_update", 2, monkeypatch)
    assert list((Path(args.resume) / "checkpoint").glob("update_*")) == []
    with pytest.raises(common.InputError, match="seed was 1 and is 2"):
        script.train(replace(args, seed=2), game())


def test_another_task_or_script_is_not_resumed(script, tmp_path, monkeypatch):
    args = killed(script, tmp_path / "killed", "log_update", 4, monkeypatch)
    with pytest.raises(
        common.InputError, match="number of train items was 10 and is 12"
    ):
        script.train(args, small_task(12))
    with pytest.raises(
        common.InputError, match="task's name was 'task' and is 'sum_to_"
    ):
        script.train(args)
    other = __import__("maac" if script.__name__ != "maac" else "iac_separate")
    args = flags(other, tmp_path, resume=args.resume)
    with pytest.raises(common.InputError, match=f"script was '{script.__name__}'"):
        other.train(args, game())
    with pytest.raises(common.InputError, match="cannot be resumed: .*args.json"):
        script.train(flags(script, tmp_path, resume=str(tmp_path)), game())


def test_a_task_file_that_changed(script, tmp_path):
    path = tmp_path / "mine.py"
    text = "from common import Task\ntask = Task([{'prompt': 'x'}] * 8, lambda a, b: [0.5] * len(a))\n"
    path.write_text(text)
    args = tiny_args(script, tmp_path / "runs", task=str(path), save_interval=1)
    folder = script.train(args)
    path.write_text(text.replace("0.5", "0.6"))
    assert script.train(args) != folder  # what it saves is of the file that it has read
    again = replace(args, resume=str(folder), num_train_epochs=2)
    with pytest.raises(common.InputError, match="task file's hash was"):
        script.train(again)
    path.write_text(text)
    assert script.train(again) == folder


def test_a_finished_run_can_be_prolonged(script, tmp_path):
    """Two epochs, then a third: the weights are those of three at once."""
    three = script.train(flags(script, tmp_path / "whole", eval_interval=0), game())
    args = flags(script, tmp_path / "two", num_train_epochs=2, eval_interval=0)
    folder = script.train(args, game())
    longer = replace(args, resume=str(folder), num_train_epochs=3, logging_steps=4)
    script.train(longer, game())
    with pytest.raises(
        common.InputError, match="has played 30 items, and num_train_ep"
    ):
        script.train(replace(longer, num_train_epochs=1), game())
    weights = [
        {name: tensors for name, tensors in outcome(f).items() if "jsonl" not in name}
        for f in (three, folder)
    ]
    assert same(*weights) and len(weights[0]) >= 2


def test_the_command_line_takes_the_flags_of_the_run(script, tmp_path, monkeypatch):
    """--resume FOLDER is enough; what is given beside it counts."""
    args = killed(script, tmp_path / "killed", "log_update", 4, monkeypatch)
    parsed = common.parse_args(script.Args, ["--resume", args.resume])
    assert parsed == args
    more = ["--resume", args.resume, "--num-train-epochs", "7", "--agents", "a", "b"]
    parsed = common.parse_args(script.Args, more)
    assert parsed == replace(args, num_train_epochs=7, agents=("a", "b"))
    for text in ("", "{", '{"colour": 1}', "[]"):
        (Path(args.resume) / "args.json").write_text(text)
        expected = "no run of this script"
        with pytest.raises(common.InputError, match=expected):
            common.parse_args(script.Args, ["--resume", args.resume])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_after_the_step(
    script, whole, number, tmp_path, monkeypatch, capfd
):
    """Exit status 130 or 143; what the printed command goes on with ends as the whole run."""
    args = flags(script, tmp_path / "stopped", save_interval=0)

    def slow(*given, log_update=common.Run.log_update):
        time.sleep(0.2)
        log_update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log_update", slow)
        run = multiprocessing.get_context("fork").Process(
            target=script.train, args=(args, game())
        )
        run.start()
        while not any(
            p.stat().st_size for p in tmp_path.glob("stopped/*/metrics.jsonl")
        ):
            time.sleep(0.01)
        os.kill(run.pid, number)
        run.join()
    assert run.exitcode == 128 + number
    (left,) = (tmp_path / "stopped").iterdir()
    command = f"go on with: train(replace(args, resume={str(left)!r}), task)"
    assert command in capfd.readouterr().out
    assert len(list((left / "checkpoint").glob("update_*"))) == 1
    again = script.train(replace(args, resume=str(left)), game())
    assert same(outcome(again), whole)


def test_a_second_signal_stops_at_once(script, tmp_path, monkeypatch):
    """Within one step: the first asks, the second acts as without a handler."""

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(common.Run, "log_update", twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        script.train(flags(script, tmp_path), game())
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_the_command_line_of_a_stopped_run(tmp_path):
    """As a shell sees it: the status, and a command that works as it is printed."""
    command = [sys.executable, str(ROOT / "iac_shared.py")]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "text": True}
    run = subprocess.Popen(
        [*command, "--num-train-epochs", "2", "--eval-num-samples", "9"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options,
    )  # fmt: skip
    while not any(p.stat().st_size for p in tmp_path.glob("runs/*/metrics.jsonl")):
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    words = run.communicate()[0].split("go on with: python ")[1].split()
    assert run.returncode == 143 and words[:2] == [command[1], "--resume"]
    rest = subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, **options
    )
    assert rest.stdout.strip().endswith(f"run folder: {words[2]}")


def test_a_full_disk_is_one_sentence(tmp_path):
    """No file may grow beyond 500 KB: the first checkpoint does not fit, and says so."""
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "import common, iac_separate as script\n"
        "with common.one_sentence_errors():\n"
        "    script.train(common.parse_args(script.Args))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 0
    command = [sys.executable, "-c", code, "--save-interval", "2"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)],
        check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: the checkpoint cannot be written to" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/checkpoint/*"))


def test_a_failed_save_leaves_the_former_checkpoint(
    script, whole, tmp_path, monkeypatch
):
    """The disk is full at the second save: the first is whole, and the run can go on."""
    save = torch.save

    def full(state, file):
        if "ranks" in state and state["run"]["updates"] == 6:
            file.write(b"part of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(common.InputError, match="cannot be written.*No space left"):
            script.train(flags(script, tmp_path / "full"), game())
    (left,) = (tmp_path / "full").iterdir()
    kept = sorted(path.name[:15] for path in (left / "checkpoint").glob("update_*"))
    assert kept == ["update_00000002", "update_00000004"]
    args = flags(script, tmp_path / "full", resume=str(left))
    assert same(outcome(script.train(args, game())), whole)


def test_a_run_folder_that_cannot_be_written(script, tmp_path, monkeypatch):
    args = killed(script, tmp_path / "killed", "log_update", 4, monkeypatch)
    (Path(args.resume) / "checkpoint" / "unfinished").mkdir()
    with pytest.raises(common.InputError, match="the checkpoint cannot be written"):
        script.train(args, game())
    (tmp_path / "file").write_text("")
    with pytest.raises(common.InputError, match="cannot be made"):
        script.train(flags(script, tmp_path / "file" / "runs"), game())


def weights_of(learner):
    return [p.detach().clone() for p in learner.model.parameters()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_touches_no_weight(script, bad):
    """A probability, a value, a loss, a gradient: the sentence names agent and text."""
    decode = {"decode": lambda ids: f"text {ids}"}
    args = script.Args(device="cpu")

    def learner(head=False):
        made = micro_learner(script, head=head)
        made.tokenizer = type(
            "T", (), {"pad_token_id": 0, "decode": staticmethod(decode["decode"])}
        )()
        return made

    actor = learner()
    before = weights_of(actor)
    weights = torch.tensor([1.0, bad])
    samples = [sample([[2, 3]], [[4, 1]]), sample([[3]], [[2]])]
    columns = torch.stack([weights, torch.zeros(2), torch.zeros(2)])
    given = columns if script.__name__ == "iac_shared" else weights
    with pytest.raises(
        common.InputError, match=r"agent_0: policy loss .* for 'text \[3\]'"
    ):
        script.update_actor(actor, samples, 0, given, args)
    hook = actor.model.lm_head.weight.register_hook(lambda g: g * bad)
    fine = torch.ones(3, 2) if script.__name__ == "iac_shared" else torch.ones(2)
    with pytest.raises(common.InputError, match=r"agent_0: gradient \(of 2 texts"):
        script.update_actor(actor, samples, 0, fine, args)
    hook.remove()
    assert actor.optimizer.gradients == []
    assert all(map(torch.equal, before, weights_of(actor)))

    critic = learner(head=True)
    if script.__name__ == "iac_shared":
        columns = torch.stack([torch.ones(2), torch.zeros(2), weights])
        with pytest.raises(common.InputError, match=r"agent_0: value loss .*\[3\]"):
            script.update_actor(critic, samples, 0, columns, args)
    else:
        with pytest.raises(common.InputError, match=r"agent_0: value loss .*\[3\]"):
            script.update_critic(critic, [[2, 3], [3]], weights, args)
    assert critic.optimizer.gradients == []
    with torch.no_grad():
        critic.value_head[0].bias.fill_(bad)
    with pytest.raises(
        common.InputError, match=r"agent_0: value .* for 'text \[2, 3\]"
    ):
        script.estimate_values(critic, [[2, 3]], args)
    with torch.no_grad():
        actor.model.lm_head.weight[3].fill_(bad)
    with pytest.raises(common.InputError, match=r"agent_0: probability nan for 'text"):
        script.generate(actor, [[2]], args)


def test_a_bad_reward_names_agent_update_and_item(script, tmp_path):
    """Nothing is saved from the update that the reward spoilt."""
    seen = []

    def reward(firsts, seconds, batch_items):
        seen.append(batch_items)
        return [float("nan") if len(seen) == 31 else 0.5] * len(firsts)

    args = tiny_args(script, tmp_path, save_interval=1)
    task = replace(small_task(40), reward_func=reward, eval_dataset=None)
    message = r"item \{'prompt': 'target .*finite numbers.*\(after update 3\)"
    with pytest.raises(common.InputError, match=message):
        script.train(args, task)
    saved = sorted(p.name[:15] for p in tmp_path.glob("*/checkpoint/update_*"))
    assert saved == ["update_00000002", "update_00000003"]


def test_no_share_of_a_minibatch_hides_a_gradient(script):
    """A rank without samples of its own looks at the summed gradient too."""
    actor = micro_learner(script)
    actor.tokenizer.decode = str
    for parameter in actor.model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(common.InputError, match=r"gradient \(of 0 texts"):
        common.optimizer_step(actor, {}, [], script.Args())
    assert actor.optimizer.gradients == []


def test_a_task_file_changed_during_the_run(script, tmp_path):
    """What counts is the file that the run has read, not the one at the time of a save."""
    path = tmp_path / "mine.py"
    text = (
        "from pathlib import Path\nfrom common import Task\n\n"
        "def reward(a, b):\n"
        "    file = Path(__file__)\n"
        "    file.write_text(file.read_text() + '#')\n"
        "    return [0.5] * len(a)\n\n"
        "task = Task([{'prompt': 'x'}] * 8, reward)\n"
    )
    path.write_text(text)
    args = tiny_args(script, tmp_path / "runs", task=str(path), save_interval=1)
    folder = script.train(args)
    again = replace(args, resume=str(folder), num_train_epochs=2)
    with pytest.raises(common.InputError, match="task file's hash was"):
        script.train(again)
    path.write_text(text)
    script.train(again)


def test_a_finished_run_without_a_checkpoint_is_left_alone(script, tmp_path):
    args = flags(script, tmp_path, save_interval=0)
    folder = script.train(args, game())
    before = outcome(folder)
    longer = replace(args, resume=str(folder), num_train_epochs=5)
    with pytest.raises(common.InputError, match="is finished and has no checkpoint"):
        script.train(longer, game())
    assert same(outcome(folder), before)


def test_a_run_that_is_under_way_is_not_resumed(script, tmp_path, capsys):
    """Two processes would write into the same files."""
    folders = []

    def reward(firsts, seconds):
        if not folders:
            folders.extend(tmp_path.iterdir())
            args = tiny_args(script, tmp_path, resume=str(folders[0]))
            with pytest.raises(
                common.InputError, match="is in use: .*temporarily unavailable"
            ):
                script.train(args, task)
        return [0.5] * len(firsts)

    task = replace(small_task(), reward_func=reward, eval_dataset=None)
    folder = script.train(tiny_args(script, tmp_path), task)
    assert (
        folders == [folder] and len((folder / "metrics.jsonl").open().readlines()) == 2
    )
    capsys.readouterr()
    args = tiny_args(script, tmp_path, resume=str(folder), log_samples=1)
    script.train(args, task)
    out = capsys.readouterr().out
    assert "is finished" in out


def test_a_moved_task_file(script, tmp_path):
    """Its name and contents count, not its folder."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from common import Task\n"
        "task = Task([{'prompt': 'x'}] * 8, lambda a, b: [0.5] * len(a))\n"
    )
    folder = script.train(tiny_args(script, tmp_path / "runs", task=str(path)))
    (tmp_path / "new").mkdir()
    moved = path.rename(tmp_path / "new" / "mine.py")
    more = {"task": str(moved), "resume": str(folder), "num_train_epochs": 2}
    assert script.train(tiny_args(script, tmp_path / "runs", **more)) == folder


def test_items_drawn_at_random_are_the_same_again(script, tmp_path):
    """Without a seed of its own, a task file gets the run's; others are refused."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import random\nfrom common import Task\n"
        "items = [{'prompt': str(random.random())} for _ in range(8)]\n"
        "task = Task(items, lambda a, b: [0.5] * len(a))\n"
    )
    args = tiny_args(script, tmp_path / "runs", task=str(path), save_interval=1)
    folder = script.train(args)
    again = replace(args, resume=str(folder), num_train_epochs=2)
    assert script.train(again) == folder
    path.write_text(path.read_text().replace("str(random.random())", "str(id(random))"))
    with pytest.raises(common.InputError, match="train items' hash was"):
        script.train(again)


def test_checkpoints_of_the_same_update_and_other_files(tmp_path):
    """The later one counts, the one of the update before stays, and so do strange files."""
    (tmp_path / "keep_me.pt").write_text("a copy of the user's")
    for update, content in ((1, "a"), (2, "b"), (2, "c"), (2, "d"), (2, "e")):
        common.write_checkpoint(tmp_path, update, {"content": content})
    assert common.read_checkpoint(tmp_path) == ({"content": "e"}, [])
    names = sorted(p.name[:15] for p in tmp_path.iterdir())
    assert names == ["keep_me.pt", "update_00000001", "update_00000002"]


def test_eval_only_saves_nothing_and_refuses_to_resume(script, tmp_path):
    args = tiny_args(script, tmp_path, eval_only=True)
    folder = script.train(args, small_task(8))
    assert not (folder / "checkpoint").exists()
    with pytest.raises(common.InputError, match="eval_only trains nothing"):
        script.train(replace(args, resume=str(folder)), small_task(8))
