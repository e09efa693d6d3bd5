"""Several processes: the same gradient as one, the same weights on all, no hang."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest
import torch
from benchmarks.survival import TORCHRUN, outcome, same
from conftest import ROOT, micro_learner, sample, small_task, tiny_args

import common

FORK = multiprocessing.get_context("fork")


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_ranks(count, function, *given):
    """What function(*given) returns in each of `count` processes that train together."""
    port = free_port()
    results = FORK.Queue()

    def work(rank):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        torch.set_num_threads(1)
        try:
            result = function(*given)
        except Exception as error:  # noqa: BLE001 - the parent looks at it
            result = f"{type(error).__name__}: {error}"
        results.put((rank, pickle.dumps(result)))  # by value, tensors too

    workers = [FORK.Process(target=work, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    found = {rank: pickle.loads(result) for rank, result in found.items()}
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0
    return [found[rank] for rank in range(count)]


# Five episodes of one to three turns: the buffer that one process or several learn from.
EPISODES = [
    [([2, 3], [4, 1], 1.0), ([3, 4, 4], [2], 0.5)],
    [([4], [3, 3, 1], -1.0)],
    [([2], [1], 2.0), ([3, 2], [2, 2], 0.0), ([2, 4], [4, 4, 4], 1.5)],
    [([3, 3], [2, 1], 0.25)],
    [([4, 2, 3], [3], -0.5), ([2, 2], [4, 1], 3.0)],
]


def buffer_of(numbers):
    """The samples of these episodes, for two agents who read and write in two orders."""
    samples = []
    for number in numbers:
        for turn, (prompt, completion, reward) in enumerate(EPISODES[number]):
            ids = [prompt, prompt[::-1]], [completion, completion[:1]]
            done = turn + 1 == len(EPISODES[number])
            samples.append(sample(*ids, reward, episode=number, turn=turn, done=done))
            samples[-1].prompts = [str(prompt), str(prompt[::-1])]
    return samples


def gradients_and_losses(script, shares, flags):
    """The gradients of one update on this rank's share of the episodes, and the losses."""
    common.join_ranks()
    args = script.Args(device="cpu", **flags)
    shared = script.__name__ == "iac_shared"
    actors = [micro_learner(script, seed=k, head=shared) for k in (0, 1)]
    critics = actors
    if not shared:
        count = 1 if script.__name__ == "maac" else 2
        critics = [micro_learner(script, seed=5 + k, head=True) for k in range(count)]
        for k, critic in enumerate(critics):
            critic.name = f"critic_{k}"
            critic.tokenizer = Digits()
    samples = buffer_of(shares[common.rank()])
    losses = script.update(actors, critics, samples, args)
    learners = actors if shared else actors + critics
    return [learner.optimizer.gradients[0] for learner in learners], dict(losses)


class Digits:
    """A tokenizer of texts: each character becomes one of five tokens."""

    pad_token_id, eos_token, chat_template = 0, "", None

    def __call__(self, texts, add_special_tokens):
        ids = [[2 + ord(character) % 3 for character in text] for text in texts]
        return type("Encoded", (), {"input_ids": ids})()


SHARES = [
    [[0, 1], [2, 3, 4]],
    [[0, 1, 2, 3, 4], []],
    [[4], [0, 2], [3, 1]],
    [[], [1, 0, 2, 3], [4]],
]


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize(
    "flags", [{}, {"critic_type": "q", "micro_batch_size": 2}], ids=str
)
def test_11_the_gradient_of_ranks_is_that_of_one_process(script, shares, flags):
    """Whatever the shares, none included: to 1e-6 of the gradient's norm, on every rank."""
    flags = {"max_grad_norm": 0.0, "discount": 0.9, **flags}
    everything = [[number for share in shares for number in share]]
    alone, losses = gradients_and_losses(script, everything, flags)
    for gradients, theirs in in_ranks(
        len(shares), gradients_and_losses, script, shares, flags
    ):
        assert theirs == pytest.approx(losses, rel=1e-5, abs=1e-6)
        for one, other in zip(alone, gradients, strict=True):
            pairs = list(zip(one, other, strict=True))
            assert all(b.norm() == 0 for a, b in pairs if a is None and b is not None)
            pairs = [(a, b) for a, b in pairs if a is not None]
            difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
            norm = torch.stack([a.norm() for a, _ in pairs]).norm()
            assert norm > 1e-3 and difference < 1e-6 * norm


def trained(script, args, items, early):
    """A run's folder, what this rank's learners weigh, and which items it played."""
    seen, weights = [], []
    task = small_task(items)
    inner = task.reward_func

    def reward(*completions, batch_items):
        seen.append(batch_items[0]["prompt"])
        if early:  # ranks end their episodes after different numbers of turns
            return [float(common.rank() == 0)] * len(completions[0])
        return inner(*completions, batch_items=batch_items)

    save = common.Run.save

    def note(run):
        for learner in run.learners.values():
            weights.extend(p.detach().clone() for p in learner.model.parameters())
        save(run)

    common.Run.save = note
    task = replace(task, reward_func=reward, eval_dataset=None)
    folder = script.train(args, task)
    common.Run.save = save
    others = [t for t in threading.enumerate() if "ThreadPool" in t.name]
    assert not others, "a collective is still waiting"
    return str(folder), [w.tolist() for w in weights], seen


EARLY = {"num_turns": 3, "early_termination_threshold": 0.5}


@pytest.mark.parametrize("early", [False, True])
def test_ranks_share_the_items_and_keep_the_same_weights(script, early, tmp_path):
    """21 items for 2 ranks and two epochs: each once an epoch, however unequal the ends."""
    flags = {"num_train_epochs": 2, "train_batch_size": 3, **(EARLY if early else {})}
    args = tiny_args(script, tmp_path, **flags)
    one, two = in_ranks(2, trained, script, args, 21, early)
    assert one[0] == two[0] and one[1] == two[1] and len(one[1]) > 0
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
    assert lines[-1]["step"] == 42
    prompts = [item["prompt"] for item in small_task(21).train_dataset]
    if early:  # rank 0 ends after one turn, rank 1 never
        assert len(one[2]) == 22 and len(two[2]) == 3 * 20
        mean = lines[-1]["rollout/turns"]
        assert 1 <= mean <= 3
    else:
        assert sorted(one[2] + two[2]) == sorted(2 * prompts)


def test_more_ranks_than_items(script, tmp_path):
    """A rank without an item takes part all the same."""
    args = tiny_args(script, tmp_path, num_train_epochs=2)
    results = in_ranks(3, trained, script, args, 2, False)
    assert len({str(weights) for _, weights, _ in results}) == 1
    assert [len(seen) for _, _, seen in results] == [2, 2, 0]


def test_ranks_sample_with_seeds_of_their_own(script, tmp_path):
    """The same item on two ranks does not get the same completions."""

    def completions(args):
        texts = []
        task = small_task(1)
        task.train_dataset = task.train_dataset * 8
        task.reward_func = lambda a, b: texts.extend(a) or [0.0] * len(a)
        script.train(args, replace(task, eval_dataset=None))
        return texts

    args = tiny_args(script, tmp_path, max_new_tokens=8)
    one, two = in_ranks(2, completions, args)
    assert len(one) == len(two) == 4 and set(one).isdisjoint(two)


def interrupted(script, args, updates):
    """Train, and stop by a signal that only the last rank notices."""

    def stop(run, samples, losses, whole=common.Run.log_update):
        if run.updates + 1 == updates and common.rank() == common.ranks() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(run, samples, losses)

    common.Run.log_update = stop
    try:
        return str(script.train(args, small_task(40)))
    except SystemExit as stopped:
        return stopped.code


def test_ranks_stop_together_and_resume_with_as_many(script, tmp_path):
    args = tiny_args(script, tmp_path / "whole", max_new_tokens=2, temperature=0.8)
    (whole, _) = in_ranks(2, interrupted, script, args, -1)
    args = replace(args, output_dir=str(tmp_path / "stopped"))
    assert in_ranks(2, interrupted, script, args, 3) == [143, 143]
    (left,) = (tmp_path / "stopped").iterdir()
    args = replace(args, resume=str(left))
    with pytest.raises(common.InputError, match="number of ranks was 2 and is 1"):
        script.train(args, small_task(40))
    assert in_ranks(2, interrupted, script, args, -1) == [str(left)] * 2
    assert same(outcome(left), outcome(type(left)(whole)))


def waiting(script, args):
    """Rank 1 is asked to stop while it waits for rank 0, which does not come."""

    def stuck(run, samples, losses):
        if common.rank() == 1:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            common.gather(None)
        time.sleep(60)

    common.Run.log_update = stuck
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "7"
    script.train(args, small_task())


def test_a_signal_ends_a_rank_that_waits_for_a_dead_one(script, tmp_path):
    """No Python handler runs in a collective: it ends all the same, before torchrun kills."""
    port, begin = free_port(), time.perf_counter()

    def work(rank):
        os.environ.update(
            RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        waiting(script, tiny_args(script, tmp_path))

    workers = [FORK.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    workers[1].join(timeout=20)
    seconds = time.perf_counter() - begin
    workers[0].kill()
    assert workers[1].exitcode == 128 + signal.SIGTERM and seconds < 15


def failing(script, args):
    """Train on a task whose reward fails on rank 1 alone."""

    def reward(firsts, seconds):
        if common.rank() == 1:
            raise KeyError("mine")
        return [0.0] * len(firsts)

    return script.train(args, replace(small_task(), reward_func=reward))


def test_an_error_on_one_rank_ends_all(script, tmp_path):
    begin = time.perf_counter()
    one, two = in_ranks(2, failing, script, tiny_args(script, tmp_path))
    assert time.perf_counter() - begin < 30
    assert "is without the others" in one
    assert "reward_func raised KeyError: 'mine'" in two and "rank 1" in two


def unlike(script, args):
    """Train on items that are not the same on every rank."""
    return script.train(args, small_task(4 + int(os.environ["RANK"])))


def test_ranks_with_other_items_are_refused(script, tmp_path):
    for error in in_ranks(2, unlike, script, tiny_args(script, tmp_path)):
        assert "has other items in every process" in error


def test_two_nodes_of_torchrun(tmp_path):
    """Two launchers that meet at a port: one folder, one progress bar, samples at the end."""
    flags = ["--num-train-epochs", "1", "--eval-num-samples", "9"]
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *meet, "--node-rank", node, str(ROOT / "iac_separate.py"), *flags],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for node in ("0", "1")
    ]  # fmt: skip
    outs, errors = zip(*(node.communicate() for node in nodes), strict=True)
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert [out.count("run folder: ") for out in outs] == [1, 0]
    assert ["item/s" in error for error in errors] == [True, False]
    (folder,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
    assert lines[-1]["step"] == 1000 and lines[-1]["update"] == 16
    assert len([x for x in lines if "eval/reward" in x]) == 2


def test_devices(script, tmp_path, monkeypatch):
    """agent_devices and critic_devices reach the models; torchrun refuses them."""
    places = []
    pick = common.pick_device
    monkeypatch.setattr(
        common, "pick_device", lambda name: places.append(name) or pick(name[:3])
    )
    args = script.Args(device="cpu", agent_devices=("cpu:0", "cpu:1"))

    def load(role, count, args):
        auto_class = common.transformers.AutoModelForCausalLM
        common.load_learners(role, auto_class, ["tiny"] * count, args)

    load("agent", 2, args)
    assert places == ["cpu:0", "cpu:1"]
    load("critic", 1, args)
    load("critic", 2, replace(args, critic_devices=("cpu:5",)))
    assert places[2:] == ["cpu:0", "cpu:5", "cpu:5"]
    load("agent", 2, script.Args(device="cpu:7"))
    assert places[5:] == ["cpu:7", "cpu:7"]
    with pytest.raises(common.InputError, match="agent_devices lists 2, expected 3"):
        load("agent", 3, args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.InputError, match="and no agent_devices"):
        script.train(args, small_task())
    with pytest.raises(common.InputError, match="without a number"):
        script.train(script.Args(device="cpu:0"), small_task())
