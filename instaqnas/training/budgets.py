"""Prices of GBitOps of a trained policy: the table for other budgets, and training at many budgets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from instaqnas.config.ranges import Budgets
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.survey import survey
from instaqnas.experiment.parts import Experiment
from instaqnas.policy.bit_config import ChooseBits, greedy_at_random_shifts
from instaqnas.policy.budget import PricePoint, price_of, price_table
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.bitops import CostTable


def measured_prices(
    experiment: Experiment, detector: SwitchableSSD, policy: PolicyNet, own_gbitops: float
) -> list[PricePoint]:
    """The price table of a policy, measured on the tuning split (`Experiment.tuning_split`).

    Args:
        experiment: parts of the config.
        detector: computes the input of the policy.
        policy: the policy.
        own_gbitops: cost of the policy network per image.
    """
    costs = detector_costs(detector)
    logits = survey(policy, detector, experiment.tuning_loader(), experiment.device).logits
    return price_table(logits, costs.gbitops_table(), costs.fixed / 1e9 + own_gbitops)


def choose_at_budgets(
    experiment: Experiment, policy: PolicyNet, costs: CostTable, prices: Sequence[PricePoint], budgets: Budgets
) -> ChooseBits:
    """The greedy policy at a budget that every batch draws anew, uniformly between two.

    Args:
        experiment: draws the budgets.
        policy: the policy.
        costs: GBitOps of the detector's configurations.
        prices: of the policy.
        budgets: (lowest, highest) mean GBitOps.

    Raises: InputError if a budget is outside `prices`.
    """
    lowest, highest = budgets
    table = costs.gbitops_table()
    for budget in budgets:
        price_of(prices, budget)

    def offset_of(number: float) -> Tensor:
        return -price_of(prices, lowest + (highest - lowest) * number) * table

    return greedy_at_random_shifts(policy, offset_of, experiment.draw("budgets"))
