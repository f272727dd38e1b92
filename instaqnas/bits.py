"""Bit choices, and the named options that settings and code share. Imports no torch: configs are read without it."""

from __future__ import annotations

from typing import Literal

BitChoice = tuple[int, int]  # (weight bits, activation bits)
FULL_PRECISION = 32  # the bit-width of values that are not quantized

QuantizerName = Literal["lsq_plus", "lsq", "pact", "dorefa"]
WeightSharing = Literal["shared", "separate", "nested"]  # how the choices of a layer share its weight
# The layers that the policy controls, one choice each; with `network` one choice, a level, holds for all layers.
Positions = Literal["pointwise", "backbone", "backbone+extras", "all", "network"]
Amp = Literal["off", "bf16"]  # arithmetic of the convolutions
CompileMode = Literal["auto", "on", "off"]

QualityKind = Literal["precision", "recall", "f1", "ap"]  # of the detections of one image
RewardQuality = Literal[QualityKind, "loss"]  # the quality that a reward starts from
Baseline = Literal["greedy", "rloo"]  # the reward that a sample is compared with
RewardName = Literal["quality", "ratio", "window_gate", "window_scaled", "window_signed", "budget"]
PolicyInput = Literal["image", "stem"]  # `stem`: the features of the detector's first convolution
SearchStart = Literal["uniform", "static", "sensitivity"]  # the first distribution of the policy

OptimizerName = Literal["adamw", "sgd"]
Augmentation = Literal["ssd", "flips"]
ImageCache = Literal["none", "ram"]
Device = Literal["auto", "cpu", "cuda"]
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


def choice_name(choice: BitChoice) -> str:
    """`w3a4` for 3-bit weights and 4-bit activations."""
    weight_bits, activation_bits = choice
    return f"w{weight_bits}a{activation_bits}"


def uniform_name(choice: BitChoice) -> str:
    """`uniform:w3a4`: the same choice at all positions."""
    return f"{UNIFORM}:{choice_name(choice)}"
