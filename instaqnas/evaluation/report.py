"""The report of eval.py: a table, report.json, per_image.csv, and a plot of mAP against cost."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from instaqnas.bits import FP32, FREQUENCIES, MODAL, POLICY, RANDOM, SHUFFLED, STATIC, UNIFORM
from instaqnas.data.voc import Annotation
from instaqnas.evaluation.coco_files import write_detections, write_ground_truth
from instaqnas.evaluation.measure import EvalReport
from instaqnas.evaluation.survey import Diagnosis
from instaqnas.experiment.run_dir import versions
from instaqnas.files import write_text
from instaqnas.metrics.bootstrap import interval_of, resampled, save_matches

# Matplotlib's names of the colours of rows, the same in every plot.
COLOURS = {
    FP32: "grey",
    RANDOM: "C1",
    FREQUENCIES: "C2",
    POLICY: "C3",
    MODAL: "C4",
    STATIC: "C5",
    SHUFFLED: "C6",
}
UNIFORM_COLOURS = ("C0", "C9", "C8", "C7", "black", "gold", "navy", "lime")  # bits.choices has eight at most
REPORT_FILE = "report.json"
LINE = 120  # characters on a line of the terminal
RUN_MARKERS, RUN_LINES = "o^sDvPX<>", ("--", ":", "-.")
ROW_KEYS = (
    "map_11pt",
    "map_all_point",
    "coco_ap",
    "gbitops_detector",
    "gbitops_policy",
    "gbitops_total",
    "distinct_configs",
    "images",
    "false_positives_per_empty",
    "image_recall",
    "image_false_alarms",
)


@dataclass(frozen=True)
class ReportRow:
    """Figures of one way to choose bits.

    Args:
        bits: its name, as in `--bits`.
        checkpoint: file of the detector.
        choices: names of the K choices of the detector.
        report: figures on the test split.
        finetuned: epochs that the detector was trained for after pretraining.
        diagnosis: of a policy, else None.
        search: last rewards, qualities and multiplier of the policy's search, by their names in TensorBoard.
    """

    bits: str
    checkpoint: Path
    choices: tuple[str, ...]
    report: EvalReport
    finetuned: int = 0
    diagnosis: Diagnosis | None = None
    search: dict[str, float] | None = None

    def plain(self) -> dict[str, Any]:
        """Plain values for report.json."""
        figures = {key: getattr(self.report, key) for key in ROW_KEYS}
        detector = {"finetuned": self.finetuned, "checkpoint": str(self.checkpoint)}
        plain = {"bits": self.bits, **figures, "ap_11pt": self.report.ap_11pt, **detector}
        if self.diagnosis is None:
            return plain
        modal = [self.choices[choice] for choice in self.diagnosis.modal]
        found = {**self.diagnosis.plain(), "modal_configuration": modal, "search": self.search}
        return {**plain, "diagnostics": found}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal, from rows of report.json."""
    quality = f"{'mAP 11pt':>9}{'mAP all':>9}{'COCO AP':>9}"
    lines = [f"{'bits':<14}{quality}{'GBitOps':>10}{'policy':>9}{'total':>10}{'configs':>9}{'finetuned':>11}"]
    for row in rows:
        quality = "".join(f"{100 * row[key]:>9.2f}" for key in ROW_KEYS[:3])
        cost = f"{row['gbitops_detector']:>10.4f}{row['gbitops_policy']:>9.4f}{row['gbitops_total']:>10.4f}"
        lines.append(f"{row['bits']:<14}{quality}{cost}{row['distinct_configs']:>9d}{row['finetuned']:>11d}")
    return "\n".join(lines)


def matches_file(bits: str) -> str:
    """Name of the file with the matched detections of one row, such as `matches_uniform_w3a3.npz`."""
    return f"matches_{bits.replace(':', '_')}.npz"


def format_classes(row: dict[str, Any]) -> str:
    """AP of each class that has objects, lowest first, for the terminal; `row` is of report.json."""
    known = sorted((ap, name) for name, ap in row["ap_11pt"].items() if ap is not None and not math.isnan(ap))
    text = ", ".join(f"{name} {100 * ap:.1f}" for ap, name in known)
    return textwrap.fill(f"AP of {row['bits']}, 11 points, %: {text}", LINE)


def write_report(
    folder: Path, rows: Sequence[ReportRow], annotations: Sequence[Annotation], config: dict[str, Any]
) -> None:
    """Writes report.json, per_image.csv, pareto.png, and for each row its matched detections and COCO files.

    Args:
        folder: to write to; made if it is missing.
        rows: of the same images.
        annotations: of these images, in the order of the data set.
        config: as plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = [row.plain() for row in rows]
    for row, values, found in zip(rows, plain, intervals(rows, config["seed"]), strict=True):
        values |= found
        save_matches(folder / matches_file(row.bits), row.report.matched)
        write_detections(folder, row.bits, row.report.records, annotations, config["detector"]["image_size"])
    class_names, image_size = list(rows[0].report.ap_11pt), config["detector"]["image_size"]
    write_ground_truth(folder, rows[0].report.records, annotations, class_names, image_size)
    if (efficacy := routing_efficacy(rows)) is not None:
        next(values for values in plain if values["bits"] == POLICY)["routing_efficacy"] = efficacy
    content = {"rows": plain, "config": config, "versions": versions(), "seed": config["seed"]}
    write_text(folder / REPORT_FILE, json.dumps(_finite(content), indent=1) + "\n")
    _write_per_image(folder / "per_image.csv", rows)
    plot_pareto(folder / "pareto.png", plain)


def intervals(rows: Sequence[ReportRow], seed: int) -> list[dict[str, Any]]:
    """For each row, 95 % intervals of its mAP, and of the policy's mAP minus its own where there is a policy.

    `map_11pt_interval` is [low, high], `policy_minus_this` [difference, low, high]; see `instaqnas.metrics.bootstrap`.
    """
    counts = resampled(rows[0].report.images, seed)
    maps = {row.bits: row.report.map_11pt for row in rows}
    replicates = {row.bits: row.report.matched.map_11pt(counts) for row in rows}
    found = []
    for row in rows:
        values = {"map_11pt_interval": list(interval_of(maps[row.bits], replicates[row.bits]))[1:]}
        if POLICY in maps and row.bits != POLICY:
            difference = interval_of(maps[POLICY] - maps[row.bits], replicates[POLICY] - replicates[row.bits])
            values["policy_minus_this"] = list(difference)
        found.append(values)
    return found


def routing_efficacy(rows: Sequence[ReportRow]) -> float | None:
    """(policy - shuffled) / (most expensive - shuffled) in mAP (11 points), all on the policy's detector.

    `shuffled` has the policy's mean cost without looking at the images. 0: looking brings nothing; 1: as good as every
    image at the most expensive choice. None without these rows, or if more bits are no better than chance.
    """
    by_name = {row.bits: row for row in rows}
    if POLICY not in by_name or SHUFFLED not in by_name:
        return None
    same = [row for row in rows if row.checkpoint == by_name[POLICY].checkpoint and row.bits.startswith(UNIFORM)]
    if not same:
        return None
    chance, best = by_name[SHUFFLED].report.map_11pt, max(same, key=lambda row: row.report.gbitops_detector)
    room = best.report.map_11pt - chance
    return (by_name[POLICY].report.map_11pt - chance) / room if room > 0 else None


def _write_per_image(path: Path, rows: Sequence[ReportRow]) -> None:
    positions = max(len(row.report.per_image[0].choices) for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["bits", "image_id", "objects", "smallest_side", "difficulty", "detections", "quality", "gbitops"]
    writer.writerow([*header, *(f"position_{position:02d}" for position in range(positions))])
    for row in rows:
        for image in row.report.per_image:
            hard = [image.objects, _known(image.smallest_side, 2), _known(image.difficulty, 4)]
            figures = [*hard, image.detections, f"{image.quality:.4f}", f"{image.gbitops:.6f}"]
            chosen = [row.choices[choice] for choice in image.choices]
            # The full-precision network has fewer positions if the policy controls more than the pointwise layers.
            writer.writerow([row.bits, image.image_id, *figures, *chosen, *[""] * (positions - len(chosen))])
    write_text(path, text.getvalue())


def _known(value: float, decimals: int) -> str:
    """`value` as text; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.{decimals}f}"


def _finite(value: Any) -> Any:
    """`value` with None in place of NaN, such as the AP of a class without objects: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_pareto(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plots mAP (11 points) against total GBitOps.

    Args:
        path: picture to write.
        rows: of report.json. Rows of several runs have a `label` for the legend, and the number of their `run` from 0.

    Colours stand for ways to choose bits, markers for runs. Full precision is a dashed line: its cost is far off.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    others = dict.fromkeys(row["bits"] for row in rows if row["bits"] not in COLOURS)
    colours = COLOURS | dict(zip(others, cycle(UNIFORM_COLOURS)))
    for row in rows:
        label, colour, run = row.get("label", row["bits"]), colours[row["bits"]], row.get("run", 0)
        if row["bits"] == FP32:
            axes.axhline(
                100 * row["map_11pt"],
                color=colour,
                linestyle=RUN_LINES[run % len(RUN_LINES)],
                label=f"{label}, {row['gbitops_total']:.3g} GBitOps",
            )
            continue
        marker = RUN_MARKERS[run % len(RUN_MARKERS)]
        axes.plot(row["gbitops_total"], 100 * row["map_11pt"], marker, markersize=9, label=label, color=colour)
    axes.set(xlabel="GBitOps per image, policy included", ylabel="mAP at IoU 0.5, 11 points (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
