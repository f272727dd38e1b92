"""The sweep: the stages it runs and skips, the input it refuses, and its report."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import instaqnas.tools.sweep as sweep_module
from instaqnas.config.command import parse_command
from instaqnas.data.shapes import generate_shapes
from instaqnas.errors import InputError
from instaqnas.evaluation.report import plot_pareto
from instaqnas.tools.sweep import main, parse_sweep
from instaqnas.tools.sweep_report import (
    Entry,
    Spread,
    SweepRun,
    entries,
    markdown_table,
    plot_entries,
    read_runs,
    write_files,
)
from instaqnas.training import stages

CONFIG = """
data: {{roots: [{root}], val_split: val, workers: 0}}
detector: {{image_size: 64, width: 0.125, extras_batch_norm: true}}
bits: {{choices: [[2, 2], [4, 4]]}}
policy: {{pool: 8, width: 2, effort: true}}
reward: {{name: budget, quality: loss, target_gbitops: 99}}  # the sweep sets its own
pretrain_fp32: {{epochs: 1, batch_size: 4}}
pretrain_quant: {{epochs: 1, batch_size: 4, distill_weight: 1.0}}
search: {{epochs: 1, batch_size: 4, policy_batch_size: 4, distill_weight: 1.0, start: sensitivity}}
finetune: {{epochs: 1, batch_size: 4}}
eval: {{batch_size: 4}}
runtime: {{compile: off}}
device: cpu
"""
TARGETS = "0.11,0.112"
# Records how it was called; writes the files of its stages, or fails.
FAKE_SCRIPT = """
import json, sys
from pathlib import Path
stage, words = Path(sys.argv[0]).stem, sys.argv[1:]
option = lambda name: words[words.index(name) + 1] if name in words else None
run, bits = Path(option("--run")), option("--bits")
print(f"this is {stage}")
calls = Path(__file__).parent / "calls"
target = option("--reward.target_gbitops")
with calls.open("a") as file:
    file.write(" ".join(filter(None, [stage, bits, run.name, target])) + chr(10))
broken = Path(__file__).parent / "broken"
if broken.exists() and broken.read_text() == stage:
    print("first line" + chr(10) + "error: it is broken", file=sys.stderr)
    sys.exit(2)
folders = {"pretrain": ["pretrain_fp32", "pretrain_quant"], "search": ["search"], "eval": ["eval"]}
folders["finetune"] = [f"finetune_{bits}".replace(":", "_") if bits else "finetune"]
for name in folders[stage]:
    (run / name).mkdir(exist_ok=True)
    (run / name / ("report.json" if stage == "eval" else "last.pt")).touch()
if stage == "eval":
    row = {"map_11pt": 0.5, "coco_ap": 0.2, "gbitops_total": 0.1, "gbitops_policy": 0.01, "distinct_configs": 3}
    rows = [{**row, "bits": "policy", "finetuned": 2}]
    (run / "eval" / "report.json").write_text(json.dumps({"rows": rows, "config": {"seed": 0}}))
"""
ONE_SEED = ["finetune uniform:w2a2 seed0", "finetune uniform:w4a4 seed0"]


def of_target(target: str, seed: str = "0") -> list[str]:
    steps = ["search", "finetune", "finetune static", "eval all"]
    return [f"{step} target_{target} {target}" for step in steps]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny experiment."""
    generate_shapes(tmp_path / "shapes", {"train": 8, "val": 4, "test": 4}, image_size=64, seed=3)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(root=tmp_path / "shapes"))
    return path


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the stage scripts."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for stage in ("pretrain", "search", "finetune", "eval"):
        (folder / f"{stage}.py").write_text(FAKE_SCRIPT)
    monkeypatch.setattr(sweep_module, "SCRIPTS", folder)
    return folder


def calls(scripts: Path) -> list[str]:
    """The calls since the last time this was asked."""
    path = scripts / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def words(config: Path, *more: str) -> list[str]:
    run = str(config.parent / "run")
    return ["--config", str(config), "--run", run, "--targets", TARGETS, "--seeds", "0", *more]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture, status: int = 2) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == status
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


# --- Steps ------------------------------------------------------------------------------------------------------------


def test_pretraining_and_uniform_baselines_run_once_a_seed_the_rest_once_a_target(config: Path, scripts: Path) -> None:
    main(words(config, "--seeds", "0,7"))
    once = ["pretrain seed0", *ONE_SEED, *of_target("0.11"), *of_target("0.112")]
    assert calls(scripts) == [*once, *(call.replace("seed0", "seed7") for call in once)]
    target = config.parent / "run" / "seed7" / "target_0.112"
    for name in ("pretrain_fp32", "pretrain_quant", "finetune_uniform_w2a2", "finetune_uniform_w4a4"):
        assert (target / name).readlink() == Path("..") / name
        assert (target / name / "last.pt").exists()
    assert (target / "logs" / "finetune_static.log").read_text() == "this is finetune\n"
    assert (config.parent / "run" / "table.md").read_text().count("| policy |") == 2


@pytest.mark.slow
def test_repeated_it_runs_nothing_and_added_targets_run_alone(config: Path, scripts: Path) -> None:
    main(words(config))
    calls(scripts)
    main(words(config))
    assert calls(scripts) == []
    main(words(config, "--targets", "0.11,0.112,0.115"))
    assert calls(scripts) == of_target("0.115")


def test_a_failed_step_is_named_with_its_log_and_the_sweep_continues_from_there(
    config: Path, scripts: Path, capsys: pytest.CaptureFixture
) -> None:
    (scripts / "broken").write_text("search")
    message = refusal(words(config), capsys)
    log = config.parent / "run" / "seed0" / "target_0.11" / "logs" / "search.log"
    assert message == f"error: search in {log.parents[1]}: exit status 2 (error: it is broken); full log: {log}\n"
    assert "first line" in log.read_text()
    assert calls(scripts) == ["pretrain seed0", *ONE_SEED, of_target("0.11")[0]]
    (scripts / "broken").unlink()
    main(words(config))
    assert calls(scripts) == [*of_target("0.11"), *of_target("0.112")]


@pytest.mark.slow
def test_with_another_setting_the_stages_are_asked_again(config: Path, scripts: Path) -> None:
    main(words(config, "--targets", "0.11"))
    calls(scripts)
    main(words(config, "--targets", "0.11", "--finetune.epochs", "2"))  # they refuse, or have nothing to do
    assert calls(scripts) == ["pretrain seed0", *ONE_SEED, *of_target("0.11")]


@pytest.mark.slow
def test_a_lost_output_is_made_again_with_all_that_depends_on_it(config: Path, scripts: Path) -> None:
    main(words(config))
    calls(scripts)
    (config.parent / "run" / "seed0" / "target_0.11" / "finetune" / "last.pt").unlink()
    main(words(config))
    assert calls(scripts) == of_target("0.11")[1:]


@pytest.mark.slow
def test_steps_after_one_that_ran_again_run_even_if_the_sweep_ended_in_between(
    config: Path, scripts: Path, capsys: pytest.CaptureFixture
) -> None:
    main(words(config))
    capsys.readouterr()
    seed = config.parent / "run" / "seed0"
    (seed / "target_0.11" / "search" / "last.pt").unlink()
    (scripts / "broken").write_text("finetune")
    refusal(words(config), capsys)
    (scripts / "broken").unlink()
    calls(scripts)
    main(words(config))
    assert calls(scripts) == of_target("0.11")[1:]
    (seed / "pretrain_quant" / "last.pt").unlink()
    (scripts / "broken").write_text("search")
    capsys.readouterr()
    refusal(words(config), capsys)
    (scripts / "broken").unlink()
    calls(scripts)
    main(words(config))
    assert calls(scripts) == [*of_target("0.11"), *of_target("0.112")]


def test_a_stage_that_a_target_owns_is_not_replaced_by_a_link(config: Path, scripts: Path) -> None:
    own = config.parent / "run" / "seed0" / "target_0.11" / "finetune_uniform_w2a2"
    own.mkdir(parents=True)
    main(words(config, "--targets", "0.11"))
    assert not own.is_symlink()


def test_a_damaged_record_is_named(config: Path, scripts: Path, capsys: pytest.CaptureFixture) -> None:
    main(words(config))
    capsys.readouterr()
    for content in ("{", "[]"):
        (config.parent / "run" / "seed0" / "steps.json").write_text(content)
        assert "seed0/steps.json: damaged" in refusal(words(config), capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--targets", ""], "--targets: expected numbers such as 1,2, got ''"),
        (["--targets", "0.11,x"], "--targets: expected numbers such as 1,2, got '0.11,x'"),
        (["--targets", "0.11,0.110"], "--targets: 0.11 occurs twice"),
        (["--targets", "0.11,5"], "--targets: expected 0.1084 to 0.1171 GBitOps"),
        (["--targets=-1"], "reward.target_gbitops: expected at least 0, got -1.0"),
        (["--seeds", "1,1"], "--seeds: 1 occurs twice"),
        (["--seeds", "0.5"], "--seeds: expected numbers such as 1,2, got '0.5'"),
        (["--seeds=-1"], "seed: expected 0 to 4294967295, got -1"),
        (["--search.epoch", "3"], "unknown option --search.epoch; did you mean --search.epochs?"),
        (["--restart"], "--restart: does not apply to a sweep; pass it to one stage's script"),
        (["--init=last.pt"], "--init: does not apply to a sweep"),
        (["--seed=3"], "--seed: set by the sweep itself"),
        (["--search.epochs", "0"], "search.epochs: expected at least 1, got 0"),
        (["--data.roots=[nowhere]"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    config: Path, scripts: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    assert message in refusal(words(config, *more), capsys)
    assert calls(scripts) == []
    assert not (config.parent / "run").exists()


def test_long_seeds_are_told_apart(config: Path) -> None:
    sweep, _ = parse_sweep(words(config, "--seeds", "1234567,1234568"))
    assert sweep.seeds == (1234567, 1234568)


@pytest.mark.slow
def test_the_real_stages_share_pretraining_and_baselines(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(command: list[str], **_: object) -> subprocess.CompletedProcess:
        stage = Path(command[1]).stem
        getattr(stages, f"run_{stage}")(parse_command(stage, command[2:]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    main(words(config, "--targets", "0.112"))
    content = json.loads((config.parent / "run" / "sweep.json").read_text())
    assert content["missing"] == []
    [run] = content["runs"]
    report = json.loads((config.parent / "run" / "seed0" / "target_0.112" / "eval" / "report.json").read_text())
    [found] = [row["diagnostics"]["rank_correlation"] for row in report["rows"] if row["bits"] == "policy"]
    [policy] = [row for row in run["rows"] if row["bits"] == "policy"]
    assert policy["rank_correlation"] == found["difficulty"]
    assert (run["seed"], run["target"]) == (0, 0.112)
    finetuned = {"policy": 2, "static": 2, "modal": 2, "shuffled": 2, "frequencies": 2, "fp32": 0, "random": 0}
    finetuned |= {"uniform:w2a2": 2, "uniform:w4a4": 2}
    assert {row["bits"]: row["finetuned"] for row in run["rows"]} == finetuned
    assert [entry["target"] for entry in content["entries"]] == [None] * 4 + [0.112] * 5
    assert (config.parent / "run" / "pareto.png").stat().st_size < 60_000
    assert (config.parent / "run" / "seed0" / "pretrain_quant" / "sensitivity.json").exists()  # for all targets


@pytest.mark.slow
def test_a_stage_ends_with_the_sweep(config: Path, scripts: Path) -> None:
    (scripts / "pretrain.py").write_text(
        "import os, sys, time\nprint(os.getpid(), flush=True)\nopen(__file__ + '.pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    starter = (
        "import sys\nfrom pathlib import Path\nimport instaqnas.tools.sweep as sweep\n"
        f"sweep.SCRIPTS = Path({str(scripts)!r})\nsweep.main(sys.argv[1:])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter, *words(config)], stdout=subprocess.PIPE, text=True)
    assert "pretrain" in process.stdout.readline()
    pid_file = scripts / "pretrain.py.pid"
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == 143
    process.stdout.close()
    stat = Path("/proc") / pid_file.read_text() / "stat"
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


# --- Report -----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, seed: int, target: float, **rows: tuple[float, float, dict]) -> SweepRun:
    path = folder / f"seed{seed}" / f"target_{target:g}" / "eval" / "report.json"
    path.parent.mkdir(parents=True)
    plain = {"coco_ap": 0.1, "gbitops_policy": 0.0, "distinct_configs": 1, "finetuned": 0, "images": 6}
    content = [
        {**plain, "bits": bits.replace("_", ":"), "map_11pt": m, "gbitops_total": cost, **more}
        for bits, (m, cost, more) in rows.items()
    ]
    path.write_text(json.dumps({"rows": content, "config": {"seed": seed}}))
    return SweepRun(seed, target, path.parents[1])


@pytest.fixture
def reported(tmp_path: Path) -> list[SweepRun]:
    """Two seeds at two targets; at the second target one seed is missing."""

    def known(value: float | None) -> dict:
        found = {"difficulty": value, "objects": 0.9, "smallest_side": 0.8}
        return {"diagnostics": {"rank_correlation": found}, "distinct_configs": 40, "finetuned": 9}

    shared = {"fp32": (0.75, 90.0, {}), "random": (0.5, 2.0, {})}
    return [
        write_report(tmp_path, 0, 1.8, **shared, policy=(0.70, 1.81, known(0.6)), static=(0.69, 1.80, {})),
        write_report(
            tmp_path, 1, 1.8, fp32=(0.77, 90.0, {}), policy=(0.72, 1.77, known(None)), static=(0.70, 1.76, {})
        ),
        write_report(tmp_path, 0, 2.0, **shared, uniform_w2a2=(0.4, 1.6, {}), policy=(0.74, 2.0, {})),
        SweepRun(1, 2.0, tmp_path / "seed1" / "target_2"),
    ]


def test_means_and_spreads_are_over_seeds_and_differences_seed_by_seed(reported: list[SweepRun]) -> None:
    runs, missing = read_runs(reported)
    assert [(run.seed, run.target) for run in missing] == [(1, 2.0)]
    found = {(entry.target, entry.bits): entry for entry in entries(runs)}
    shared = [(None, bits) for bits in ("fp32", "random", "uniform:w2a2")]
    assert list(found) == [*shared, (1.8, "policy"), (1.8, "static"), (2.0, "policy")]
    policy, static = found[1.8, "policy"], found[1.8, "static"]
    assert policy.map_percent.mean == pytest.approx(71)
    assert policy.map_percent.deviation == pytest.approx(statistics.stdev([70, 72]))
    assert policy.gbitops.mean == pytest.approx(1.79)
    assert policy.off_target_percent.mean == pytest.approx(100 * (1.79 / 1.8 - 1))
    assert policy.ahead_percent is None
    assert (policy.rank_correlation.mean, policy.rank_correlation.deviation) == (0.6, None)
    assert (policy.distinct_configs.mean, policy.finetuned, policy.seeds) == (40, [9, 9], 2)
    assert static.ahead_percent.mean == pytest.approx((1 + 2) / 2)
    assert static.ahead_percent.deviation == pytest.approx(statistics.stdev([1, 2]))
    assert found[None, "fp32"].map_percent.mean == pytest.approx(76)
    assert (found[None, "random"].seeds, found[2.0, "policy"].seeds) == (1, 1)
    assert found[None, "fp32"].off_target_percent is None


def test_table_and_files_hold_all_figures(reported: list[SweepRun], tmp_path: Path) -> None:
    runs, missing = read_runs(reported)
    table = markdown_table(runs)
    assert "sample standard deviation over seeds 0, 1;" in table
    assert "| 1.8 | policy | 71.00 ± 1.41 |  | 1.7900 ± 0.0283 | -0.56 ± 1.57 % | 40 | 0.60 | 9 | 2 |" in table
    assert "| 1.8 | static | 69.50 ± 0.71 | 1.50 ± 0.71 | 1.7800 ± 0.0283 | -1.11 ± 1.57 % | 1 |  | 0 | 2 |" in table
    write_files(tmp_path, runs, missing)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["missing"] == [{"seed": 1, "target": 2.0}]
    assert content["config"] == {"seed": 0}
    assert content["entries"][0]["map_percent"]["mean"] == pytest.approx(76)
    assert (tmp_path / "table.md").read_text() == table
    image = cv2.imread(str(tmp_path / "pareto.png"))
    assert image.shape[0] > 300
    assert image.std() > 0
    assert (tmp_path / "pareto.png").stat().st_size < 60_000


def test_report_only_runs_nothing_and_says_what_is_missing(
    config: Path, scripts: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "run: nothing to report yet" in refusal(words(config, "--report-only"), capsys)
    main(words(config, "--targets", "0.11"))
    calls(scripts)
    capsys.readouterr()
    main(words(config, "--report-only"))
    assert calls(scripts) == []
    assert "missing: seed 0, target 0.112" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [3]}', '{"rows": [{"bits": "policy"}]}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, content: str) -> None:
    run = write_report(tmp_path, 0, 1.8)
    run.report.write_text(content)
    with pytest.raises(InputError, match=r"eval/report\.json: not a report\.json of eval\.py"):
        read_runs([run])


def row_colours(axes: Axes) -> dict[str, tuple[float, ...]]:
    """RGBA of each way to choose bits, from the legend; all uniform choices are one."""
    found = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle  # of a point with error bars
        found[re.split("[:,]", label)[0]] = to_rgba(line.get_color())
    return found


def test_a_row_has_the_colour_that_it_has_in_the_plot_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    names = ["fp32", "random", "uniform:w2a2", "static", "policy", "modal", "shuffled", "frequencies"]
    plot_pareto(Path("a.png"), [{"bits": bits, "map_11pt": 0.5, "gbitops_total": 1.0} for bits in names])
    one = Spread(1.0, None)
    plot_entries(Path("b.png"), [Entry(None, bits, 1, one, None, one, None, one, None, [1]) for bits in names])
    of_run, of_sweep = (row_colours(figure.axes[0]) for figure in figures)
    assert len(set(of_run.values())) == len(names)
    assert of_sweep == of_run
