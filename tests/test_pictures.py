"""What people look at: curves.png, samples side by side, the loggers' tables, the diagnostics."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import sample, small_task, tiny_args

import common


def needs(package):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"pip install {package}")


@pytest.fixture
def figure(monkeypatch):
    """The last figure that was saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *a, **k: saved.append(self) or save(self, *a, **k),
    )
    return lambda: saved[-1]


@needs("matplotlib")
def test_every_run_ends_with_curves(script, tmp_path, figure, capsys):
    """Six panels, each with the metrics that its title promises, every point of the file."""
    folder = script.train(tiny_args(script, tmp_path, num_train_epochs=2), small_task())
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"curves: {folder / 'curves.png'}" in capsys.readouterr().out
    panels = {axes.get_title(): axes for axes in figure().axes}
    assert list(panels) == list(common.PANELS)
    labels = {
        title: {line.get_label() for line in axes.lines}
        for title, axes in panels.items()
    }
    critics = {"maac": ["critic_0"], "iac_separate": ["critic_0", "critic_1"]}
    critics = critics.get(script.__name__, ["agent_0", "agent_1"])
    assert labels["return of an episode"] == {"rollout/return", "eval/return"}
    assert labels["losses"] == {"losses/policy_loss", "losses/value_loss"}
    explained = {f"critic/explained_variance/{name}" for name in critics}
    assert labels["explained variance of the returns"] == explained
    lengths = {f"rollout/completion_tokens/agent_{k}" for k in (0, 1)}
    assert labels["completion length (tokens)"] == lengths
    assert labels["shares of the training time"] == {
        f"time/{phase}_share" for phase in ("generation", "values", "update", "rest")
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    reward = [x["rollout/return"] for x in lines if "rollout/return" in x]
    drawn = {line.get_label(): line for line in panels["return of an episode"].lines}
    assert list(drawn["rollout/return"].get_ydata()) == reward


def test_without_matplotlib_a_run_says_what_to_install(tmp_path, monkeypatch, capsys):
    import maac

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n)
    )
    folder = maac.train(tiny_args(maac, tmp_path), small_task())
    assert (
        "curves.png needs matplotlib: pip install matplotlib" in capsys.readouterr().out
    )
    assert not (folder / "curves.png").exists()


def test_a_sample_is_shown_side_by_side(monkeypatch):
    """A column an agent: its name, its prompt, its completion, wrapped to the width."""
    monkeypatch.setenv("COLUMNS", "40")
    one = sample([[2], [2]], [[3], [3]], 0.5)
    one.prompts = ["target 7\n", [{"role": "user", "content": "aa bb cc dd ee ff"}]]
    one.completions = ["3", "x\ny"]
    assert common.side_by_side(one).split("\n") == [
        "agent 0           | agent 1",
        "target 7          | aa bb cc dd ee ff",
        "-> 3              | -> x",
        "                  | y",
        "reward 0.500",
    ]


def test_a_run_prints_three_samples(script, tmp_path, capsys):
    script.train(tiny_args(script, tmp_path), small_task())
    out = capsys.readouterr().out
    assert out.count("\nagent 0") == out.count("\nreward 0.") == 3
    prompts = [item["prompt"].strip() for item in small_task().eval_dataset[:3]]
    assert all(out.count(prompt) == 2 for prompt in prompts)


class FakeRun:
    """What wandb.init returns, with all it was told."""

    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], None

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.finished = exit_code


def test_weights_and_biases_gets_the_metrics_and_the_samples(tmp_path, monkeypatch):
    import maac

    runs = []
    fake = ModuleType("wandb")
    fake.__spec__ = SimpleNamespace(name="wandb")
    fake.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    fake.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = '{"project": "teams"}'
    folder = maac.train(tiny_args(maac, tmp_path, wandb_config=config), small_task())
    (run,) = runs
    assert run.options["project"] == "teams" and run.options["name"] == folder.name
    assert run.options["config"]["num_agents"] == 2 and run.finished == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [v for _, v in run.logged if "eval/samples" not in v] == lines
    tables = [
        (step, v["eval/samples"]) for step, v in run.logged if "eval/samples" in v
    ]
    assert [step for step, _ in tables] == [0, 16]
    written = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    last = [s for s in written if s["phase"] == "eval" and s["step"] == 16]
    assert tables[1][1]["columns"] == ["agent 0", "agent 1", "reward"]
    assert len(tables[1][1]["data"]) == 3
    for row, one in zip(tables[1][1]["data"], last, strict=False):
        pairs = zip(one["prompts"], one["completions"], strict=True)
        assert row == [*(f"{p.strip()}\n-> {c}" for p, c in pairs), one["reward"]]


@needs("tensorboard")
def test_tensorboard_gets_the_samples_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import maac

    folder = maac.train(tiny_args(maac, tmp_path), small_task())
    events = EventAccumulator(str(folder))
    events.Reload()
    texts = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in texts] == [0, 16]
    text = texts[1].tensor_proto.string_val[0].decode()
    assert text.count("agent 0") == 3
    assert all(line[:4] == "    " for line in text.splitlines())  # as it stands


def test_diagnostics_by_hand():
    """Two episodes, γ = 0.5: returns (1 + 0.5·2, 2), (0); values (1, 2, 0).

    G = (2, 2, 0), mean 4/3, variance 8/9; G − V = (1, 0, 0), mean 1/3, variance 2/9: 3/4 of the
    variance is explained. y = (1 + 0.5·2, 2, 0), y − V = (1, 0, 0), standard deviation √2/3.
    """
    samples = [
        sample([[2]], [[3]], 1.0, episode=0, done=False),
        sample([[2]], [[3]], 2.0, episode=0, turn=1),
        sample([[2]], [[3]], 0.0, episode=1),
    ]
    critic = SimpleNamespace(name="critic_0")
    args = SimpleNamespace(discount=0.5, critic_type="v")
    values, targets = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])
    found = common.diagnostics(critic, samples, values, targets, args)
    assert found == pytest.approx(
        {
            "critic/explained_variance/critic_0": 3 / 4,
            "critic/value_mean/critic_0": 1.0,
            "critic/advantage_std/critic_0": 2**0.5 / 3,
        }
    )
    args.critic_type = "q"  # there the weights are the values: variance 2/3
    found = common.diagnostics(critic, samples, values, targets, args)
    assert found["critic/advantage_std/critic_0"] == pytest.approx((2 / 3) ** 0.5)
    for one in samples:
        one.reward = 0.0  # nothing to explain, and no division by zero
    found = common.diagnostics(critic, samples, values, targets, args)
    assert "critic/explained_variance/critic_0" not in found


def test_every_diagnostic_is_in_every_script_s_metrics(script, tmp_path):
    """Per agent or critic, and their mean; advantages before whitening, so not of deviation 1."""
    folder = script.train(tiny_args(script, tmp_path), small_task())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    train = next(line for line in lines if "rollout/reward" in line)
    agents = ["agent_0", "agent_1"]
    critics = {"maac": ["critic_0"], "iac_separate": ["critic_0", "critic_1"]}
    critics = critics.get(script.__name__, agents)
    for name in ("value_mean", "advantage_std"):
        values = [train[f"critic/{name}/{critic}"] for critic in critics]
        assert train[f"critic/{name}"] == pytest.approx(sum(values) / len(values))
    per_agent = ("losses/entropy", "losses/actor_grad_norm", "rollout/ended")
    for name in (*per_agent, "rollout/completion_tokens"):
        values = [train[f"{name}/{agent}"] for agent in agents]
        assert train[name] == pytest.approx(sum(values) / len(values))
    assert train["critic/advantage_std"] < 0.9
