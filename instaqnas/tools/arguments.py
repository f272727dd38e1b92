"""Command line options shared by the tools that run the networks of a trained run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from instaqnas.bits import POLICY
from instaqnas.config.command import Command, parse_command
from instaqnas.errors import InputError
from instaqnas.experiment.parts import Experiment


def run_parser(
    tool: str, description: str, example: str, *, init: str | None = "the run's latest stage"
) -> argparse.ArgumentParser:
    """A parser with the options --config, --run and --init.

    Args:
        tool: name of the module in `instaqnas.tools`.
        description: help text.
        example: an overridden setting, shown in the help text.
        init: the checkpoint that is used without --init, for the help text; None for a parser without --init.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m instaqnas.tools.{tool}",
        description=description,
        epilog=f"Settings of the config can be overridden, for example {example}.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    if init is not None:
        parser.add_argument("--init", metavar="CHECKPOINT", help=f"checkpoint to use instead of {init}")
    return parser


def add_split(parser: argparse.ArgumentParser) -> None:
    """Adds the option --split, which `split_to_measure` reads."""
    parser.add_argument("--split", help="split to measure on (default: val, or train if there is no val split)")


def split_to_measure(options: argparse.Namespace, experiment: Experiment) -> str:
    """The split of --split, or the tuning split without it.

    Prints a note to stderr for the test split, on which nothing may be tuned, and for the train split.
    """
    data = experiment.config.data
    split = options.split or experiment.tuning_split
    if split == data.test_split:
        sys.stderr.write(f"note: do not use the {split} split both to pick choices or targets and to evaluate them\n")
    if split == data.train_split:
        sys.stderr.write(f"note: the network was trained on the {split} split; mAP is higher than on unseen images\n")
    return split


def refuse(overrides: Sequence[str], *options: str) -> None:
    """Raises InputError if one of `options` of the stage scripts is among the `overrides` of a tool without it."""
    for word in overrides:
        option = word.partition("=")[0]
        if option in options:
            raise InputError(f"{option}: this tool has no such option")


def run_command(options: argparse.Namespace, overrides: Sequence[str]) -> Command:
    """The command of the options --config, --run and --init, with the settings in `overrides`.

    Raises: InputError as `parse_command`, and for `--bits` other than `policy`.
    """
    words: list[str] = []
    for name in ("config", "run", "init"):
        value = getattr(options, name, None)  # a parser may lack --init
        if value:
            words += [f"--{name}", value]
    command = parse_command("eval", [*words, *overrides])
    if command.bits != POLICY:
        raise InputError(f"--bits {command.bits}: here the policy chooses the bits; eval.py compares other ways")
    return command
