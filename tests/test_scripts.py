"""The shell scripts. A stand-in for Python records the calls, so that nothing is downloaded."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from instaqnas.config.command import parse_command

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
STAGES = ("pretrain", "search", "finetune", "eval")

# Copies itself into the folder of `-m venv`, and appends every call to the file `calls`.
FAKE_PYTHON = """#!/usr/bin/env bash
set -euo pipefail
case "$*" in
  --version) echo "Python 3.x" ;;
  "-c import sys; sys.exit(sys.version_info < (3, 10))") [[ ! -e old ]] ;;
  "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >>calls ;;
  "-m pip --version") [[ ! -e .venv/without-pip ]] ;;
  "-m pip install"*) echo "pip ${@: -1}" >>calls && [[ ! -e offline ]] ;;
  *) echo "$*" >>calls ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts, with empty lists of requirements."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "tests").mkdir()
    for name in ("requirements.txt", "requirements-deploy.txt", "tests/requirements.txt"):
        (root / name).write_text("# nothing\n")
    (root / "fake-python").write_text(FAKE_PYTHON)
    (root / "fake-python").chmod(0o755)
    return root


def run(
    project: Path, script: str, *words: str, python: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python or str(project / "fake-python"), **environment}
    command = [str(project / "scripts" / script), *words]
    return subprocess.run(command, cwd=project.parent, env=environment, capture_output=True, text=True, check=False)


def calls(project: Path) -> list[str]:
    """Returns the calls since the last time."""
    path = project / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_every_script_is_there() -> None:
    named = {
        "setup.sh",
        "test.sh",
        "quickstart.sh",
        "compare_quantization.sh",
        *(f"{stage}.sh" for stage in STAGES),
        "run",
    }
    assert named <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_strict_bash(path: Path) -> None:
    assert path.stat().st_mode & stat.S_IXUSR
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    statements = [line for line in lines if line and not line.startswith("#")]
    assert statements[0] == "set -euo pipefail"
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_setup_makes_the_environment_once(project: Path) -> None:
    run(project, "setup.sh").check_returncode()
    assert calls(project) == ["venv", "pip requirements.txt"]
    again = run(project, "setup.sh")
    assert again.returncode == 0
    assert again.stdout + again.stderr == ""
    assert calls(project) == []


def test_setup_adds_what_the_tests_need(project: Path) -> None:
    run(project, "setup.sh")
    calls(project)
    run(project, "setup.sh", "--dev").check_returncode()
    assert calls(project) == ["pip requirements-deploy.txt", "pip tests/requirements.txt"]


def test_setup_adds_what_onnx_files_need(project: Path) -> None:
    run(project, "setup.sh", "--deploy").check_returncode()
    assert calls(project) == ["venv", "pip requirements.txt", "pip requirements-deploy.txt"]
    assert run(project, "setup.sh").returncode == 0
    assert calls(project) == []


def test_setup_installs_again_when_the_requirements_change(project: Path) -> None:
    run(project, "setup.sh")
    calls(project)
    (project / "requirements.txt").write_text("# something else\n")
    run(project, "setup.sh").check_returncode()
    assert calls(project) == ["pip requirements.txt"]


def test_setup_goes_on_after_a_failed_installation(project: Path) -> None:
    (project / "offline").touch()
    assert run(project, "setup.sh").returncode != 0
    (project / "offline").unlink()
    calls(project)
    run(project, "setup.sh").check_returncode()
    assert calls(project) == ["pip requirements.txt"]


def test_setup_replaces_an_environment_without_pip(project: Path) -> None:
    run(project, "setup.sh")
    calls(project)
    (project / ".venv" / "without-pip").touch()
    (project / "requirements.txt").write_text("# something else\n")
    run(project, "setup.sh").check_returncode()
    assert calls(project) == ["venv", "pip requirements.txt"]


def test_setup_refuses_an_old_python_in_one_line(project: Path) -> None:
    (project / "old").touch()
    refused = run(project, "setup.sh")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "3.10 or newer" in refused.stderr
    assert not (project / ".venv").exists()


def test_setup_refuses_a_python_that_is_not_there_and_unknown_options(project: Path) -> None:
    assert "no such Python" in run(project, "setup.sh", python="python-that-is-not-there").stderr
    assert "unknown option --all" in run(project, "setup.sh", "--all").stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stage_script_hands_its_words_on(project: Path, stage: str) -> None:
    run(project, "setup.sh")
    calls(project)
    run(project, f"{stage}.sh", "--config", "a b.yaml", "--seed", "1").check_returncode()
    assert calls(project) == [f"{stage}.py --config a b.yaml --seed 1"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_script_runs_as_many_processes_as_it_is_told(project: Path, stage: str) -> None:
    run(project, "setup.sh")
    calls(project)
    run(project, f"{stage}.sh", "--config", "x.yaml", NPROC="2").check_returncode()
    torchrun = "-m instaqnas.launch --standalone --nproc-per-node 2"
    assert calls(project) == [f"{torchrun} -- {stage}.py --config x.yaml"]


def test_torchrun_leaves_the_options_of_a_stage_alone(project: Path) -> None:
    run(project, "setup.sh")
    python = project / ".venv" / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    report = "import os, pathlib, sys; pathlib.Path(os.environ['RANK']).write_text(' '.join(sys.argv[1:]))"
    (project / "search.py").write_text(report)
    shutil.copytree(ROOT / "instaqnas", project / "instaqnas")
    words = ["--config", "x.yaml", "--run", "R", "--restart"]  # torchrun has --run-path and --max-restarts
    run(project, "search.sh", *words, NPROC="2").check_returncode()
    assert [(project / rank).read_text().split() for rank in ("0", "1")] == [words, words]


def test_quickstart_runs_the_stages_in_order(project: Path) -> None:
    result = run(project, "quickstart.sh", "--seed", "1")
    result.check_returncode()
    common = "--config configs/shapes.yaml --run runs/quickstart"
    assert calls(project) == [
        "venv",
        "pip requirements.txt",
        "-m instaqnas.tools.shapes --root data/shapes",
        f"pretrain.py {common} --seed 1",
        f"search.py {common} --seed 1",
        f"finetune.py {common} --seed 1",
        f"eval.py {common} --bits basic --seed 1",
    ]
    assert result.stdout.count(" s] ") == 6


@pytest.mark.parametrize("names", [("last.pt",), ("best.pt", "last.pt")])
def test_all_compared_trainings_start_from_one_network(project: Path, names: tuple[str, ...]) -> None:
    folder = project / "runs" / "quantization" / "shared" / "pretrain_fp32"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    run(project, "compare_quantization.sh").check_returncode()
    [shared, *others] = [call for call in calls(project) if call.startswith("pretrain.py")]
    assert "--init" not in shared  # goes on from its own: the best where there is one, else the last
    assert len(others) == 13
    assert all(call.endswith(f" --init runs/quantization/shared/pretrain_fp32/{names[0]}") for call in others)


def test_compared_trainings_have_no_target_that_their_bits_might_not_reach(project: Path) -> None:
    full = project / "runs" / "quantization" / "shared" / "pretrain_fp32" / "last.pt"
    full.parent.mkdir(parents=True)
    full.touch()
    run(project, "compare_quantization.sh").check_returncode()
    found = [re.findall(r"\[\[.*?\]\]|\[.*?\]|\S+", call) for call in calls(project) if call.startswith("pretrain.py")]
    assert len(found) == 14
    for words in found:
        settings = words[1 : words.index("--init")] if "--init" in words else words[1:]
        config = parse_command("pretrain", settings).config
        assert config.reward.name == "quality"
        assert config.bits.heads == config.bits.depthwise == (8, 8)


def test_test_script_checks_then_tests(project: Path) -> None:
    in_processes = "--numprocesses auto --dist loadfile"
    run(project, "test.sh", "-x").check_returncode()
    assert calls(project)[4:] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        f"-m pytest {in_processes} -x",
    ]
