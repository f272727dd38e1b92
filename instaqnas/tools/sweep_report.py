"""The report of a sweep: means and spreads over seeds as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from instaqnas.bits import FP32, FREQUENCIES, MODAL, POLICY, RANDOM, SHUFFLED, STATIC, UNIFORM
from instaqnas.errors import InputError
from instaqnas.evaluation.report import COLOURS, REPORT_FILE, UNIFORM_COLOURS
from instaqnas.experiment.run_dir import versions
from instaqnas.experiment.stage import EVAL
from instaqnas.files import write_text

TARGET_ROWS = (POLICY, STATIC, MODAL, SHUFFLED, FREQUENCIES)  # all other rows are shared by the targets
PLOT_FORMATS = {  # Matplotlib's marker and line
    POLICY: "*-",
    STATIC: "s-",
    UNIFORM: "o-",
    MODAL: "v:",
    SHUFFLED: "P:",
    FREQUENCIES: "^:",
    RANDOM: "D",
}
KEPT = ("bits", "map_11pt", "coco_ap", "gbitops_total", "gbitops_policy", "distinct_configs", "finetuned")
HEADER = (
    "target", "bits", "mAP", "policy ahead by", "GBitOps", "against target", "configurations", "rank correlation",
    "finetuned epochs", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class SweepRun:
    """One seed at one target, and its folder.

    `rows` (of its report, by their `bits`) and the resolved `config` are empty until `read_runs` fills them.
    """

    seed: int
    target: float
    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The file that eval.py writes."""
        return self.folder / EVAL.name / REPORT_FILE

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"seed": self.seed, "target": self.target, "rows": list(self.rows.values())}


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """Such as 72.31 ± 0.42."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Entry:
    """One way to choose bits, over seeds: a line of the table.

    Args:
        target: total GBitOps aimed at; None for rows that all targets share.
        bits: the way to choose bits, as in `--bits`.
        seeds: number of seeds.
        map_percent: mAP, 11 points, in per cent.
        ahead_percent: the policy's mAP minus this one, seed by seed, in points; None for the policy and without target.
        gbitops: total GBitOps per image, policy included.
        off_target_percent: 100 * (gbitops / target - 1); None without target.
        distinct_configs: number of different bit configurations on the test split.
        rank_correlation: between an image's bits and its difficulty; None if no report has it.
        finetuned: of each seed, the epochs of training after pretraining.
    """

    target: float | None
    bits: str
    seeds: int
    map_percent: Spread
    ahead_percent: Spread | None
    gbitops: Spread
    off_target_percent: Spread | None
    distinct_configs: Spread
    rank_correlation: Spread | None
    finetuned: list[int]

    def cells(self) -> list[str]:
        """Cells of the line, in the order of HEADER."""
        return [
            "" if self.target is None else f"{self.target:g}",
            self.bits,
            self.map_percent.text(2),
            _text(self.ahead_percent, 2),
            self.gbitops.text(4),
            "" if self.off_target_percent is None else f"{self.off_target_percent.text(2)} %",
            f"{self.distinct_configs.mean:.0f}",
            _text(self.rank_correlation, 2),
            "/".join(map(str, sorted(set(self.finetuned)))),
            str(self.seeds),
        ]


def _text(value: Spread | None, digits: int) -> str:
    return "" if value is None else value.text(digits)


def read_runs(wanted: Iterable[SweepRun]) -> tuple[list[SweepRun], list[SweepRun]]:
    """The runs whose report has a row `policy`, filled in, and the runs without one.

    Raises: InputError for a file that is no report.
    """
    found, missing = [], []
    for run in wanted:
        rows, config = _read(run.report) if run.report.exists() else ({}, {})
        if POLICY in rows:
            found.append(replace(run, rows=rows, config=config))
        else:
            missing.append(run)
    return found, missing


def _read(report: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows by their `bits`, and the config."""
    try:
        content = json.loads(report.read_text())
        rows = {row["bits"]: {**{key: row[key] for key in KEPT}, **_diagnostics(row)} for row in content["rows"]}
        return rows, dict(content["config"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{report}: not a report.json of eval.py") from None


def _diagnostics(row: dict[str, Any]) -> dict[str, Any]:
    found = (row.get("diagnostics") or {}).get("rank_correlation") or {}
    return {"rank_correlation": found.get("difficulty")}


def entries(runs: Sequence[SweepRun]) -> list[Entry]:
    """Entries that all targets share, one value per seed, then the entries of each target."""
    shared = [bits for bits in dict.fromkeys(bits for run in runs for bits in run.rows) if bits not in TARGET_ROWS]
    found = []
    for bits in shared:
        of_seed: dict[int, SweepRun] = {}
        for run in runs:
            if bits in run.rows:
                of_seed.setdefault(run.seed, run)
        found.append(_entry(None, bits, list(of_seed.values())))
    for target in dict.fromkeys(run.target for run in runs):
        for bits in TARGET_ROWS:
            of_target = [run for run in runs if run.target == target and bits in run.rows]
            found += [_entry(target, bits, of_target)] if of_target else []
    return found


def _entry(target: float | None, bits: str, runs: Sequence[SweepRun]) -> Entry:
    rows = [run.rows[bits] for run in runs]
    costs, maps = [row["gbitops_total"] for row in rows], [100 * row["map_11pt"] for row in rows]
    ahead = off_target = None
    if target is not None:
        off_target = Spread.of([100 * (cost / target - 1) for cost in costs])
        if bits != POLICY:
            ahead = Spread.of([100 * run.rows[POLICY]["map_11pt"] - own for run, own in zip(runs, maps, strict=True)])
    known = [
        value for row in rows if isinstance(value := row["rank_correlation"], int | float) and math.isfinite(value)
    ]
    return Entry(
        target,
        bits,
        len(rows),
        Spread.of(maps),
        ahead,
        Spread.of(costs),
        off_target,
        Spread.of([row["distinct_configs"] for row in rows]),
        Spread.of(known) if known else None,
        [row["finetuned"] for row in rows],
    )


def markdown_table(runs: Sequence[SweepRun]) -> str:
    """The Markdown table and its legend."""
    lines = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)], *(entry.cells() for entry in entries(runs))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    return (
        "On the test split: mAP at 11 points in per cent, GBitOps per image with the policy included. Figures are "
        f"means ± sample standard deviation over seeds {seeds}; `policy ahead by` is a difference of mAP in points, "
        "seed by seed, at the cost of each row; `finetuned epochs` count the detector's training after pretraining, up "
        f"to the checkpoint that was used.\n\n{table}\n"
    )


def write_files(folder: Path, runs: Sequence[SweepRun], missing: Sequence[SweepRun]) -> None:
    """Writes sweep.json (with the config of the first run), table.md and pareto.png."""
    content = {
        "entries": [asdict(entry) for entry in entries(runs)],
        "runs": [run.plain() for run in runs],
        "missing": [{"seed": run.seed, "target": run.target} for run in missing],
        "config": runs[0].config,
        "versions": versions(),
    }
    write_text(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "table.md", markdown_table(runs))
    plot_entries(folder / "pareto.png", entries(runs))


def plot_entries(path: Path, found: Sequence[Entry]) -> None:
    """Plots mAP against total GBitOps with error bars: a line through the uniform choices, one for each other row.

    Full precision is a horizontal line: its cost is far off.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.bits.partition(":")[0], []).append(entry)
    colours = COLOURS | {UNIFORM: UNIFORM_COLOURS[0]}
    for name, group in groups.items():
        if name == FP32:
            label = f"{name}, {group[0].gbitops.mean:.3g} GBitOps"
            axes.axhline(group[0].map_percent.mean, color=colours[name], linestyle="--", label=label)
            continue
        group = sorted(group, key=lambda entry: entry.gbitops.mean)
        axes.errorbar(
            [entry.gbitops.mean for entry in group],
            [entry.map_percent.mean for entry in group],
            xerr=[entry.gbitops.deviation or 0 for entry in group],
            yerr=[entry.map_percent.deviation or 0 for entry in group],
            fmt=PLOT_FORMATS[name],
            color=colours[name],
            markersize=10 if name == POLICY else 5,
            capsize=2,
            linewidth=1,
            label=name,
        )
    axes.set(xlabel="GBitOps per image, policy included", ylabel="mAP at IoU 0.5, 11 points (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
