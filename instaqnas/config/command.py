"""The command line of the four entry scripts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from instaqnas.bits import (
    FP32,
    FREQUENCIES,
    MODAL,
    POLICY,
    RANDOM,
    SHUFFLED,
    STATIC,
    Script,
    uniform_name,
)
from instaqnas.config.reading import SettingParser, did_you_mean, in_home, read_yaml
from instaqnas.config.settings import Config
from instaqnas.errors import InputError

_STAGES: dict[Script, str] = {
    "pretrain": "Trains the detector in full precision, then quantized under random bit configurations.",
    "search": "Trains the policy, and the detector under the configurations sampled from it.",
    "finetune": "Trains the detector under the frozen, greedy policy, or under one fixed bit configuration.",
    "eval": "Reports detection quality and cost on the test split.",
}
_INIT_TEXT: dict[Script, str] = {
    "pretrain": "skip the full-precision training and quantize the detector of this checkpoint",
    "search": "start from this checkpoint, not from the pretrained one of the run",
    "finetune": "start from this checkpoint, not from the searched one of the run (fixed --bits: the pretrained one)",
    "eval": "evaluate this checkpoint, not the one of the run's latest stage",
}
BASIC_ROWS, ALL_ROWS = "basic", "all"  # tables of eval.py: without and with the baselines of the policy
SEVERAL_BITS = (BASIC_ROWS, ALL_ROWS)
_BITS: dict[Script, tuple[str, ...]] = {  # ways to choose bits in a stage, in addition to `uniform:w3a4` and so on
    "finetune": (POLICY, STATIC, MODAL),
    "eval": (POLICY, FP32, RANDOM, SHUFFLED, FREQUENCIES, MODAL, STATIC, *SEVERAL_BITS),
}


def known_bits(stage: Script, names: Sequence[str]) -> list[str]:
    """Returns the values of `--bits` in finetune or eval; each of the choices adds one, such as `uniform:w3a4`."""
    return [*_BITS[stage], *(uniform_name(name) for name in names)]


@dataclass(frozen=True)
class Command:
    """The command of an entry script.

    Args:
        config: every setting of the experiment.
        run: folder that all stages of one experiment write to.
        init: checkpoint to start from; None takes the checkpoint of the previous stage.
        restart: start the stage over instead of continuing it; its earlier folder is kept as FOLDER.old-1.
        bits: how bits are chosen, one of `known_bits`; an option of finetune.py and eval.py only.
        budget: mean GBitOps, policy included, that the policy is shifted to; None leaves it as trained. An option of
            eval.py only.
    """

    config: Config
    run: Path
    init: Path | None = None
    restart: bool = False
    bits: str = POLICY
    budget: float | None = None


def parse_command(stage: Script, argv: list[str] | None = None) -> Command:
    """Returns the command for `stage` (pretrain, search, finetune or eval) from `argv` (default: the process's own).

    Settings come from the YAML file, then from options such as `--search.epochs 3`; `--help` prints them and exits.

    Raises:
        InputError: a file that is missing or not valid YAML, an unknown key or option, a value of the wrong type or
            outside its range. The message is one line and names the file, key or option.
    """
    settings = SettingParser()
    options, overrides = _stage_parser(stage, settings).parse_known_args(argv)
    _check_options(overrides, [*settings.settings, *vars(options)])
    if options.config is None:
        raise InputError(f"--config FILE is missing, such as: python {stage}.py --config configs/shapes.yaml")
    content = read_yaml(options.config)
    try:
        values = settings.read(content)
    except InputError as error:
        raise InputError(f"{options.config}: {error}") from None
    config = settings.build(settings.parse_args(overrides, namespace=values))
    if options.init is not None and not options.init.is_file():
        raise InputError(f"--init {options.init}: no such file")
    if stage in _BITS:
        known = known_bits(stage, config.bits.names)
        if options.bits not in known:
            raise InputError(f"--bits: expected one of {', '.join(known)}, got {options.bits}")
    return Command(
        config=config,
        run=options.run or Path("runs") / options.config.stem,
        init=options.init,
        restart=getattr(options, "restart", False),  # eval has no such option
        bits=getattr(options, "bits", POLICY),  # nor do pretrain and search have this one
        budget=getattr(options, "budget", None),
    )


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are an `InputError`, shown without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _stage_parser(stage: Script, settings: SettingParser) -> argparse.ArgumentParser:
    """Returns the parser of the options that are not settings.

    It is apart from `settings` because jsonargparse cannot have both `--bits` and `--bits.choices`.
    """
    parser = OneLineParser(
        prog=f"{stage}.py",
        usage=f"python {stage}.py --config FILE [options] [--SECTION.SETTING VALUE ...]",
        description=_STAGES[stage],
        epilog="Settings, which override the YAML file:\n\n" + settings.format_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=_path, metavar="FILE", help="YAML file of the experiment (required)")
    parser.add_argument("--run", type=_path, metavar="FOLDER", help="folder to write to (default: runs/<name of FILE>)")
    parser.add_argument("--init", type=_path, metavar="CHECKPOINT", help=_INIT_TEXT[stage])
    if stage in _BITS:
        parser.add_argument(
            "--bits",
            default=POLICY,
            help=f"how bits are chosen: {', '.join(_BITS[stage])} or uniform:w3a4 (any of bits.choices); default: "
            f"{POLICY}. Not to be confused with the settings --bits.choices and so on",
        )
    if stage == "eval":
        parser.add_argument(
            "--budget",
            type=float,
            metavar="GBITOPS",
            help="shift the policy to this mean cost, by its table of prices from the val split",
        )
    else:
        parser.add_argument(
            "--restart",
            action="store_true",
            help="start the stage over; its earlier folder is kept as <folder>.old-1",
        )
    return parser


def _path(text: str) -> Path:
    return Path(in_home(text))


def _check_options(words: list[str], known: list[str]) -> None:
    options = {f"--{name}" for name in known}
    for word in words:
        option = word.partition("=")[0].removesuffix("+")  # `--data.roots+ x` appends to a list
        if option.startswith("--") and option not in options:
            hint = did_you_mean(option, options) or " --help lists all"
            raise InputError(f"unknown option {option};{hint}")
