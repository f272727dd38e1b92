"""Weights of other projects into the full-precision detector, every key accounted for.

| file                                                                | gives        |
|---------------------------------------------------------------------|--------------|
| MobileNetV1-SSD of github.com/qfgaohao/pytorch-ssd                  | all          |
| MobileNetV1 of the same, trained on ImageNet, with `model.` or bare | the backbone |
| `mobilenetv1_100` of timm, as `torch.save(model.state_dict(), ...)` | the backbone |

All were trained on RGB as this detector sees it, but for half a grey level in timm's. The first two are the same
function here as there. timm's clips activations at 6 (ReLU6) and this network does not: a beginning, not an equal.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from instaqnas.detector.mobilenet import BLOCKS
from instaqnas.detector.ssd import EXTRAS, SOURCE_BLOCKS, SwitchableSSD
from instaqnas.errors import InputError

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
TIMM_STAGES = (1, 2, 2, 6, 2)  # blocks in each
MAPS = len(SOURCE_BLOCKS) + len(EXTRAS)
MOST_NAMED = 5  # keys, in the report
# What the readers of zip files and pickles raise for damaged ones.
_DAMAGES = (
    OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, ArithmeticError,
    AttributeError, TypeError, ValueError, struct.error,
)  # fmt: skip


# --- Names ------------------------------------------------------------------------------------------------------------


def _convolution_with_norm(convolution: str, norm: str, layer: str) -> dict[str, str]:
    names = {f"{norm}.{value}": f"{layer}.norm.{value}" for value in BATCH_NORM}
    return {f"{convolution}.weight": f"{layer}.weight", **names}


def _convolution_with_bias(convolution: str, layer: str) -> dict[str, str]:
    return {f"{convolution}.{value}": f"{layer}.{value}" for value in ("weight", "bias")}


def _pytorch_ssd_backbone(prefix: str) -> dict[str, str]:
    names = _convolution_with_norm(f"{prefix}0.0", f"{prefix}0.1", "backbone.stem")
    for block in range(len(BLOCKS)):
        there, here = f"{prefix}{block + 1}", f"backbone.blocks.{block}"
        names |= _convolution_with_norm(f"{there}.0", f"{there}.1", f"{here}.depthwise")
        names |= _convolution_with_norm(f"{there}.3", f"{there}.4", f"{here}.pointwise")
    return names


def _pytorch_ssd() -> dict[str, str]:
    names = _pytorch_ssd_backbone("base_net.")
    for extra in range(len(EXTRAS)):
        names |= _convolution_with_bias(f"extras.{extra}.0", f"extras.{extra}.reduce")
        names |= _convolution_with_bias(f"extras.{extra}.2", f"extras.{extra}.down")
    for index in range(MAPS):
        names |= _convolution_with_bias(f"regression_headers.{index}", f"box_heads.{index}")
        names |= _convolution_with_bias(f"classification_headers.{index}", f"class_heads.{index}")
    return names


def _timm_backbone() -> dict[str, str]:
    names = _convolution_with_norm("conv_stem", "bn1", "backbone.stem")
    there = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(TIMM_STAGES) for block in range(blocks)]
    for block, name in enumerate(there):
        names |= _convolution_with_norm(f"{name}.conv_dw", f"{name}.bn1", f"backbone.blocks.{block}.depthwise")
        names |= _convolution_with_norm(f"{name}.conv_pw", f"{name}.bn2", f"backbone.blocks.{block}.pointwise")
    return names


# Name of the format, and the names in `SwitchableSSD` by the key of the file; the first key tells the format.
FORMATS = (
    ("MobileNetV1-SSD of pytorch-ssd", _pytorch_ssd()),
    ("MobileNetV1 of pytorch-ssd", _pytorch_ssd_backbone("model.")),
    ("MobileNetV1 of pytorch-ssd", _pytorch_ssd_backbone("")),
    ("mobilenetv1_100 of timm", _timm_backbone()),
)


def _why_skipped(key: str) -> str:
    if key.endswith(".num_batches_tracked"):
        return "count batches"
    if key.startswith(("fc.", "classifier.")):
        return "classify ImageNet"
    return "are unknown here"


# --- Loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a file, and of every value of the network.

    Args:
        format: what the file is.
        loaded: name in the network by key of the file.
        skipped: reason by key of the file.
        missing: names in the network that the file has nothing for; they keep their values.
    """

    format: str
    loaded: dict[str, str]
    skipped: dict[str, str]
    missing: list[str]

    def __str__(self) -> str:
        """One line; of keys with the same reason, and of missing values, it names a few or counts them."""
        reasons = Counter(self.skipped.values())
        skipped = [f"{count} {reason} ({self._named(reason)})" for reason, count in reasons.items()]
        missing = [f"{count} of {part}" for part, count in Counter(map(_part, self.missing)).items()]
        return (
            f"{self.format}: {len(self.loaded)} keys loaded; {len(self.skipped)} skipped"
            + (f": {', '.join(skipped)}" if skipped else "")
            + f"; {len(self.missing)} values left as they were"
            + (f": {', '.join(missing)}" if missing else "")
        )

    def _named(self, reason: str) -> str:
        keys = [key for key, why in self.skipped.items() if why == reason]
        return ", ".join(keys[:MOST_NAMED]) + (", ..." if len(keys) > MOST_NAMED else "")


def load_pretrained(detector: SwitchableSSD, path: str | Path) -> LoadReport:
    """Copies the weights of a file in one of `FORMATS` into a full-precision detector.

    Raises: InputError if the file cannot be read, is in no known format, lacks a key of its format or has a value of
    another shape; the detector is then as before.
    """
    state = _read(path)
    found = next(((name, names) for name, names in FORMATS if next(iter(names)) in state), None)
    if found is None:
        known = ", ".join(dict.fromkeys(name for name, _ in FORMATS))
        raise InputError(f"{path}: weights in no known format (first keys: {_first(state)}); known: {known}")
    name, names = found
    own = detector.state_dict()
    for key, target in names.items():
        _check(f"{path}: {key}", state.get(key), own.get(target), name)
    with torch.no_grad():
        for key, target in names.items():
            own[target].copy_(state[key])  # [C] spreads over BatchNorm's [1, C]
    skipped = {key: _why_skipped(key) for key in state if key not in names}
    taken = set(names.values())
    return LoadReport(name, names, skipped, [target for target in own if target not in taken])


def _check(where: str, value: Tensor | None, own: Tensor | None, format_name: str) -> None:
    """Raises InputError, which begins with `where`, unless a value of the file fits the network's own."""
    if value is None:
        raise InputError(f"{where} is missing, so this is not a whole {format_name}")
    if own is None:
        raise InputError(f"{where}: this network has BatchNorm instead; set detector.extras_batch_norm to false")
    shape = own.shape[1:] if own.dim() == 2 else own.shape  # BatchNorm's are [1, C]
    if value.shape != shape:
        raise InputError(f"{where}: shape {list(value.shape)}, needed here: {list(shape)}")


def _read(path: str | Path) -> Mapping[str, Tensor]:
    """A state dict of another program, from today's or the older format of torch.save, on the CPU."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load would accept most flipped bits
            if damaged is not None:
                raise InputError(f"{path}: damaged (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except _DAMAGES as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not readable weights ({first_line})") from None
    if isinstance(state, dict) and "stage" in state:
        raise InputError(f"{path}: a checkpoint of this program; --init takes those")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: not a state dict, which has a tensor for every key")
    return state


def _first(state: Mapping[str, Tensor]) -> str:
    return ", ".join(map(str, list(state)[:MOST_NAMED])) or "none"


def _part(name: str) -> str:
    return name.partition(".")[0]
