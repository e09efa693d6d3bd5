"""Several processes: the same gradient as one, the same weights on all, no hang."""

import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import count

import pytest
import torch
from benchmarks.survival import TORCHRUN, outcome, same, start
from conftest import assert_same_gradients, micro_learner, sample, small_task, tiny_args
from test_resume import bare  # noqa: F401 - it is for every test here too
from torch.distributed.elastic.utils.distributed import get_free_port

import common
from maac import Args, AutoModel, AutoModelForCausalLM


def in_ranks(number, function, *given):
    """What function(*given) returns, or raises, in each of `number` ranks."""
    fork, port = multiprocessing.get_context("fork"), str(get_free_port())
    results = fork.Queue()

    def work(rank):
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
        os.environ.update(meet, WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
        try:
            result = function(*given)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the parent looks at it
            result = f"{type(error).__name__}: {error}"
        results.put((rank, pickle.dumps(result)))  # by value, tensors too

    workers = [fork.Process(target=work, args=(rank,)) for rank in range(number)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0
    return [pickle.loads(found[rank]) for rank in range(number)]


# Five episodes of one to three turns: the buffer that one process or several learn from.
EPISODES = [
    [([2, 3], [4, 1], 1.0), ([3, 4, 4], [2], 0.5)],
    [([4], [3, 3, 1], -1.0)],
    [([2], [1], 2.0), ([3, 2], [2, 2], 0.0), ([2, 4], [4, 4, 4], 1.5)],
    [([3, 3], [2, 1], 0.25)],
    [([4, 2, 3], [3], -0.5), ([2, 2], [4, 1], 3.0)],
]
SHARES = [[[0, 1], [2, 3, 4]], [[0, 1, 2, 3, 4], []], [[], [1, 0, 2, 3], [4]]]


def gradients_and_losses(script, shares, flags):
    """The gradient of each learner in one update on this rank's share of the episodes, for two
    agents who read and write in two orders, and the losses."""
    if len(shares) > 1:
        torch.distributed.init_process_group("gloo")
    args, samples = script.Args(max_grad_norm=0.0, discount=0.9, **flags), []
    for number in shares[common.rank()]:
        for turn, (prompt, completion, reward) in enumerate(EPISODES[number]):
            ids = [prompt, prompt[::-1]], [completion, completion[:1]]
            place = {"turn": turn, "done": turn + 1 == len(EPISODES[number])}
            place["critic_ids"] = ids[args.critic_type == "q"]  # any text will do
            samples.append(sample(*ids, reward, **place))
    actors = [micro_learner(script, seed=k) for k in (0, 1)]
    seeds = {"maac": [5], "iac_separate": [5, 6], "iac_shared": []}[script.__name__]
    critics = [micro_learner(script, seed=k, head=True) for k in seeds]
    losses = script.update(actors, critics or actors, samples, torch.Generator(), args)
    return [g for x in actors + critics for g in x.optimizer.gradients], losses


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("flags", [{}, {"critic_type": "q", "micro_batch_size": 2}])
def test_11_the_gradient_of_ranks_is_that_of_one_process(script, shares, flags):
    """Whatever the shares, none included, on every rank; the losses too."""
    alone, losses = gradients_and_losses(script, [range(len(EPISODES))], flags)
    ranks = in_ranks(len(shares), gradients_and_losses, script, shares, flags)
    for gradients, theirs in ranks:
        assert theirs == pytest.approx(losses, rel=1e-5, abs=1e-5)
        for one, other in zip(alone, gradients, strict=True):
            assert_same_gradients(one, other)


def trained(script, args, count):
    """Train on like items; rank 0 alone ends episodes after a turn. The folder, the learners'
    weights, how often this rank was paid for each item, and its completions of 4 tokens."""
    seen, long, learners = Counter(), set(), []

    def reward(*completions, batch_items):
        seen[batch_items[0]["id"]] += 1
        long.update(text for text in completions[0] if len(text) == 4)
        return [float(common.rank() == 0)] * len(completions[0])

    common.Run.save = lambda run: learners.extend(run.learners)
    items = [{"prompt": "target 0\n", "id": k} for k in range(count)]
    task = small_task(train_dataset=items, reward_func=reward, eval_dataset=None)
    folder = script.train(args, task)
    weights = [p.detach().flatten() for x in learners for p in x.parameters()]
    return folder, torch.cat(weights), seen, long


@pytest.mark.parametrize("number, items, turns", [(2, 11, 1), (2, 11, 3), (3, 2, 1)])
def test_ranks_share_items_and_stay_alike(script, number, items, turns, tmp_path):
    """Each item once in each of two epochs, however unequal the ends; a rank without one takes
    part all the same. The same prompt gets other completions on another rank."""
    flags = {"num_train_epochs": 2, "train_batch_size": 3, "max_new_tokens": 4}
    flags |= {"num_turns": turns, "early_termination_threshold": 0.5}
    args = tiny_args(script, tmp_path, **flags)
    ranks = in_ranks(number, trained, script, args, items)
    (folder, weights, one, long), *others = ranks
    for k in range(items):
        assert one[k] + sum(seen[k] for *_, seen, _ in others) / turns == 2
    assert [bool(seen) for *_, seen, _ in others] == [True, False][: number - 1]
    for theirs in others:
        assert theirs[0] == folder and torch.equal(theirs[1], weights)
    assert long.isdisjoint(others[0][3])


def test_ranks_stop_together_and_resume_with_as_many(script, tmp_path, monkeypatch):
    """After the third update, though only the last rank is sent the signal."""
    args = tiny_args(script, tmp_path / "whole", max_new_tokens=2, temperature=0.8)
    task, calls, update = small_task(32), count(1), script.update
    whole, _ = in_ranks(2, script.train, args, task)

    def stopped(*given):
        if next(calls) == 3 and common.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(*given)

    args = replace(args, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", stopped)
        assert in_ranks(2, script.train, args, task) == ["SystemExit: 143"] * 2
    (left,) = (tmp_path / "stopped").iterdir()
    args = replace(args, resume=str(left))
    with pytest.raises(common.InputError, match="resumed: ranks was 2 and is 1"):
        script.train(args, task)
    assert in_ranks(2, script.train, args, task) == [left] * 2
    assert same(outcome(left), outcome(whole))


def test_an_error_on_one_rank_ends_all(script, tmp_path):
    """Within 30 s, and each says its sentence."""
    begin = time.perf_counter()

    def reward(firsts, seconds):
        return {}["mine"] if common.rank() == 1 else [0.0] * len(firsts)

    args, task = tiny_args(script, tmp_path), small_task(reward_func=reward)
    one, two = in_ranks(2, script.train, args, task)
    assert time.perf_counter() - begin < 30
    assert "rank 0 is without the others, one of which says why" in one
    assert "reward_func: KeyError: 'mine'" in two and "(rank 1, after update 0)" in two


def test_ranks_with_other_items_are_refused(script, tmp_path):
    def unlike():
        items = 4 + int(os.environ["RANK"])
        return script.train(tiny_args(script, tmp_path), small_task(items))

    refusal = "InputError: task 'sum_to_target' has other items in every process"
    assert in_ranks(2, unlike) == [refusal] * 2


@pytest.mark.slow
def test_two_nodes_of_torchrun(tmp_path):
    """Two launchers that meet at a port: one folder, one progress bar, samples at the end."""
    meet = ["--nnodes", "2", "--master-port", str(get_free_port()), "--node-rank"]
    flags = ["--num-train-epochs", "1", "--eval-num-samples", "9"]
    launchers = [[*TORCHRUN, *meet, node] for node in "01"]
    nodes = [start("iac_separate", flags, x, cwd=tmp_path) for x in launchers]
    outs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert [out.count("run folder: ") for out in outs] == [1, 0]
    for node in nodes:
        node.said.seek(0)
    assert ["item/s" in node.said.read() for node in nodes] == [True, False]
    (folder,) = (tmp_path / "runs").iterdir()
    last = outcome(folder)["metrics.jsonl"][-1]
    assert last["step"] == 1000 and last["update"] == 16


def test_devices_are_taken_in_turn(monkeypatch):
    """Two agents first, then critics; of torchrun's processes each has a GPU of its own."""
    args = Args(device=("cpu", "meta"))  # a device, and one that is refused
    for role, auto_class in ("agent", AutoModelForCausalLM), ("critic", AutoModel):
        (learner,) = common.load_learners(role, auto_class, ["tiny"], 1, args)
        assert learner.model.device.type == "cpu"
        with pytest.raises(common.InputError, match="device 'meta' cannot be used: it"):
            common.load_learners(role, auto_class, ["tiny"] * 2, 2, args)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(common.InputError, match="device 'cuda:99' cannot be used"):
        common.pick_device(Args(device="cuda"), 0)
