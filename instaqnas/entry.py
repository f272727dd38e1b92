"""The main function of the four entry scripts."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from instaqnas.bits import Script
from instaqnas.config.command import parse_command
from instaqnas.errors import InputError, Interrupted, exit_on_input_error


def _write_page(run: Path) -> None:
    """Writes the report page; a run whose older files it cannot read keeps its result without one."""
    from instaqnas.evaluation.page import write_page

    try:
        logging.getLogger(__name__).info("report: %s", write_page(run))
    except InputError as error:
        logging.getLogger(__name__).warning("warning: no report page: %s", error)


def main(stage: Script) -> None:
    """Runs a stage (pretrain, search, finetune or eval) as the command line of this process says.

    Wrong input and an interruption by Ctrl-C end the process with one line on standard error. Exit status: see
    `exit_on_input_error`; 130 after an interruption by Ctrl-C, 143 by SIGTERM.
    """
    try:
        with exit_on_input_error():
            command = parse_command(stage)
            # Imported after parsing: torch takes seconds, and `--help` and configuration errors should not.
            from instaqnas import distributed
            from instaqnas.training.stages import run_eval, run_finetune, run_pretrain, run_search

            run = {"pretrain": run_pretrain, "search": run_search, "finetune": run_finetune, "eval": run_eval}
            run[stage](command)
            if distributed.is_writer():
                _write_page(command.run)
            distributed.leave()
    except (KeyboardInterrupt, Interrupted) as error:
        if stage == "eval":
            advice = "nothing is lost, the same command evaluates again"
        else:
            advice = "the same command (without --restart) continues from the last checkpoint"
        sys.stderr.write(f"interrupted; {advice}\n")
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))
