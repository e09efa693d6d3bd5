"""What README.md and the READMEs of tests/ say: commands run; names, numbers, links are right."""

import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from test_exercises import OFF, changed_lines

import iac_separate
import iac_shared
import maac

MODULES = (maac, iac_separate, iac_shared)
PAGES = [ROOT / "README.md", *sorted((ROOT / "tests").glob("**/README.md"))]
README, TEXT = PAGES[0].read_text(), "\n".join(page.read_text() for page in PAGES)
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # a task file
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [x for x in re.split(r"\n| && ", BLOCKS) if x]
COMMANDS += re.findall(r"`((?:python|pip|torchrun|git|diff) [^`\n]+)`", TEXT)
COMMANDS = list(dict.fromkeys(COMMANDS))
FEW = "--eval-num-samples 4 --eval-batch-size 4 --log-samples 1 --num-train-epochs"
RUN = r"(python|torchrun --nproc-per-node 2) \w+\.py( (?!--help).*)?"
RUNS = [command for command in COMMANDS if re.fullmatch(RUN, command)]
SHORT = [command for command in RUNS if not re.search(r"torchrun|\.cache", command)]
LONG = [pytest.param(x, marks=pytest.mark.slow) for x in RUNS if x not in SHORT]

# What runs each command; whoever writes one into a README adds it here.
RUN_BY = {
    RUN: "test_command",
    r"python \w+\.py --help": "test_the_help_shows_every_flag",
    r"python tests/benchmarks/learning\.py.*": "test_the_learning_benchmark",
    r"python tests/benchmarks/(speed|survival|mutants|memory|precision)\.py.*": "test_benchmark",
    r"diff \w+\.py \w+\.py": "test_scripts_differ_as_it_says",
    r"git apply (-R )?tests/exercises/\w+\.patch": "tests/test_exercises.py",
    r"python -m pytest tests -k test_\d\d": "test_its_tables_are_those_of_the_tests",
    r"python -m pytest (-n 2|--dist worksteal|-m .not slow.|-m slow|tests| )+": ".ci/run",
    r"python tests/smollm2\.py .*|python -m venv .venv|pip install .*": ".ci/run",
}


def test_no_command_is_left_out():
    assert "python iac_shared.py --num-agents 2" in COMMANDS  # test_command compares it
    for command in COMMANDS:
        found = [by for pattern, by in RUN_BY.items() if re.fullmatch(pattern, command)]
        assert found, f"nothing runs {command!r}"
        assert all(f"def {by}(" in TESTS or (ROOT / by).is_file() for by in found)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs commands, in this process those of a tiny team; returns the output and the folder."""
    for name in ("tests", *(f"{script}.py" for script in SCRIPTS)):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_task.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)

    def run(words):
        if words[1][:-3] in SCRIPTS and "--train-file=few.jsonl" not in words:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        else:
            torchrun = ["-m", "torch.distributed.run"] * (words[0] == "torchrun")
            subprocess.run([sys.executable, *torchrun, *words[1:]], check=False)
        out, err = capfd.readouterr()
        print(err[-2000:])  # what a failing test shows
        return out, Path(out.split("run folder: ")[-1].strip())

    return run


@pytest.mark.parametrize("command", SHORT + LONG)
def test_command(command, run, request):
    """A run shows samples, one that was finished none; README's team learns."""
    more = f"{FEW} {6 if 'my_task.py' in command else 1}".split()
    if ".cache/smollm2" in command:
        command = command.replace(".cache/smollm2", request.getfixturevalue("smollm2"))
        items = "tests/problems.jsonl" if "code.py" in command else "tests/posts.jsonl"
        few = Path(items).read_text().splitlines(keepends=True)[:17]
        few = ['{"string": "IT"}\n'] * 17 if "str_build" in command else few
        few = few[:5] if "--num-turns" in command else few  # samples for an update, too
        Path("few.jsonl").write_text("".join(few))
        more += ["--train-file=few.jsonl", "--max-new-tokens=8", "--save-interval=0"]
    if "runs/RUN" in command:
        command = command.replace("runs/RUN", str(run(command.split()[:2] + more)[1]))
    words = shlex.split(command)
    if "--resume" in words:  # a run of one epoch, which is over
        more = []
    out, folder = run(words + more)
    assert ("agent 0 reads:" in out) == bool(more)
    if "my_task.py" in words:
        lines = (folder / "metrics.jsonl").read_text()
        rewards = list(map(float, re.findall(r'"rollout/reward": ([\d.e-]+)', lines)))
        assert rewards[0] < 0.15 and rewards[-1] > rewards[0] + 0.2
    if command == "python iac_shared.py --num-agents 2":  # README shows what it prints
        shown = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
        shown, out = (re.sub(r"\d+", "#", x).splitlines() for x in (shown, out))
        assert set(shown) <= {*out, "#", "..."}  # an answer, and what is left out


def test_the_help_shows_every_flag(run, capfd):
    with pytest.raises(SystemExit):
        run(["python", "iac_separate.py", "--help"])
    shown = set(re.findall(r"--[\w-]+", capfd.readouterr().out))
    assert {f"--{x.replace('_', '-')}" for x in vars(iac_separate.Args())} <= shown


def test_scripts_differ_as_it_says():
    """Changed lines of each pair, 120 at most, in the paragraph that names `diff`; every
    function that differs stands in that section. All others are the same to the byte."""
    command, counts = "`diff iac_separate.py maac.py`", []
    (section,) = (text for text in README.split("\n## ") if command in text)
    (claim,) = (text for text in section.split("\n\n") if command in text)
    for pair in ((iac_separate, maac), (iac_shared, iac_separate), (iac_shared, maac)):
        words = ["diff", *(module.__file__ for module in pair)]
        out = subprocess.run(words, check=False, stdout=subprocess.PIPE).stdout
        counts.append(sum(line[:1] in (b"<", b">") for line in out.splitlines()))
        for name in vars(pair[0]).keys() | vars(pair[1]).keys():
            both = [vars(module).get(name) for module in pair]
            if any(getattr(x, "__module__", "") in SCRIPTS for x in both):
                sources = {x and inspect.getsource(x) for x in both}
                assert len(sources) == 1 or f"`{name}`" in section, name
    assert list(map(int, re.findall(r"\b\d+\b", claim))) == counts
    assert max(counts) <= 120
    for name in ("sequence_logprobs", "update_critic", "update_actor"):
        both = [getattr(module, name) for module in (maac, iac_separate)]
        assert len(set(map(inspect.getsource, both))) == 1, name


def test_each_equation_stands_in_the_functions_that_it_names():
    """Its number, in a comment or a docstring."""
    rows = re.findall(r"^\| (\(\d\)) \| .* \| (.+) \|$", README, re.MULTILINE)
    assert [number for number, _ in rows] == ["(1)", "(2)", "(3)", "(4)", "(5)"]
    for number, cell in rows:
        names = set(re.findall(r"`(\w+)`", cell))
        assert names <= set().union(*map(vars, MODULES))
        for own in map(vars, MODULES):
            assert any(number in inspect.getsource(own[x]) for x in names & own.keys())


def test_its_tables_are_those_of_the_tests():
    """Pitfalls, with all the tests that there are; exercises, with their changed lines."""
    rows = re.findall(r"^\| (\d+) \| .* \| (`test_.*`) \|$", TEXT, re.MULTILINE)
    named = [(n, test) for n, cell in rows for test in re.findall(r"`(\w+)`", cell)]
    tests = re.findall(r"^def (test_(\d\d)_\w+)\(", TESTS, re.MULTILINE)
    assert sorted(named) == sorted((n.lstrip("0"), test) for test, n in tests)
    rows = re.findall(r"^\|.*`(\w+)\.patch`.*?\| (\d+) \|", TEXT, re.MULTILINE)
    assert dict(rows) == {name: str(changed_lines(name)) for name in OFF}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_links_and_pictures_are_there(page):
    """Files and headings of this project, and the files that are named."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`((?:tests|\.ci)/[\w./]+)`", prose):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert target.suffix != ".png" or target.read_bytes()[:4] == b"\x89PNG"
        if anchor:
            heads = re.sub(r"[^\w\n #-]", "", target.read_text().lower())
            assert f"#-{anchor}\n" in heads.replace(" ", "-"), link


def test_the_learning_benchmark_counts_quarters_over_episodes(monkeypatch):
    """Two runs of eight episodes: their first, second, third, fourth pairs together."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    quarters = importlib.import_module("learning").quarters
    runs = [{"rewards": list(map(int, x))} for x in ("01224413", "12228835")]
    # 0 1 1 2: deviation sqrt(2/3) over 2; 4 4 8 8: sqrt(16/3) over 2; 1 3 3 5: sqrt(8/3) over 2
    assert quarters(runs) == "1.00 (0.41) → 2.00 (0.00) → 6.00 (1.15) → 3.00 (0.82)"
    assert quarters([*runs, {"rewards": None}]) == "-"


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "/learning.py" in c])
def test_the_learning_benchmark(command, run, request):
    """Each command, for one script and seed and a few updates."""
    real = re.search("length_ratio|tldr", command)
    model = request.getfixturevalue("smollm2") if real else "unused"
    words = shlex.split(f"{command} --scripts iac_shared --seeds 1 --model {model}")
    words += [f"--flags={FEW} 1 --rollout-buffer-size 32 --max-new-tokens 4"]
    if "--reference" in words:
        words += ["--environment", request.getfixturevalue("comlrl")]
    (out, _), folder = run(words), Path("runs/learning")
    assert ("| CoMLRL iac_shared | 1 |" in out) == ("--reference" in words)
    assert (folder / "learning.md").read_text().strip() in out
    tasks = {path.stem for path in folder.glob("*.png")}
    assert tasks and all(f"| {task} | iac_shared | 1 |" in out for task in tasks)


BENCHMARKS = {  # what is printed; so short a run has not learned
    "speed.py --parts compare default --cases bfloat16 --rounds 1 --buffer 2 --max-new-tokens 2 --scripts iac_shared --model MODEL":
    r"iac_shared.py \| bfloat16 \| [\d.]+ \| - .*iac_shared.py \| \d+ (\| \d+ % ){4}\|",
    "survival.py --parts kill ranks --kills 1 --scripts iac_shared --flags=--num-train-epochs=2":
    r"ranks 1: 1 of 1 the same(.*rank \d killed, \[\] left, \d\.\d s){2}",
    "memory.py --scripts iac_shared --ranks 16 --buffer 2 --max-new-tokens 2 --model MODEL":
    r"\| iac_shared.py \| 2 \| LoRA 16 \| .*\| Qwen3-4B \| LoRA, bfloat16 \| \d+ \|",
    "precision.py --max-new-tokens 2 --model MODEL": r"\| float32 (\| 0\.\d+ ){6}.*\| bfloat16 (\| 0\.\d+ ){6}",
    "mutants.py 8": r" 8 killed: ",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmark(command, run, request):
    model = request.getfixturevalue("smollm2") if "MODEL" in command else ""
    out, _ = run(f"python tests/benchmarks/{command.replace('MODEL', model)}".split())
    assert re.search(BENCHMARKS[command], out, re.DOTALL)
