"""Makes the report page of a run again, from the files of its folder.

    python -m instaqnas.tools.report runs/shapes

Stages and `eval.py` write it by themselves: RUN/report.html, one file that needs no network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from instaqnas.errors import exit_on_input_error
from instaqnas.evaluation.page import write_page


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line tool."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.report", description="Make RUN/report.html again.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        print(write_page(options.run))


if __name__ == "__main__":
    main()
