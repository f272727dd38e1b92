"""The report page of a run, RUN/report.html: one self-contained file that needs no network.

It is made from the files of the run folder alone, so it can be made again at any time (`instaqnas.tools.report`):

RUN/STAGE/config.yaml, metrics.jsonl    settings, versions and curves
RUN/eval/report.json                    the comparison of `eval.py --bits all` or `basic`
RUN/eval/NAME/report.json               evaluations of one way to choose bits
beside a report.json                    matches_*.npz, per_image.csv, and the COCO files, for curves and pictures
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from instaqnas.bits import POLICY
from instaqnas.errors import InputError
from instaqnas.evaluation.coco_files import GROUND_TRUTH
from instaqnas.evaluation.page_images import picture_groups, shown_images
from instaqnas.evaluation.page_plots import (
    plot_choices,
    plot_configurations,
    plot_cost,
    plot_cost_of_images,
    plot_precision_recall,
    plot_training,
)
from instaqnas.evaluation.report import REPORT_FILE, matches_file
from instaqnas.experiment.stage import EVAL, TRAINING_STAGES
from instaqnas.files import write_text
from instaqnas.metrics.bootstrap import load_matches

PAGE = "report.html"
TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Evaluation:
    """One report.json: its folder, and its content."""

    folder: Path
    content: dict[str, Any]

    @property
    def written(self) -> float:
        """Time of the file, in seconds since 1970."""
        return (self.folder / REPORT_FILE).stat().st_mtime


def write_page(run: Path) -> Path:
    """Writes RUN/report.html and returns its path.

    Raises: InputError if the folder holds neither a stage nor an evaluation.
    """
    stages, evaluations = _stages(run), _evaluations(run / EVAL.name)
    records = [yaml.safe_load(file.read_text()) for file in sorted(run.glob("*/config.yaml"), key=_modified)]
    records += [evaluation.content for evaluation in evaluations]
    if not records:
        raise InputError(f"{run}: neither a stage nor an evaluation of a run")
    rows = [row for evaluation in evaluations for row in _labelled(evaluation)]
    values: dict[str, Any] = {
        "title": f"InstaQNAS: {run.resolve().name}",
        "written": f"Written {time.strftime('%Y-%m-%d %H:%M')}, seed {records[-1]['config']['seed']}.",
        "rows": rows,
        "cost_plot": plot_cost(rows) if rows else "",
        "training_plots": [plot for name, epochs in stages if epochs for plot in _training_plots(name, epochs)],
        "versions": records[-1]["versions"],
        "config": yaml.safe_dump(records[-1]["config"], sort_keys=False),
        "shown": None,
        "groups": [],
    }
    if evaluations:
        values |= _details(evaluations, records[-1]["config"]["reward"]["score_threshold"])
    page = run / PAGE
    write_text(page, _environment().get_template(TEMPLATE).render(values))
    return page


def _training_plots(stage: str, epochs: Sequence[dict[str, Any]]) -> list[str]:
    bits = plot_choices(stage, epochs)
    return [plot_training(stage, epochs)] + ([] if bits is None else [bits])


def _details(evaluations: Sequence[Evaluation], score_threshold: float) -> dict[str, Any]:
    """Curves and pictures of one row: the newest of the policy, or else of any way to choose bits."""
    newest_first = sorted(evaluations, key=lambda evaluation: evaluation.written, reverse=True)
    candidates = [(evaluation, row) for evaluation in newest_first for row in _labelled(evaluation)]
    evaluation, shown = next((pair for pair in candidates if pair[1]["bits"] == POLICY), candidates[0])
    class_names, folder = tuple(shown["ap_11pt"]), evaluation.folder
    with (folder / "per_image.csv").open(newline="") as file:
        images = [row for row in csv.DictReader(file) if row["bits"] == shown["bits"]]
    gbitops = [float(row["gbitops"]) for row in images]
    plots = [
        plot_cost_of_images(gbitops, [float(row[key] or "nan") for row in images], name)
        for key, name in (("objects", "number of objects"), ("difficulty", "difficulty"))
    ]
    details: dict[str, Any] = {
        "shown": shown,
        "curves_plot": plot_precision_recall(load_matches(folder / matches_file(shown["bits"])), class_names),
        "configurations_plot": plot_configurations(_configurations(images)),
        "cost_plots": [plot for plot in plots if plot is not None],
    }
    if (folder / GROUND_TRUTH).exists():
        pictured = shown_images(folder, shown["bits"], score_threshold)
        details["groups"] = picture_groups(pictured, images, class_names)
    return details


def _configurations(images: Sequence[dict[str, str]]) -> list[tuple[str, int]]:
    """Bit configurations and their numbers of images, most frequent first; one name if all positions are alike."""
    counts: Counter[str] = Counter()
    for row in images:
        bits = [value for key, value in row.items() if key.startswith("position_") and value]
        counts[bits[0] if len(set(bits)) == 1 else " ".join(bits)] += 1
    return counts.most_common()


def _stages(run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name and epochs of each stage that has begun: those of a run in their order, then baselines."""
    order = [stage.name for stage in TRAINING_STAGES]
    names = [file.parent.name for file in run.glob("*/metrics.jsonl") if ".old-" not in file.parent.name]
    names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    return [(name, _lines(run / name / "metrics.jsonl")) for name in names]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _evaluations(folder: Path) -> list[Evaluation]:
    """The comparison first, then single evaluations by name; empty before eval.py."""
    files = [*folder.glob(REPORT_FILE), *sorted(folder.glob(f"*/{REPORT_FILE}"))]
    return [Evaluation(file.parent, json.loads(file.read_text())) for file in files]


def _labelled(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Rows with a `label`: the bits in a comparison, the folder's name for a single evaluation."""
    single = evaluation.folder.name != EVAL.name
    return [
        {**row, "label": f"{evaluation.folder.name} (alone)" if single else row["bits"]}
        for row in evaluation.content["rows"]
    ]


def _modified(file: Path) -> float:
    return file.stat().st_mtime


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "difference": _difference}
    return environment


def _percent(value: float | None) -> str:
    return "" if value is None or isinstance(value, jinja2.Undefined) else f"{100 * value:.1f}"


def _interval(value: Any) -> str:
    if isinstance(value, jinja2.Undefined) or None in value:
        return ""
    return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"


def _difference(value: Any) -> str:
    if isinstance(value, jinja2.Undefined) or None in value:
        return ""
    return f"{100 * value[0]:+.1f} [{100 * value[1]:+.1f}, {100 * value[2]:+.1f}]"
