"""Draws and prints mAP and cost of one or several runs: `python -m instaqnas.tools.plot REPORT.json... --out FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.report import plot_pareto
from instaqnas.experiment.stage import EVAL

FORMATS = (".png", ".pdf", ".svg")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a report.json for the plot: `bits`, `map_11pt` (0 to 1) and `gbitops_total`.

    Raises: InputError if the file cannot be read, is not a report, or has no rows.
    """
    try:
        rows = [
            {"bits": row["bits"], **{key: float(row[key]) for key in ("map_11pt", "gbitops_total")}}
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a report.json of eval.py") from error
    if not rows:
        raise InputError(f"{path}: has no rows")
    return rows


def joined_rows(reports: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of all reports; with several, each row also has a `label` with the name of its run and the `run` number."""
    if len(reports) == 1:
        return read_rows(reports[0])
    numbers: dict[str, int] = {}
    rows = []
    for path in reports:
        name = run_name(path)
        number = numbers.setdefault(name, len(numbers))
        rows += [{**row, "label": f"{name}: {row['bits']}", "run": number} for row in read_rows(path)]
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the rows, mAP in per cent."""
    labels = [row.get("label", row["bits"]) for row in rows]
    width = max(map(len, labels)) + 2
    lines = [f"{'':<{width}}{'mAP 11pt':>9}{'GBitOps':>10}"]
    for label, row in zip(labels, rows, strict=True):
        lines.append(f"{label:<{width}}{100 * row['map_11pt']:>9.2f}{row['gbitops_total']:>10.4f}")
    return "\n".join(lines)


def run_name(report: Path) -> str:
    """`A` for A/eval/report.json and A/eval/uniform_w3a4/report.json; elsewhere the name of the file's folder."""
    folder = report.resolve().parent
    above = [parent for parent in (folder, folder.parent) if parent.name == EVAL.name]
    return above[0].parent.name if above else folder.name


def main(arguments: list[str] | None = None) -> None:
    """Writes the plot and prints its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.plot",
        description="Draw mAP against GBitOps from the reports that eval.py wrote.",
    )
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="runs/NAME/eval/report.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"image to write: {', '.join(FORMATS)}")
    options = parser.parse_args(arguments)

    with exit_on_input_error():
        if options.out.suffix.lower() not in FORMATS:
            raise InputError(f"--out {options.out}: expected a name ending in {', '.join(FORMATS)}")
        rows = joined_rows(options.reports)
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            plot_pareto(options.out, rows)
        except OSError as error:
            raise InputError(f"{options.out}: cannot be written: {error.strerror}") from error
        print(format_rows(rows))
        print(options.out)


if __name__ == "__main__":
    main()
