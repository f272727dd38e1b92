"""Ranges of settings. A field carries its own range, and `check_ranges` refuses a value outside it.

epochs: int = setting(10, at_least(1))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from instaqnas.bits import FULL_PRECISION, BitChoice
from instaqnas.errors import InputError

BoxSizes = tuple[int, int]  # (smaller, larger) in pixels
Budgets = tuple[float, float]  # (lowest, highest) in GBitOps
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Args:
        contains: tells whether a value is one of them.
        text: names them in a message, after "expected".
    """

    contains: Callable[[Any], bool]
    text: str


def setting(default: T, allowed: Range) -> T:
    """Returns a dataclass field with this default, which must not be a list, and this range."""
    return field(default=default, metadata={"range": allowed})


def check_ranges(section: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass and of the dataclasses in it.

    Raises:
        InputError: a value outside its range, or a float that is not finite; the message names the dotted key.
    """
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise unexpected(key, "a finite number", value)
        allowed: Range | None = item.metadata.get("range")
        if allowed is not None and not allowed.contains(value):
            raise unexpected(key, allowed.text, value)


def unexpected(key: str, expected: str, value: object) -> InputError:
    """Returns the error for a setting that has another value than expected."""
    return InputError(f"{key}: expected {expected}, got {as_json(value)}")


def as_json(value: object) -> str:
    """Returns a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def at_least(least: float) -> Range:
    return Range(lambda value: value >= least, f"at least {least}")


def at_most(most: float) -> Range:
    return Range(lambda value: value <= most, f"at most {most}")


def more_than(limit: float) -> Range:
    return Range(lambda value: value > limit, f"more than {limit}")


FRACTION = Range(lambda value: 0 <= value <= 1, "a number from 0 to 1")
FRACTION_BELOW_1 = Range(lambda value: 0 <= value < 1, "at least 0 and less than 1")

# --- Bit-widths and default boxes -------------------------------------------------------------------------------------


def _is_bit_width(bits: int) -> bool:
    return 2 <= bits <= 8 or bits == FULL_PRECISION


def _are_bits(pair: BitChoice) -> bool:
    return all(_is_bit_width(bits) for bits in pair)


def _are_bits_behind_relu(pair: BitChoice) -> bool:
    weight_bits, activation_bits = pair
    return _is_bit_width(weight_bits) and (activation_bits == 1 or _is_bit_width(activation_bits))


def _are_choices(choices: list[BitChoice]) -> bool:
    different = len({tuple(pair) for pair in choices}) == len(choices)
    return 1 <= len(choices) <= 8 and different and all(_are_bits_behind_relu(pair) for pair in choices)


def _are_levels(levels: list[list[BitChoice]] | None) -> bool:
    if levels is None:
        return True
    same_layers = len({len(level) for level in levels}) == 1
    return 1 <= len(levels) <= 8 and same_layers and all(_is_level(level) for level in levels)


def _is_level(level: list[BitChoice]) -> bool:
    return len(level) > 0 and _are_bits(level[0]) and all(_are_bits_behind_relu(pair) for pair in level[1:])


def _are_budgets(budgets: Budgets | None) -> bool:
    return budgets is None or 0 < budgets[0] < budgets[1] < math.inf


def _are_box_sizes(sizes: list[BoxSizes] | None) -> bool:
    return sizes is None or (len(sizes) == 6 and all(0 < smaller < larger for smaller, larger in sizes))


BITS = Range(_are_bits, "bit-widths from 2 to 8, or 32")
BITS_BEHIND_RELU = Range(_are_bits_behind_relu, "bit-widths from 2 to 8, or 32, or 1 for activations")
CHOICES = Range(_are_choices, "one to eight different pairs of bit-widths from 2 to 8, or 32, or 1 for activations")
LEVELS = Range(
    _are_levels,
    "one to eight lists, equally long, of a pair of bit-widths for each layer: 2 to 8, or 32, or 1 for activations of "
    "all layers but the first",
)
BUDGETS = Range(_are_budgets, "[lowest, highest], both above 0")
BOX_SIZES = Range(_are_box_sizes, "six pairs [smaller, larger] above 0")
