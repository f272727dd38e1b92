"""The checkpoints that stages hand to each other: found by stage, opened once, handed on as `Checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.command import Command
from instaqnas.config.reading import completed, differences
from instaqnas.config.settings import Config, QuantTrainConfig
from instaqnas.errors import InputError
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import (
    FINETUNE,
    POLICY_KINDS,
    PRETRAIN_FP32,
    PRETRAIN_QUANT,
    SEARCH,
    Stage,
    further_epochs,
    stage_named,
)
from instaqnas.files import file_digest
from instaqnas.policy.budget import PricePoint
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.bitops import CostTable

LAST_FILE, BEST_FILE = "last.pt", "best.pt"  # checkpoints in the folder of a stage


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Args:
        path: the file it was read from.
        state: its content.
    """

    path: Path
    state: dict[str, Any]

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """Reads a file that a stage wrote.

        Raises: InputError if the file is missing, damaged or not a checkpoint of a stage.
        """
        state = load_checkpoint(path)
        try:
            stage_named(state["stage"])
        except KeyError:
            raise InputError(f"{path}: not a checkpoint of a training stage, but of {state['stage']}") from None
        return Checkpoint(path, state)

    @property
    def stage(self) -> Stage:
        """The stage that wrote it."""
        return stage_named(self.state["stage"])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.path)

    @property
    def prices(self) -> list[PricePoint]:
        """Prices of its policy for other budgets; empty before the end of a search."""
        return [PricePoint(*point) for point in self.state.get("prices", [])]

    @property
    def further_epochs(self) -> int:
        """Epochs that its detector was trained for after pretraining."""
        return further_epochs(self.stage, self.state["config"], self.state["epoch"])

    def load(self, experiment: Experiment, network: nn.Module, name: str, kinds: tuple[str, ...]) -> None:
        """Loads the weights of one network.

        Args:
            experiment: must agree with the checkpoint in the settings that networks are built from, and in classes.
            network: takes the weights.
            name: `detector` or `policy`.
            kinds: stages whose checkpoints are accepted.

        Raises: InputError if the checkpoint is of another stage, or was trained with other settings or classes.
        """
        stage = self.stage
        if stage.kind not in kinds:
            raise InputError(f"{self.path}: a checkpoint of stage {stage.name}; needed here: {' or '.join(kinds)}")
        try:
            sections = {*stage.networks, name}  # a pretraining may have a policy in addition
            was = {**completed(self.state["config"], sections), "classes": self.state["classes"]}
            now = {section: experiment.plain[section] for section in sections}
            changed = differences(was, {**now, "classes": list(experiment.class_names)})
            if changed:
                raise InputError(f"trained with other settings: {'; '.join(changed)}")
            network.load_state_dict(self.state["networks"][name])
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            first_line = str(error).splitlines()[0]
            raise InputError(f"{self.path}: of another version of this program ({first_line})") from error

    def shift_to_budget(self, policy: PolicyNet, costs: CostTable, gbitops: float) -> None:
        """Shifts the logits of its policy to another mean cost, by the prices in the checkpoint.

        Args:
            policy: with the weights of this checkpoint.
            costs: of its detector.
            gbitops: the mean cost, policy included.

        Raises: InputError if the checkpoint has no prices, or the cost is outside them.
        """
        try:
            policy.shift_to_budget(self.prices, costs, gbitops)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def check_held_out(self, experiment: Experiment) -> None:
        """Raises InputError if its detector may have been trained on images that `data.policy_share` holds out here."""
        if not experiment.config.data.policy_share:
            return
        try:
            old = completed(self.state["config"], ("seed", "data"))
            was = _held_out(old, {"annotations": self.state["images"]["annotations"]})
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{self.path}: of another version of this program ({error})") from error
        now = _held_out(experiment.plain, {"annotations": experiment.train_images()["annotations"]})
        if changed := differences(was, now):
            raise InputError(
                f"{self.path}: may have been trained on images that are held out here ({'; '.join(changed)})"
            )

    def check_search(self, config: Config) -> None:
        """Raises InputError if the search behind it trained the detector and `config` does not, or the reverse.

        Baselines are trained as long as the adaptive detector, so both must be known to agree.
        """
        searched = self.state.get("config", {}).get(SEARCH.section, {}).get("train_detector", True)
        if searched != config.search.train_detector:
            raise InputError(
                f"search.train_detector: {str(searched).lower()} in the search of {self.path}, here "
                f"{str(config.search.train_detector).lower()}; give it as it was"
            )


def _held_out(plain: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """All that decides which training images a detector does not see."""
    share = {"train_split": plain["data"]["train_split"], "policy_share": plain["data"]["policy_share"]}
    return {"seed": plain["seed"], "data": share, "images": images}


def best_checkpoint(run: Path, stage: Stage) -> Path:
    """Path of the checkpoint that later stages start from: the best on the val split if there is one, else the last.

    A search writes no best checkpoint: the highest mAP would belong to an early policy that has not met its budget.
    """
    best = run / stage.name / BEST_FILE
    return best if best.exists() else run / stage.name / LAST_FILE


def finished_checkpoint(run: Path, stage: Stage, config: Config, command: str = "") -> Checkpoint:
    """The checkpoint of a stage that has run to its end.

    Args:
        run: folder of the run.
        stage: a training stage.
        config: its section says how many epochs the stage has.
        command: runs the stage, for messages; empty takes the script of the stage.

    Raises: InputError if the stage has not begun or not ended.
    """
    path, script = best_checkpoint(run, stage), command or stage.script
    folder = run / stage.name
    if not path.exists():
        raise InputError(f"{folder}: no checkpoint; run {script} first, or name a checkpoint with --init")
    checkpoint = Checkpoint.read(path)
    last = folder / LAST_FILE
    epoch = checkpoint.state["epoch"] if path == last else load_checkpoint(last)["epoch"]
    epochs = stage.settings(config).epochs
    if epoch < epochs:
        raise InputError(
            f"{folder}: at epoch {epoch} of {epochs}; repeat {script} to finish it, or give the options "
            f"here that it was trained with"
        )
    return checkpoint


def teacher_checkpoint(command: Command, section: str, settings: QuantTrainConfig) -> Checkpoint | None:
    """The run's full-precision checkpoint if a stage distills from it, else None.

    Args:
        command: names the run.
        section: of the stage, for messages.
        settings: of the stage.

    Raises: InputError if the stage distills and the full-precision training is missing or unfinished.
    """
    if not settings.distill_weight:
        return None
    path = best_checkpoint(command.run, PRETRAIN_FP32)
    if not path.exists():
        raise InputError(f"{section}.distill_weight: needs the run's full-precision network, but {path} is missing")
    return finished_checkpoint(command.run, PRETRAIN_FP32, command.config)


def pretrained_checkpoint(command: Command) -> Checkpoint:
    """The checkpoint of the quantized pretraining.

    Raises: InputError as `finished_checkpoint`.
    """
    return finished_checkpoint(command.run, PRETRAIN_QUANT, command.config)


def has_policy(run: Path) -> bool:
    """Whether a run has a checkpoint with a policy."""
    return any(best_checkpoint(run, stage_named(kind)).exists() for kind in POLICY_KINDS)


def latest_policy_path(run: Path) -> Path:
    """Path of the checkpoint of a run's finetuning, or of its search if finetuning has not begun.

    Raises: InputError if the run has neither.
    """
    for stage in (FINETUNE, SEARCH):
        path = best_checkpoint(run, stage)
        if path.exists():
            return path
    raise InputError(f"{run}: no checkpoint with a policy; run {SEARCH.script} first")


def latest_policy_checkpoint(command: Command) -> Checkpoint:
    """The checkpoint of the finetuning, or of the search if finetuning has not begun.

    Raises: InputError as `finished_checkpoint`.
    """
    stage = FINETUNE if best_checkpoint(command.run, FINETUNE).exists() else SEARCH
    return finished_checkpoint(command.run, stage, command.config)


def initial_checkpoint(command: Command) -> Checkpoint | None:
    """The checkpoint that `--init` names, None without `--init`."""
    return None if command.init is None else Checkpoint.read(command.init)
