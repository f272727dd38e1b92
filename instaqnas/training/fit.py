"""The epochs of one stage: continue, train, validate, save."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from instaqnas.errors import InputError
from instaqnas.training.evaluate import EvalReport
from instaqnas.training.run_dir import RunDir

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that training changes: what a checkpoint holds.

    Random numbers are not among it: every epoch derives its own from the seed (`instaqnas.seeds`).
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    scheduler: LRScheduler
    multiplier: float = 0.0
    epoch: int = 0
    best_map: float = -1.0
    metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scheduler": self.scheduler.state_dict(),
            "multiplier": self.multiplier,
            "epoch": self.epoch,
            "best_map": self.best_map,
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scheduler.load_state_dict(state["scheduler"])
        for name in ("multiplier", "epoch", "best_map", "metrics"):
            setattr(self, name, state[name])


@dataclass(frozen=True)
class EpochResult:
    """What an epoch measured: scalars by name, and the bit configurations [n, L] it ran."""

    scalars: dict[str, float]
    choices: Tensor


def fit(
    run_dir: RunDir,
    state: TrainState,
    *,
    epochs: int,
    steps_per_epoch: int,
    train_epoch: Callable[[int], EpochResult],
    after_training: Callable[[], None],
    validate: Callable[[], EvalReport] | None,
    keep_best: bool,
    add_pictures: Callable[[int], None],
    eval_every: int,
    save_every: int,
) -> None:
    """Trains to the last epoch from the last checkpoint, if there is one.

    Args:
        train_epoch: trains epoch number 0, 1, ... and updates `state`.
        after_training: called once after the last epoch, before it is validated and saved.
        validate: evaluates on the val split; None where there is none.
        keep_best: keep the checkpoint with the highest mAP on the val split too.
        add_pictures: logs pictures of detections at a step.
        eval_every, save_every: epochs between validations and between checkpoints; the last epoch has both.
    """
    _continue(run_dir, state, epochs)
    if state.epoch >= epochs:
        return
    writer = run_dir.open_tensorboard(state.epoch * steps_per_epoch)
    while state.epoch < epochs:
        result = train_epoch(state.epoch)
        state.epoch += 1
        if state.epoch == epochs:
            after_training()
        step, due = state.epoch * steps_per_epoch, _is_due(state.epoch, epochs, eval_every)
        scalars, improved = dict(result.scalars), False
        if due and validate is not None:
            report = validate()
            scalars |= {"eval/map": report.map_11pt, "eval/gbitops_total": report.gbitops_total}
            improved = keep_best and report.map_11pt > state.best_map
            state.best_map = max(state.best_map, report.map_11pt)
        state.metrics = scalars
        if _is_due(state.epoch, epochs, save_every) or improved:
            run_dir.save(state.state_dict(), best=improved)
        run_dir.log_epoch(state.epoch, step, scalars)
        if result.choices.unique().numel() > 1:
            for position, column in enumerate(result.choices.T):
                writer.add_histogram(f"bits/position_{position:02d}", column, step, bins="auto")
        if due:
            add_pictures(step)
    run_dir.close()
    log.info("%s: done, %s", run_dir.stage, ", ".join(f"{name} {value:.4g}" for name, value in state.metrics.items()))


def _continue(run_dir: RunDir, state: TrainState, epochs: int) -> None:
    """Loads the last checkpoint, if there is one, and says so."""
    begun = run_dir.load_last()
    if begun is None:
        return
    try:
        state.load_state_dict(begun)
    except (KeyError, RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{run_dir.last}: of another version of this program ({first_line})") from error
    if state.epoch >= epochs:
        log.info("%s: already complete (%d epochs)", run_dir.stage, epochs)
    else:
        log.info("%s: continues after epoch %d of %d", run_dir.stage, state.epoch, epochs)


def _is_due(epoch: int, epochs: int, every: int) -> bool:
    return epoch % every == 0 or epoch == epochs
