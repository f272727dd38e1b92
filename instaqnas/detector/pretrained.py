"""Loads weights of other projects into the full-precision detector and accounts for every key.

| file                                                                | loads        |
|---------------------------------------------------------------------|--------------|
| MobileNetV1-SSD of github.com/qfgaohao/pytorch-ssd                  | everything   |
| its ImageNet MobileNetV1, with or without the prefix `model.`       | the backbone |
| `mobilenetv1_100` of timm, as `torch.save(model.state_dict(), ...)` | the backbone |

All were trained on RGB with this detector's normalisation, timm's up to half a grey level. The first two compute the
same function here as in their own code. timm's network clips activations at 6 (ReLU6), which this one does not, so its
weights are only a starting point.
"""

from __future__ import annotations

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
from instaqnas.files import DAMAGES

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
TIMM_STAGES = (1, 2, 2, 6, 2)  # blocks per stage
MAPS = len(SOURCE_BLOCKS) + len(EXTRAS)
MOST_NAMED = 5  # keys, in the report
# --- Names in the file and in SwitchableSSD ---------------------------------------------------------------------------


def _convolution_with_norm(convolution: str, norm: str, layer: str) -> dict[str, str]:
    names = {f"{norm}.{value}": f"{layer}.norm.{value}" for value in BATCH_NORM}
    return {f"{convolution}.weight": f"{layer}.weight", **names}


def _convolution_with_bias(convolution: str, layer: str) -> dict[str, str]:
    return {f"{convolution}.{value}": f"{layer}.{value}" for value in ("weight", "bias")}


def _pytorch_ssd_backbone(prefix: str) -> dict[str, str]:
    names = _convolution_with_norm(f"{prefix}0.0", f"{prefix}0.1", "backbone.stem")
    for block in range(len(BLOCKS)):
        theirs, ours = f"{prefix}{block + 1}", f"backbone.blocks.{block}"
        names |= _convolution_with_norm(f"{theirs}.0", f"{theirs}.1", f"{ours}.depthwise")
        names |= _convolution_with_norm(f"{theirs}.3", f"{theirs}.4", f"{ours}.pointwise")
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
    block = 0
    for stage, blocks in enumerate(TIMM_STAGES):
        for index in range(blocks):
            theirs, ours = f"blocks.{stage}.{index}", f"backbone.blocks.{block}"
            names |= _convolution_with_norm(f"{theirs}.conv_dw", f"{theirs}.bn1", f"{ours}.depthwise")
            names |= _convolution_with_norm(f"{theirs}.conv_pw", f"{theirs}.bn2", f"{ours}.pointwise")
            block += 1
    return names


# (format, name in SwitchableSSD by key of the file). A file that has the first key is taken to be in that format.
FORMATS: tuple[tuple[str, dict[str, str]], ...] = (
    ("MobileNetV1-SSD of pytorch-ssd", _pytorch_ssd()),
    ("MobileNetV1 of pytorch-ssd", _pytorch_ssd_backbone("model.")),
    ("MobileNetV1 of pytorch-ssd", _pytorch_ssd_backbone("")),
    ("mobilenetv1_100 of timm", _timm_backbone()),
)


# --- Loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """The outcome for every key of a file and every value of the network.

    Args:
        format: name of the file's format.
        loaded: name in the network by key of the file.
        skipped: kind of value by key of the file.
        missing: names in the network that the file does not have; they keep their values.
    """

    format: str
    loaded: dict[str, str]
    skipped: dict[str, str]
    missing: list[str]

    def __str__(self) -> str:
        """One line: counts, with a few skipped keys of each kind and the parts of the network left unchanged."""
        text = f"{self.format}: {len(self.loaded)} keys loaded; {len(self.skipped)} skipped"
        if self.skipped:
            kinds = Counter(self.skipped.values())
            text += ": " + ", ".join(f"{count} {kind} ({self._examples(kind)})" for kind, count in kinds.items())
        text += f"; {len(self.missing)} values left unchanged"
        if self.missing:
            parts = Counter(name.partition(".")[0] for name in self.missing)
            text += ": " + ", ".join(f"{count} of {part}" for part, count in parts.items())
        return text

    def _examples(self, kind: str) -> str:
        keys = [key for key, own in self.skipped.items() if own == kind]
        return ", ".join(keys[:MOST_NAMED]) + (", ..." if len(keys) > MOST_NAMED else "")


def load_pretrained(detector: SwitchableSSD, path: str | Path) -> LoadReport:
    """Copies the weights of a file in one of `FORMATS` into a full-precision detector.

    Raises: InputError if the file cannot be read, is in no known format, lacks a key of its format or has a value of
    another shape. The detector is then unchanged.
    """
    state = _read(path)
    format_name, names = _format_of(state, path)
    own = detector.state_dict()
    for key, target in names.items():
        _check(f"{path}: {key}", state.get(key), own.get(target), format_name)
    with torch.no_grad():
        for key, target in names.items():
            own[target].copy_(state[key])  # [C] broadcasts to BatchNorm's [1, C]
    skipped = {key: _kind_of_skipped(key) for key in state if key not in names}
    loaded = set(names.values())
    return LoadReport(format_name, names, skipped, [name for name in own if name not in loaded])


def _format_of(state: Mapping[str, Tensor], path: str | Path) -> tuple[str, dict[str, str]]:
    """The entry of `FORMATS` for the weights of a file; raises InputError if there is none."""
    for format_name, names in FORMATS:
        first_key = next(iter(names))
        if first_key in state:
            return format_name, names
    first_keys = ", ".join(map(str, list(state)[:MOST_NAMED])) or "none"
    known = ", ".join(dict.fromkeys(format_name for format_name, _ in FORMATS))
    raise InputError(f"{path}: weights in no known format (first keys: {first_keys}); known: {known}")


def _kind_of_skipped(key: str) -> str:
    if key.endswith(".num_batches_tracked"):
        return "batch counters"
    if key.startswith(("fc.", "classifier.")):
        return "of the ImageNet classifier"
    return "unknown"


def _check(where: str, value: Tensor | None, own: Tensor | None, format_name: str) -> None:
    """Raises InputError, starting with `where`, unless a value of the file fits the network's own."""
    if value is None:
        raise InputError(f"{where}: missing, so the file is not a complete {format_name}")
    if own is None:
        raise InputError(f"{where}: this network has BatchNorm instead; set detector.extras_batch_norm to false")
    shape = own.shape[1:] if own.dim() == 2 else own.shape  # BatchNorm's values are [1, C]
    if value.shape != shape:
        raise InputError(f"{where}: shape {list(value.shape)}, but the network needs {list(shape)}")


def _read(path: str | Path) -> Mapping[str, Tensor]:
    """The state dict in a file of either format of torch.save (zip or the older one), on the CPU."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load would accept most flipped bits
            if damaged is not None:
                raise InputError(f"{path}: damaged (checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGES as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not readable weights ({first_line})") from None
    if isinstance(state, dict) and "stage" in state:
        raise InputError(f"{path}: a checkpoint of this program; search.py and finetune.py take it with --init")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: not a state dict with a tensor for every key")
    return state
