"""What a sweep leaves behind: figures over seeds, as JSON, as a Markdown table and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from instaqnas.errors import InputError
from instaqnas.training.run_dir import versions, write_text

TARGET_ROWS = ("policy", "static", "modal", "shuffled", "frequencies")  # the others are the same for all targets
KEPT = ("bits", "map_11pt", "coco_ap", "gbitops_total", "gbitops_policy", "distinct_configs", "finetuned")
HEADER = (
    "target", "bits", "mAP", "policy ahead by", "GBitOps", "against target", "configurations", "rank correlation",
    "finetuned epochs", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class SweepRun:
    """One seed at one target, and its folder.

    `rows` of its report, by their `bits`, and the resolved `config` in it are empty before it has been read.
    """

    seed: int
    target: float
    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """Where eval.py writes it."""
        return self.folder / "eval" / "report.json"

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"seed": self.seed, "target": self.target, "rows": list(self.rows.values())}


@dataclass(frozen=True)
class Spread:
    """Mean of one value per seed, and sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int) -> str:
        """Such as 72.31 ± 0.42."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Entry:
    """One way to choose bits over seeds.

    Args:
        target: total GBitOps that were aimed at; None for what is the same at all targets.
        bits: the way, as in `--bits`.
        seeds: how many.
        map_percent: mAP, 11 points, in per cent.
        ahead_percent: what the policy's mAP is above it, seed by seed; None for the policy itself and without a target.
        gbitops: mean total GBitOps per image.
        off_target_percent: these against the target.
        distinct_configs: mean number of different bit configurations on the test split.
        rank_correlation: between an image's bits and its difficulty, where the reports have it.
        finetuned: epochs that the detector was trained for after pretraining, of each seed.
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
        """Those of its line in the table."""
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
    """Those that have a report with a policy, with its rows, and those that have none yet.

    Raises: InputError for a file that is no report.
    """
    found, missing = [], []
    for run in wanted:
        rows, config = _read(run.report) if run.report.exists() else ({}, {})
        if "policy" in rows:
            found.append(replace(run, rows=rows, config=config))
        else:
            missing.append(run)
    return found, missing


def _read(report: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows by their `bits`, and config."""
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
    """What is the same at all targets, one value per seed, then by target what is not."""
    shared = [bits for bits in dict.fromkeys(bits for run in runs for bits in run.rows) if bits not in TARGET_ROWS]
    found = []
    for bits in shared:
        one_of_seed = {run.seed: run for run in reversed(runs) if bits in run.rows}
        found.append(_entry(None, bits, list(one_of_seed.values())[::-1]))
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
        if bits != "policy":
            ahead = Spread.of([100 * run.rows["policy"]["map_11pt"] - own for run, own in zip(runs, maps, strict=True)])
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


def format_table(runs: Sequence[SweepRun]) -> str:
    """The Markdown table."""
    lines = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)], *(entry.cells() for entry in entries(runs))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    return (
        "On the test split; mAP at 11 points in per cent, GBitOps per image with those of the policy. Figures are "
        f"means ± sample standard deviation over seeds {seeds}; `policy ahead by` is in points of mAP, seed by seed, "
        "whatever the row costs; `finetuned epochs` are those of its detector after pretraining, up to the checkpoint "
        f"that was used.\n\n{table}\n"
    )


def write_files(folder: Path, runs: Sequence[SweepRun], missing: Sequence[SweepRun]) -> None:
    """Writes sweep.json, with the config of the first run, table.md and pareto.png."""
    content = {
        "entries": [asdict(entry) for entry in entries(runs)],
        "runs": [run.plain() for run in runs],
        "missing": [{"seed": run.seed, "target": run.target} for run in missing],
        "config": runs[0].config,
        "versions": versions(),
    }
    write_text(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "table.md", format_table(runs))
    plot(folder / "pareto.png", entries(runs))


def plot(path: Path, found: Sequence[Entry]) -> None:
    """mAP against total GBitOps with error bars; the uniform choices, and each other way over targets, are lines.

    Full precision is a line across: its cost is far off.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.bits.partition(":")[0], []).append(entry)
    markers = {"policy": "*-", "static": "s-", "uniform": "o-", "modal": "v:", "shuffled": "P:"}
    markers |= {"frequencies": "^:", "random": "D"}
    for name, group in groups.items():
        if name == "fp32":
            label = f"fp32, {group[0].gbitops.mean:.3g} GBitOps"
            axes.axhline(group[0].map_percent.mean, color="grey", linestyle="--", label=label)
            continue
        group = sorted(group, key=lambda entry: entry.gbitops.mean)
        axes.errorbar(
            [entry.gbitops.mean for entry in group],
            [entry.map_percent.mean for entry in group],
            xerr=[entry.gbitops.deviation or 0 for entry in group],
            yerr=[entry.map_percent.deviation or 0 for entry in group],
            fmt=markers[name],
            markersize=10 if name == "policy" else 5,
            capsize=2,
            linewidth=1,
            label=name,
        )
    axes.set(xlabel="GBitOps per image, policy included", ylabel="mAP at IoU 0.5, 11 points (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
