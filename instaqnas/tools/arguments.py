"""The command line that tools on the networks of a trained run have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from instaqnas.config import Command, parse_command
from instaqnas.errors import InputError


def run_parser(tool: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser with --config, --run and --init; `example` is a setting that may be overridden beside them."""
    parser = argparse.ArgumentParser(
        prog=f"python -m instaqnas.tools.{tool}",
        description=description,
        epilog=f"Settings can be overridden, such as {example}.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--run", metavar="FOLDER", help="folder of the run (default: runs/<name of FILE>)")
    parser.add_argument("--init", metavar="CHECKPOINT", help="take this checkpoint instead of the run's latest stage")
    return parser


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
        word for name in ("config", "run", "init") if (value := getattr(options, name)) for word in (f"--{name}", value)
    ]
    command = parse_command("eval", [*named, *overrides])
    if command.bits != "policy":
        raise InputError(f"--bits {command.bits}: here the policy chooses the bits; eval.py compares other ways")
    return command
