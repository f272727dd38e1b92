"""The command line that tools on the networks of a trained run have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from instaqnas.config.command import Command, parse_command
from instaqnas.errors import InputError
from instaqnas.experiment.parts import Experiment


def run_parser(
    tool: str, description: str, example: str, *, init: str | None = "the run's latest stage"
) -> argparse.ArgumentParser:
    """A parser with --config, --run and --init; `example` is a setting that may be overridden beside them.

    `init` names the checkpoint that --init replaces; None leaves that option out.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m instaqnas.tools.{tool}",
        description=description,
        epilog=f"Settings can be overridden, such as {example}.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    if init is not None:
        parser.add_argument("--init", metavar="CHECKPOINT", help=f"take this checkpoint instead of {init}")
    return parser


def add_split(parser: argparse.ArgumentParser) -> None:
    """The option --split, which `split_to_measure` reads."""
    parser.add_argument("--split", help="images to measure on (default: the val split, the train split without one)")


def split_to_measure(options: argparse.Namespace, experiment: Experiment) -> str:
    """That of --split, else the one that choices are to be made on; a note tells what its figures are no good for."""
    data, split = experiment.config.data, options.split or experiment.tuning_split
    if split == data.test_split:
        sys.stderr.write(f"note: choices and targets that the {split} split has picked are not to be judged on it\n")
    if split == data.train_split:
        sys.stderr.write(f"note: training has seen the {split} split; mAP is higher there than on others\n")
    return split


def refuse(overrides: Sequence[str], *options: str) -> None:
    """Raises InputError for options of the stage scripts that a tool has no use for."""
    for word in overrides:
        option = word.partition("=")[0]
        if option in options:
            raise InputError(f"{option}: this tool has no such option")


def run_command(options: argparse.Namespace, overrides: Sequence[str]) -> Command:
    """The command that `config`, `run` and `init` of `options` and the settings in `overrides` amount to.

    Raises: InputError as `parse_command`, and for bits that are not the policy's.
    """
    named = [
        word
        for name in ("config", "run", "init")
        if (value := getattr(options, name, None))
        for word in (f"--{name}", value)
    ]
    command = parse_command("eval", [*named, *overrides])
    if command.bits != "policy":
        raise InputError(f"--bits {command.bits}: here the policy chooses the bits; eval.py compares other ways")
    return command
