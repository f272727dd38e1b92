"""Bit choices, and the named options that settings and code share. Imports no torch: configs are read without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

BitChoice = tuple[int, int]  # (weight bits, activation bits)
FULL_PRECISION = 32  # the bit-width of values that are not quantized

QuantizerName = Literal["lsq_plus", "lsq", "pact", "dorefa"]
WeightSharing = Literal["shared", "separate", "nested"]  # how the choices of a layer share its weight
# The layers that the policy controls, one choice each; with `network` one choice, a level, holds for all layers.
Positions = Literal["pointwise", "backbone", "backbone+extras", "all", "network"]
Amp = Literal["off", "bf16"]  # arithmetic of the convolutions
CompileMode = Literal["auto", "on", "off"]

Samples = int | Literal["all"]  # configurations of an image that are judged in a policy step
QualityKind = Literal["precision", "recall", "f1", "ap"]  # of the detections of one image
RewardQuality = Literal[QualityKind, "loss"]  # the quality that a reward starts from
Baseline = Literal["greedy", "rloo"]  # the reward that a sample is compared with
RewardName = Literal["quality", "ratio", "window_gate", "window_scaled", "window_signed", "budget"]
PolicyInput = Literal["image", "stem"]  # `stem`: the features of the detector's first convolution
SearchStart = Literal["uniform", "static", "sensitivity", "pretrained"]  # the first distribution of the policy
Configurations = Literal["random", "sandwich", "ends", "policy"]  # the bits that a pretraining runs images at

OptimizerName = Literal["adamw", "sgd"]
Augmentation = Literal["ssd", "flips"]
ImageCache = Literal["none", "ram"]
# Pixels that boxes refer to; `auto`: stored ones, unless only the upright picture has the annotated size.
Orientation = Literal["stored", "upright", "auto"]
Script = Literal["pretrain", "search", "finetune", "eval"]  # the entry scripts, without .py

# Ways to choose bits: the values of `--bits`, by which reports, tables and plots name their rows.
POLICY = "policy"
FP32 = "fp32"
RANDOM = "random"
SHUFFLED = "shuffled"
FREQUENCIES = "frequencies"
MODAL = "modal"
STATIC = "static"
UNIFORM = "uniform"  # followed by the choice, see `uniform_name`


def choice_names(choices: Sequence[BitChoice], levels: Sequence[Sequence[BitChoice]] | None) -> list[str]:
    """Names of the K choices: `w3a4` and so on, or `level0` and so on where every level has bits for each layer."""
    if levels is not None:
        return [f"level{level}" for level in range(len(levels))]
    return [choice_name(choice) for choice in choices]


def choice_name(choice: BitChoice) -> str:
    """`w3a4` for 3-bit weights and 4-bit activations."""
    weight_bits, activation_bits = choice
    return f"w{weight_bits}a{activation_bits}"


def parse_choice(name: str) -> BitChoice:
    """The inverse of `choice_name`.

    Raises: ValueError for another name.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", name)
    if found is None:
        raise ValueError(f"expected a name such as w3a4, got {name}")
    return int(found[1]), int(found[2])


def uniform_name(choice: str) -> str:
    """`uniform:w3a4`: the choice of this name at all positions."""
    return f"{UNIFORM}:{choice}"
