"""Levels on the static front: for each cost, the bits of all layers with the smallest detection loss.

The loss of a configuration comes from one of two networks:

quantized        a pretraining under random configurations of all positions; candidates are measured on it, see
                 `instaqnas.evaluation.static_search`
full precision   the full-precision network, with one layer quantized at a time; losses of layers are added up, because
                 a network that was not trained at few bits loses everything if all layers have them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from instaqnas import distributed
from instaqnas.bits import FULL_PRECISION, BitChoice, choice_name
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, copy_weights, detector_costs
from instaqnas.errors import InputError
from instaqnas.evaluation.sensitivity import (
    Configuration,
    Sensitivity,
    losses_around,
    mean_loss_on,
    pretrained_loss,
    sensitivity_of,
)
from instaqnas.evaluation.static_search import best_within
from instaqnas.experiment.handover import Checkpoint
from instaqnas.experiment.parts import Experiment, detector_bits
from instaqnas.experiment.stage import FULL_PRECISION_KINDS
from instaqnas.policy.bit_config import ChooseBits
from instaqnas.quant.bitops import CostTable
from instaqnas.quant.integer import IntegerConv2d
from instaqnas.quant.switchable import SwitchableConv2d, calibrate


@dataclass(frozen=True)
class Level:
    """Bits of all layers.

    gbitops: of the detector.
    loss: mean loss on the tuning split; from the full-precision network, the sum over layers of the losses with only
        that layer quantized.
    found: how the configuration was found, see `static_search`.
    bits: of every layer, in the order of the network.
    """

    gbitops: float
    loss: float
    found: str
    bits: list[BitChoice]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON; bits by name, such as w3a4."""
        return {**vars(self), "bits": [choice_name(bits) for bits in self.bits]}


def levels_of(experiment: Experiment, source: Checkpoint, limits: Sequence[float]) -> list[Level]:
    """The best level within each of some costs.

    Args:
        experiment: its `bits.choices` are the pairs that levels are made of, at `bits.positions` (not `network`).
        source: a checkpoint of the full-precision or of the quantized pretraining.
        limits: highest GBitOps of the detector for each level.

    Raises: InputError if a cost is below the cheapest configuration, or the checkpoint does not fit.
    """
    if experiment.config.bits.positions == "network":
        raise InputError("bits.positions: expected positions whose layers can differ, such as all, got network")
    if source.stage.kind in FULL_PRECISION_KINDS:
        return _from_full_precision(experiment, source, limits)
    pretrained = pretrained_loss(experiment, source)
    _check_limits(limits, pretrained.costs)
    sensitivity = sensitivity_of(experiment, pretrained)
    detector = experiment.quantized_detector()
    found = [best_within(limit, pretrained.costs, sensitivity, pretrained.mean_loss)[0] for limit in limits]
    return [Level(c.gbitops, c.loss, c.found, bits_of_layers(detector, c.configuration)) for c in found]


def bits_of_layers(detector: SwitchableSSD, configuration: Configuration) -> list[BitChoice]:
    """Bits of every layer of a quantized or integer detector under a configuration [L], in the order of the network."""
    choice_of = {
        name: choice for names, choice in zip(detector.layers_at.values(), configuration, strict=True) for name in names
    }
    bits = []
    for name in detector.layer_names:
        layer = detector.get_submodule(name)
        assert isinstance(layer, SwitchableConv2d | IntegerConv2d)
        bits.append(layer.choices[choice_of.get(name, 0)])
    return bits


def _from_full_precision(experiment: Experiment, source: Checkpoint, limits: Sequence[float]) -> list[Level]:
    losses, costs, detector = full_precision_sensitivity(experiment, source)
    _check_limits(limits, costs)

    def sum_of_losses(configuration: Configuration) -> float:
        return sum(losses[position][choice] for position, choice in enumerate(configuration))

    sensitivity = Sensitivity(losses, losses)
    found = [best_within(limit, costs, sensitivity, sum_of_losses)[0] for limit in limits]
    return [Level(c.gbitops, c.loss, c.found, bits_of_layers(detector, c.configuration)) for c in found]


def full_precision_sensitivity(
    experiment: Experiment, source: Checkpoint
) -> tuple[list[list[float]], CostTable, SwitchableSSD]:
    """Losses of the full-precision network with one position quantized at a time.

    Args:
        experiment: parts of the config.
        source: checkpoint of the full-precision training.

    Returns: mean losses [L][K], the costs of the quantized detector, and that detector, untrained.
    """
    bits, quantized = detector_bits(experiment.config), experiment.quantized_detector()
    full = experiment.detector(DetectorBits.full_precision())
    source.load(experiment, full, "detector", FULL_PRECISION_KINDS)
    none: BitChoice = (FULL_PRECISION, FULL_PRECISION)
    choices = [none, *bits.choices]
    mixed = experiment.detector(replace(bits, choices=choices, stem=none, depthwise=none, extras=none, heads=none))
    copy_weights(full, mixed)
    batch, draw = experiment.calibration_batch(), experiment.choose_random("calibration")
    with distributed.alone():
        calibrate(mixed, lambda: mixed(batch.images, 1 + draw(batch.images, batch.keys)))
    copy_weights(full, mixed)  # calibration has moved BatchNorm's statistics
    never: ChooseBits = experiment.choose_fixed(mixed)
    mean_loss = mean_loss_on(mixed.eval(), experiment.tuning_loader(), never, experiment.device)
    losses = losses_around([0] * len(mixed.positions), 1 + len(bits.choices), mean_loss)
    return [row[1:] for row in losses], detector_costs(quantized), quantized


def _check_limits(limits: Sequence[float], costs: CostTable) -> None:
    for limit in limits:
        if limit < costs.lowest():
            raise InputError(f"--costs {limit:g}: the cheapest configuration costs {costs.lowest():.4g} GBitOps")
