"""The README's commands run as they stand, in a copy of the project, with small budgets."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
INLINE = re.findall(r"`((?:python|pip|torchrun|git|diff) [^`\n]+)`", README)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = shlex.split(
    "--num-train-epochs 1 --eval-num-samples 4 --eval-batch-size 4 --log-samples 1"
)
# one thread each: two torch processes with two threads on two cores are tens of times slower
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the README's task file in it."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    ignored = shutil.ignore_patterns("runs", ".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "my_task.py").write_text(PYTHON[0])
    return folder


def run(words, folder):
    done = subprocess.run(
        words, check=False, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and "python iac_shared.py --num-agents 2" in COMMANDS
    known = ("pip install ", "python ", "torchrun ")
    assert all(command.startswith(known) for command in COMMANDS)


# What runs each command that the README names: a test below or elsewhere, or .ci/run.
RUN_BY = {
    r"python (maac|iac_separate|iac_shared)\.py (?!--help).*": "test_command",
    r"torchrun --nproc-per-node 2 iac_shared\.py": "test_command",
    r"torchrun --nproc-per-node 2 iac_shared\.py --resume \.\.\.": "test_ranks.py",
    r"torchrun --nnodes 2 \.\.\.": "test_ranks.py",
    r"python iac_separate\.py --help": "test_the_help_shows_every_flag",
    r"python tests/benchmarks/learning\.py.*": "test_the_learning_benchmark",
    r"python tests/benchmarks/speed\.py.*": "test_the_speed_benchmark",
    r"python tests/benchmarks/survival\.py.*": "test_the_survival_benchmark",
    r"python tests/benchmarks/mutants\.py": "test_the_mutants_benchmark",
    r"diff iac_separate\.py maac\.py": "test_the_differences_are_as_many_as_it_says",
    r"git apply (-R )?tests/exercises/gae\.patch": "test_exercises.py",
    r"python -m pytest tests -k test_07": "test_the_pitfalls_are_those_of_the_tests",
    r"python -m pytest -n 2 --dist worksteal tests": ".ci/run",
    r"python tests/smollm2\.py .*": ".ci/run",
    r"pip install (-r requirements\.txt|matplotlib|pytest pytest-xdist matplotlib|datasets)": ".ci/run",
    r"python -m venv .venv": ".ci/run",
}


def test_no_command_is_left_out():
    """Whoever writes a command into the README must say here what runs it."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for command in COMMANDS + INLINE:
        found = [by for pattern, by in RUN_BY.items() if re.fullmatch(pattern, command)]
        assert found, f"no test runs {command!r}"
        for by in found:
            path = ROOT / (by if by == ".ci/run" else f"tests/{by}")
            assert f"def {by}(" in tests or path.is_file()
    for pattern in RUN_BY:
        assert any(re.fullmatch(pattern, c) for c in COMMANDS + INLINE), pattern


def test_the_help_shows_every_flag():
    from dataclasses import fields

    import iac_separate

    assert "python iac_separate.py --help" in INLINE
    words = [sys.executable, "iac_separate.py", "--help"]
    out = re.sub(r"\s+", " ", run(words, ROOT))
    for field in fields(iac_separate.Args):
        assert f"--{field.name.replace('_', '-')}" in out


def test_the_differences_are_as_many_as_it_says():
    """Changed lines of each pair, and every function that differs stands in the table."""
    import inspect

    import iac_separate
    import iac_shared
    import maac

    claimed = re.search(
        r"nothing else: (\d+) changed.*? by (\d+), .*? by (\d+)", README
    )
    pairs = (iac_separate, maac), (iac_shared, iac_separate), (iac_shared, maac)
    section = README.split("## How two scripts differ")[1].split("\n## ")[0]
    names = ("maac", "iac_separate", "iac_shared")
    for (one, other), count in zip(pairs, claimed.groups(), strict=True):
        files = [str(ROOT / f"{module.__name__}.py") for module in (one, other)]
        done = subprocess.run(
            ["diff", *files], check=False, capture_output=True, text=True
        )
        assert sum(x[:1] in ("<", ">") for x in done.stdout.splitlines()) == int(count)
        for name in vars(one).keys() | vars(other).keys():
            pair = [vars(module).get(name) for module in (one, other)]
            own = [getattr(f, "__module__", "") in names for f in pair if callable(f)]
            if any(own):
                sources = {f and inspect.getsource(f) for f in pair}
                assert len(sources) == 1 or f"`{name}`" in section, name


def test_each_equation_stands_in_the_function_that_it_names():
    """The number in a comment, a docstring, or both, of the functions beside it."""
    import inspect

    import iac_separate
    import iac_shared
    import maac

    rows = re.findall(r"^\| \((\d)\) \| .* \| (.+) \|$", README, re.MULTILINE)
    assert [number for number, _ in rows] == ["1", "2", "3", "4", "5"]
    for number, cell in rows:
        for module in (maac, iac_separate, iac_shared):
            names = [n for n in re.findall(r"`(\w+)`", cell) if hasattr(module, n)]
            sources = [inspect.getsource(getattr(module, name)) for name in names]
            assert any(f"({number})" in source for source in sources), (number, names)


def test_the_pitfalls_are_those_of_the_tests():
    """21 of them, each with tests that there are, which the command for one of them finds."""
    rows = re.findall(r"^\| (\d+) \| .* \| (`test_.*`) \|$", README, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 22))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for number, cell in rows:
        for name in re.findall(r"`(\w+)`", cell):
            assert name.startswith(f"test_{int(number):02}") and f"def {name}(" in tests
    command = "python -m pytest tests -k test_07"
    assert command in INLINE
    words = [sys.executable, *command.split()[1:], "--collect-only", "-q"]
    assert "test_07_one_critic_step_per_minibatch" in run(words, ROOT)


def test_the_exercises_are_as_long_as_it_says():
    from test_exercises import PATCHES, changed_lines

    rows = re.findall(r"\(`(\w+)\.patch`\) \| .* \| (\d+) \|", README)
    assert {name: int(lines) for name, lines in rows} == {
        name: changed_lines(name) for name in PATCHES
    }


def test_the_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).read_bytes()[:4] == b"\x89PNG"


def test_the_requirements_are_those_of_this_environment():
    """pip finds nothing missing, and torch stays below the release that is not tested."""
    import torch

    assert "pip install -r requirements.txt" in COMMANDS
    assert "<2.14" in (ROOT / "requirements.txt").read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


SCRIPT_COMMANDS = [
    c
    for c in COMMANDS + INLINE
    if re.match(r"(python|torchrun .*) (maac|iac_\w+)\.py", c)
    and not c.endswith(("...", "--help"))
]


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_command(command, project, request):
    words = [sys.executable, *shlex.split(command)[1:]]
    if command.startswith("torchrun"):
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    if ".cache/smollm2" in words:
        words[words.index(".cache/smollm2")] = request.getfixturevalue("smollm2")
        words[words.index("--max-new-tokens") + 1] = "8"
        (project / "small.py").write_text(
            "import common\n\ndef make_task(args):\n"
            "    args.task = 'length_ratio'\n    task = common.load_task(args, None)\n    task.train_dataset = task.train_dataset[:16]\n"
            "    return task\n"
        )
        if "length_ratio" in words:
            words[words.index("--task") + 1] = "small.py"
        else:
            posts = (project / "tests" / "posts.jsonl").read_text().splitlines()[:17]
            (project / "few.jsonl").write_text("\n".join(posts))
            words[words.index("--train-file") + 1] = "few.jsonl"
        words += ["--save-interval", "0"]  # gigabytes
    if any("runs/RUN" in word for word in words):
        name = f"first{COMMANDS.index(command)}"
        run([sys.executable, "iac_shared.py", *SMALL, "--exp-name", name], project)
        made = next((project / "runs").glob(f"{name}_*"))
        words = [word.replace("runs/RUN", str(made)) for word in words]
    if "--resume" in words:  # a run of one epoch, which a second prolongs
        prolonged = "30" in words
        words = ["2" if word == "30" else word for word in words]
        out = run(words, project)
        assert ("is finished" in out) != prolonged
    else:
        out = run([*words, *SMALL], project)
        prolonged = True
    folder = project / out.split("run folder: ")[-1].strip()
    assert (folder / "metrics.jsonl").is_file()
    assert ("\nagent 0 " in out) == prolonged


def test_the_python_examples(project):
    _, transition, call = PYTHON
    (project / "snippet.py").write_text(transition)
    given = {"prompt": "p", "agent_completions": ["a", "b"], "num_agents": 2}
    snippet = runpy.run_path(str(project / "snippet.py"))
    texts = snippet["external_transition"](**given)
    assert texts == ["p you wrote a", "p you wrote b"]
    (project / "example.py").write_text(call + "print(folder)\n")
    assert "runs/" in run([sys.executable, "example.py"], project)


def test_the_readme_s_team_learns(project):
    """The example task's reward climbs, as a reader who runs it expects."""
    command = "python maac.py --task my_task.py"
    assert command in COMMANDS
    run(
        [
            sys.executable,
            *command.split()[1:],
            "--num-train-epochs",
            "6",
            "--exp-name",
            "own",
        ],
        project,
    )
    folder = next((project / "runs").glob("own__my_task*"))
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    rewards = [line["eval/reward"] for line in lines if "eval/reward" in line]
    assert rewards[0] < 0.15 and rewards[-1] > rewards[0] + 0.2


def test_the_learning_benchmark_counts_quarters_over_episodes(monkeypatch):
    """Two runs of eight episodes: their first, second, third, fourth pairs together."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    from learning import quarters

    runs = [
        {"rewards": [0, 1, 2, 2, 4, 4, 1, 3]},
        {"rewards": [1, 2, 2, 2, 8, 8, 3, 5]},
    ]
    # 0 1 1 2: deviation sqrt(2/3) over 2; 4 4 8 8: sqrt(16/3) over 2; 1 3 3 5: sqrt(8/3) over 2
    assert quarters(runs) == "1.00 (0.41) → 2.00 (0.00) → 6.00 (1.15) → 3.00 (0.82)"
    assert quarters([*runs, {"rewards": None}]) == "-"


LEARNING = [c for c in COMMANDS if "learning.py" in c]


@pytest.mark.parametrize("command", LEARNING)
def test_the_learning_benchmark(command, project, request):
    """Each command, for one script and seed and a few updates."""
    words = [
        sys.executable,
        *shlex.split(command)[1:],
        "--scripts",
        "iac_shared",
        "--seeds",
        "1",
    ]
    small = f"{' '.join(SMALL)} --rollout-buffer-size 500"
    if "--reference" in words:
        words += ["--environment", request.getfixturevalue("comlrl")]
    if "length_ratio" in command or "tldr" in command:
        words += ["--model", request.getfixturevalue("smollm2")]
        small = f"{' '.join(SMALL)} --rollout-buffer-size 32 --max-new-tokens 4"
    out = run([*words, f"--flags={small}"], project)
    assert "| iac_shared | 1 |" in out
    assert ("| CoMLRL iac_shared | 1 |" in out) == ("--reference" in words)
    (folder,) = (project / "runs").glob("learning*")
    points = (folder / "learning.csv").read_text().splitlines()
    assert points[0] == "task,algorithm,seed,metric,samples,value" and len(points) > 3
    assert (folder / "learning.md").read_text().strip() in out
    for task in words[words.index("--tasks") + 1 : words.index("--scripts")]:
        if not task.startswith("--") and not task.isdigit():
            assert (folder / f"{task}.png").read_bytes()[:4] == b"\x89PNG"
    shutil.rmtree(folder)


def test_the_speed_benchmark(project, smollm2):
    """Its tables, but for the reference, which takes minutes to install and to run."""
    command = "python tests/benchmarks/speed.py"
    assert command in COMMANDS and "with `--parts default growth`" in README
    small = "--cases bfloat16 --rounds 1 --buffer 2 --max-new-tokens 2 --parts compare default"
    words = [sys.executable, *command.split()[1:], *small.split()]
    out = run([*words, "--scripts", "iac_shared", "--model", smollm2], project)
    compared, default = (line for line in out.splitlines() if "| iac_shared.py" in line)
    assert re.search(r"\| bfloat16 \| [\d.]+ \| - \| - \| [\d.]+ \(", compared)
    shares = [int(share) for share in re.findall(r"(\d+) %", default)]
    assert len(shares) == 4 and 97 <= sum(shares) <= 103


def test_the_survival_benchmark(project):
    """All parts but the long one, for few updates."""
    command = "python tests/benchmarks/survival.py"
    assert sum(c.startswith(command) for c in COMMANDS) == 2 and command in COMMANDS
    small = "--parts kill cost ranks --kills 1 --processes 1 --scripts iac_shared"
    words = [sys.executable, *command.split()[1:], *small.split()]
    words += ["--flags=--num-train-epochs 2"]
    done = subprocess.run(
        words, check=False, cwd=project, capture_output=True, text=True, env=ENVIRONMENT
    )  # so short a run costs more than its bar, and has not learned
    assert "iac_shared: 1 of 1 bit-identical" in done.stdout, done.stderr[-2000:]
    assert re.search(r"iac_shared: 2 saves, \d+ ms each, [\d.]+ % of", done.stdout)
    ends = re.findall(r"rank \d killed, all ended after ([\d.]+) s", done.stdout)
    assert len(ends) == 2 and all(float(seconds) < 30 for seconds in ends)
    assert done.stdout.count("alive []") == 2


def test_the_mutants_benchmark(project):
    assert "python tests/benchmarks/mutants.py" in COMMANDS
    out = run([sys.executable, "tests/benchmarks/mutants.py", "8"], project)
    assert "1 of 1 killed" in out
