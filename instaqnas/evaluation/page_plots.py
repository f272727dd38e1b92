"""Plots of the report page, each returned as SVG text to be put into HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from instaqnas.bits import FP32
from instaqnas.evaluation.report import COLOURS, UNIFORM_COLOURS
from instaqnas.metrics.bootstrap import MatchedSplit
from instaqnas.metrics.voc import precision_recall

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CONFIGURATIONS = 12  # bars of the histogram
GROUPS = 5  # of images by difficulty


def row_colours(names: Sequence[str]) -> dict[str, str]:
    """Matplotlib's colour of each way to choose bits, the same in all plots."""
    others = dict.fromkeys(name for name in names if name not in COLOURS)
    return COLOURS | dict(zip(others, cycle(UNIFORM_COLOURS)))


def plot_training(stage: str, epochs: Sequence[Mapping[str, Any]]) -> str:
    """Losses, and val mAP in percent, over the epochs of one stage.

    Args:
        stage: title.
        epochs: lines of metrics.jsonl.
    """
    figure, (left, right) = _figure(2, 1)
    for key in sorted({key for line in epochs for key in line if key.startswith("train/loss")}):
        points = [(line["epoch"], line[key]) for line in epochs if line.get(key) is not None]
        left.plot(*zip(*points, strict=True), marker=".", label=key.removeprefix("train/"))
    left.set(title=f"{stage}: losses", xlabel="epoch", ylim=(0, None))
    left.legend(fontsize="small")
    points = [(line["epoch"], 100 * line["eval/map"]) for line in epochs if line.get("eval/map") is not None]
    if points:
        right.plot(*zip(*points, strict=True), marker="o", color="C3")
    else:
        right.text(0.5, 0.5, "no validation", ha="center", transform=right.transAxes)
    right.set(title=f"{stage}: val mAP (%)", xlabel="epoch", ylim=(0, 100))
    return _svg(figure)


def plot_choices(stage: str, epochs: Sequence[Mapping[str, Any]]) -> str | None:
    """Mean index of the choice at each position over the epochs of a stage; None if there was nothing to choose.

    Args:
        stage: title.
        epochs: lines of metrics.jsonl.
    """
    counts = [np.array(line["choices"], dtype=float) for line in epochs if "choices" in line]
    if not counts:
        return None
    choices = counts[0].shape[1]
    means = np.stack([part @ np.arange(choices) / np.maximum(part.sum(1), 1) for part in counts], axis=1)  # [L, E]
    figure, (axes,) = _figure(1, 1, height=1.4 + 0.12 * len(means))
    axes.grid(visible=False)
    shown = axes.imshow(means, aspect="auto", vmin=0, vmax=choices - 1, extent=(0.5, len(counts) + 0.5, len(means), 0))
    figure.colorbar(shown, label=f"mean choice, 0 to {choices - 1}")
    axes.set(title=f"{stage}: bits", xlabel="epoch", ylabel="position")
    return _svg(figure)


def plot_cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """mAP in percent with 95 % intervals against GBitOps; rows are those of report.json.

    Full precision is a dashed line: its cost is far off.
    """
    figure, (axes,) = _figure(1, 1)
    colours = row_colours([row["bits"] for row in rows])
    for row in rows:
        if row["map_11pt"] is None:
            continue
        value, label = 100 * row["map_11pt"], row.get("label", row["bits"])
        if row["bits"] == FP32:
            axes.axhline(
                value, color=colours[FP32], linestyle="--", label=f"{label}, {row['gbitops_total']:.3g} GBitOps"
            )
            continue
        low, high = (value if end is None else 100 * end for end in row.get("map_11pt_interval", (None, None)))
        ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(
            row["gbitops_total"], value, yerr=ends, fmt="o", capsize=3, label=label, color=colours[row["bits"]]
        )
    axes.set(xlabel="GBitOps per image, policy included", ylabel="mAP at IoU 0.5, 11 points (%)")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def plot_precision_recall(split: MatchedSplit, class_names: Sequence[str]) -> str:
    """Precision against recall of each class at IoU 0.5."""
    figure, (axes,) = _figure(1, 1)
    found = split.detections
    for label, name in enumerate(class_names, start=1):
        positives = int(split.positives[:, label - 1].sum())
        own = found.labels == label
        if not positives or not own.any():
            continue
        precision, recall = precision_recall(found.scores[own], found.true_positive[own], found.ignored[own], positives)
        axes.plot(*_thinned(recall.numpy(), precision.numpy()), label=name, linewidth=1.2)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    if axes.lines:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(class_names) // 16)
    return _svg(figure)


def plot_configurations(counts: Sequence[tuple[str, int]]) -> str:
    """How many images have each bit configuration; the most frequent ones, from (name, images) in falling order."""
    shown = list(counts[:MOST_CONFIGURATIONS])
    figure, (axes,) = _figure(1, 1, height=1.2 + 0.22 * len(shown))
    names = [f"{place}. {_shortened(name)}" for place, (name, _) in enumerate(shown, start=1)]
    axes.barh(names, [count for _, count in shown], color="C3")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    further = len(counts) - len(shown)
    axes.set(xlabel="images" + (f" ({further} further configurations not shown)" if further else ""))
    return _svg(figure)


def plot_cost_of_images(gbitops: Sequence[float], values: Sequence[float], name: str) -> str | None:
    """Mean GBitOps of the images in groups of one value, such as the number of objects; None if all are alike.

    Args:
        gbitops: of each image.
        values: of each image; NaN where it is not known. More than ten different ones are put into equal groups.
        name: of the value, for the axis.
    """
    known = [(value, cost) for value, cost in zip(values, gbitops, strict=True) if not math.isnan(value)]
    different = sorted({value for value, _ in known})
    if len(different) < 2:
        return None
    if len(different) <= 10:
        groups = [(f"{value:g}", [cost for other, cost in known if other == value]) for value in different]
    else:
        parts = [part for part in np.array_split(np.array(sorted(known)), GROUPS) if len(part)]
        groups = [(f"{part[0, 0]:.3g} to {part[-1, 0]:.3g}", part[:, 1].tolist()) for part in parts]
    figure, (axes,) = _figure(1, 1)
    names = [label for label, _ in groups]
    means = [float(np.mean(costs)) for _, costs in groups]
    axes.bar(names, means, color="C3")
    for place, (_, costs) in enumerate(groups):
        axes.annotate(f"{len(costs)}", (place, means[place]), ha="center", va="bottom", fontsize="small")
    axes.set(xlabel=f"{name} (above the bars: images)", ylabel="mean GBitOps of the detector")
    return _svg(figure)


def _figure(columns: int, rows: int, height: float = 3.0) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for one in axes:
        one.grid(alpha=0.3)
        one.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an SVG element; its text stays text, and equal figures have equal SVG."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "instaqnas"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)


def _thinned(x: np.ndarray, y: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the points of a curve, its ends included."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(points, len(x))).round().astype(int))
    return x[kept], y[kept]


def _shortened(name: str, longest: int = 60) -> str:
    return name if len(name) <= longest else f"{name[: longest - 3]}..."
