"""The epochs of one stage: continue, train, validate, save."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas.config import TrainConfig
from instaqnas.errors import InputError
from instaqnas.policy.budget import Multiplier
from instaqnas.training import distributed
from instaqnas.training.epoch_sums import EpochSums
from instaqnas.training.evaluate import EvalReport
from instaqnas.training.run_dir import RunDir

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that training changes: what a checkpoint holds.

    `epoch` counts those that are finished, `running` holds by name the passes over the data of the next one as far as
    they have come. Random numbers are not among it: every image derives its own from the seed (`instaqnas.seeds`).
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    scheduler: LRScheduler
    multiplier: Multiplier = Multiplier()
    epoch: int = 0
    best_map: float = -1.0
    metrics: dict[str, float] = field(default_factory=dict)
    running: dict[str, EpochSums] = field(default_factory=dict)

    def sums(self, name: str) -> EpochSums:
        """Those of a pass of the epoch that runs."""
        return self.running.setdefault(name, EpochSums())

    def detector_steps(self, steps_per_epoch: int) -> int:
        """Steps that the detector has been trained, or, in a search that leaves it alone, would have been."""
        return self.epoch * steps_per_epoch + self.running.get("detector", EpochSums()).steps

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scheduler": self.scheduler.state_dict(),
            "multiplier": vars(self.multiplier),
            "epoch": self.epoch,
            "best_map": self.best_map,
            "metrics": self.metrics,
            "running": {name: vars(sums) for name, sums in self.running.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scheduler.load_state_dict(state["scheduler"])
        for name in ("epoch", "best_map", "metrics"):
            setattr(self, name, state[name])
        self.multiplier = Multiplier(**state["multiplier"])
        self.running = {name: EpochSums(**sums) for name, sums in state.get("running", {}).items()}


def fit(
    run_dir: RunDir,
    state: TrainState,
    settings: TrainConfig,
    *,
    steps_per_epoch: int,
    train_epoch: Callable[[int], dict[str, float]],
    prepare_result: Callable[[], None],
    validate: Callable[[], EvalReport] | None,
    keep_best: bool,
    diagnose: Callable[[int], dict[str, float]],
    add_pictures: Callable[[int], None],
) -> None:
    """Trains to the last epoch from the last checkpoint, if there is one.

    Args:
        settings: `epochs`, and after how many of them to validate and to save; the last one has both.
        train_epoch: trains what is left of epoch number 0, 1, ..., updates `state`, and returns what to log.
        prepare_result: called before what may be the stage's result is validated and saved: after the last epoch, and
            where the best counts before every validation.
        validate: evaluates on the val split; None where there is none.
        keep_best: keep the checkpoint with the highest mAP on the val split too.
        diagnose: called, with the step, when it is time to validate, even without a val split; returns what to log.
        add_pictures: logs pictures of detections at a step.
    """
    epochs = settings.epochs
    _continue(run_dir, state, epochs)
    if state.epoch >= epochs:
        return
    run_dir.open_tensorboard(state.detector_steps(steps_per_epoch))
    while state.epoch < epochs:
        scalars, improved = train_epoch(state.epoch), False
        choices = state.sums("detector").choices
        state.epoch += 1
        state.running = {}
        step, due = state.epoch * steps_per_epoch, _is_due(state.epoch, epochs, settings.eval_every)
        if state.epoch == epochs or (due and keep_best and validate is not None):
            prepare_result()
        if due and validate is not None:
            report = validate()
            scalars |= {"eval/map": report.map_11pt, "eval/gbitops_total": report.gbitops_total}
            improved = keep_best and report.map_11pt > state.best_map
            state.best_map = max(state.best_map, report.map_11pt)
        if due:
            scalars |= diagnose(step)
        state.metrics = scalars
        # Before the checkpoint: from there on it would not be logged again.
        run_dir.log_epoch(state.epoch, step, scalars, choices)
        if due:
            add_pictures(step)
        if _is_due(state.epoch, epochs, settings.save_every) or improved:
            run_dir.save(state.state_dict(), best=improved, keep=settings.keep_checkpoints)
    run_dir.close()
    distributed.barrier()  # what comes next reads the checkpoint
    log.info("%s: done, %s", run_dir.stage, ", ".join(f"{name} {value:.4g}" for name, value in state.metrics.items()))


def _continue(run_dir: RunDir, state: TrainState, epochs: int) -> None:
    """Loads the last checkpoint, if there is one, and says so."""
    begun = run_dir.load_last()
    if begun is None:
        return
    try:
        state.load_state_dict(begun)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{run_dir.last}: of another version of this program ({first_line})") from error
    if state.epoch >= epochs:
        log.info("%s: already complete (%d epochs)", run_dir.stage, epochs)
    else:
        further = "".join(f", {name} step {sums.steps} of the next" for name, sums in state.running.items())
        log.info("%s: continues after epoch %d of %d%s", run_dir.stage, state.epoch, epochs, further)


def _is_due(epoch: int, epochs: int, every: int) -> bool:
    return epoch % every == 0 or epoch == epochs
