"""What people look at: curves.png, dialogues, TensorBoard, W&B, and the numbers in them."""

import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, sample, small_task, tiny_args

import common
import maac

AGENTS, CRITICS = ["agent_0", "agent_1"], ["critic_0", "critic_1"]


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module", params=SCRIPTS)
def run(request, tmp_path_factory):
    """A run of each script: its folder, and the points of each of its metrics."""
    module, points = importlib.import_module(request.param), {}
    args = tiny_args(module, tmp_path_factory.mktemp("runs"), num_train_epochs=2)
    folder = module.train(args, small_task())
    for line in read(folder):
        for key, value in line.items():
            points.setdefault(key, []).append([line["step"], value])
    return folder, points


def test_curves(run, monkeypatch):
    """Panels with the metrics that their titles promise; a team's are means over its members."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    (folder, points), saved = run, []
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: saved.append(self))
    common.draw_curves(folder)
    names = {"maac": CRITICS[:1], "iac_shared": AGENTS}
    critics = names.get(folder.name.split("__")[0], CRITICS)
    norms = ["losses/actor_grad_norm", "losses/critic_grad_norm"]
    panels = [
        ["eval/return", "rollout/return"],
        ["losses/policy_loss", "losses/value_loss"],
        [f"critic/explained_variance/{name}" for name in critics],
        [f"losses/entropy/{name}" for name in AGENTS],
        norms[:1] if critics == AGENTS else norms,
        [f"rollout/completion_tokens/{name}" for name in AGENTS],
    ]
    for axes, keys in zip(saved[0].axes, panels, strict=True):
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert drawn == {key: points[key] for key in keys}
        assert axes.get_visible() == (keys != panels[-1])  # all of one token
    for keys in (panels[2], panels[3], panels[5]):
        mean = np.mean([points[key] for key in keys], axis=0)
        assert points[keys[0].rsplit("/", 1)[0]] == pytest.approx(mean, rel=1e-12)


def test_tensorboard(run):
    """Scalars in float32, which rounds to 2^-24 of a number."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module).EventAccumulator(str(run[0]))
    events.Reload()
    for key, points in run[1].items():
        shown = [[event.step, event.value] for event in events.Scalars(key)]
        assert np.allclose(shown, points, rtol=1e-6, atol=0)


def test_dialogues_without_matplotlib(tmp_path, monkeypatch, capsys):
    """A dialogue by hand; a run ends with three, of the first items for evaluation."""
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "y."}]
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": parts}]
    one = sample([[2], [2]], [[3], [3]], 0.5)
    one.prompts, one.completions = ["target 7\n", chat], ["3", "y\nz"]
    text = "agent 0 reads:\ntarget 7\nagent 0 writes:\n3\nagent 1 reads:\nBe.\nSay y.\n"
    text += "agent 1 writes:\ny\nz\nreward 0.500"
    assert common.dialogue(one) == text
    assert common.dialogue(replace(one, turn=1)) == f"turn 1\n{text}"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    maac.train(tiny_args(maac, tmp_path), small_task())
    out = capsys.readouterr().out
    assert out.count("\nagent 1 writes:\n") == out.count("\nreward ") == 3
    for item in small_task().eval_dataset[:3]:
        assert out.count(f"reads:\n{item['prompt']}agent") == 2
    assert "curves.png needs matplotlib: pip install matplotlib" in out


@pytest.mark.slow
def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    """The real package, offline; what it wrote is read back."""
    wandb = pytest.importorskip("wandb")
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record()
    settings = {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "CONSOLE": "off"}
    for key, value in settings.items():
        monkeypatch.setenv(f"WANDB_{key}", str(value))
    config = '{"project": "teams", "name": "mine"}'
    folder = maac.train(tiny_args(maac, tmp_path, wandb_config=config), small_task())
    wandb.teardown()  # its process has written all when it ends
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data, at, rows, expected = path.read_bytes(), 7, {}, {}
    assert len(data) < 2**15  # one block of LevelDB's log format: no record is cut
    while at < len(data):
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        record.ParseFromString(data[at + 7 : end])
        at, run = end, record.run
        if record.HasField("run"):
            names = run.project, run.display_name, run.run_id
            flags = {x.key: json.loads(x.value_json) for x in run.config.update}
        row = {x.key or x.nested_key[0]: x.value_json for x in record.history.item}
        rows |= {int(row["global_step"]): row} if row else {}
    assert names == ("teams", "mine", folder.name)
    assert json.loads((folder / "args.json").read_text()).items() <= flags.items()
    for line in read(folder):
        expected.setdefault(line["step"], {}).update(line)
    assert rows.keys() == expected.keys()
    for step, line in expected.items():
        found = {key: float(rows[step][key]) for key in line}
        assert found == pytest.approx(line, rel=1e-6)  # float32


def test_critic_metrics_by_hand():
    """Two episodes, γ = 0.5: returns (1 + 0.5·2, 2), (0); values (1, 2, 0).

    G = (2, 2, 0), mean 4/3, variance 8/9; G − V = (1, 0, 0), mean 1/3, variance 2/9: 3/4 of the
    variance is explained. y = (1 + 0.5·2, 2, 0), y − V = (1, 0, 0), standard deviation √2/3.
    """
    turns = [(1.0, False), (2.0, True), (0.0, True)]
    samples = [sample([[2]], [[3]], reward, done=done) for reward, done in turns]
    values, targets = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])
    given = SimpleNamespace(name="x"), samples, values, targets
    found = common.critic_metrics(*given, maac.Args(discount=0.5))
    expected = {"critic/value_mean/x": 1, "critic/advantage_std/x": 2**0.5 / 3}
    assert found == pytest.approx({**expected, "critic/explained_variance/x": 3 / 4})
    for one in samples:
        one.reward = 0.0  # nothing to explain, and no division by zero
    found = common.critic_metrics(*given, maac.Args(critic_type="q"))
    expected["critic/advantage_std/x"] = (2 / 3) ** 0.5  # of the values themselves
    assert found == pytest.approx(expected)


def test_rollout_metrics_by_hand():
    """An episode of two turns, paid 1 and 2, and one of a single turn, paid 5, that was cut."""
    samples = [
        sample([[2], [2]], [[3, 1], [3]], 1.0, done=False),
        sample([[2], [2]], [[1], [3, 3]], 2.0, turn=1),
        sample([[2], [2]], [[3, 3, 1], [1]], 5.0, cut="too long"),
    ]
    task = small_task(metrics_callback=lambda x: {"mine": len(x), "odd": float("nan")})
    expected = {
        "reward": 8 / 3, "final_reward": 7 / 2, "return": 8 / 2, "turns": 3 / 2, "mine": 3,
        "turn_0/reward": 6 / 2, "turn_1/reward": 2, "unreadable": 1 / 2,
        "completion_tokens/agent_0": 6 / 3, "completion_tokens/agent_1": 4 / 3,
        "ended/agent_0": 1, "ended/agent_1": 1 / 3,
    }  # fmt: skip
    found = common.rollout_metrics(task, samples, "eval", maac.Args(num_turns=2))
    assert found == pytest.approx({f"eval/{k}": v for k, v in expected.items()})
