"""ONNX files of `onnx_export` in onnxruntime."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instaqnas.errors import InputError

FORMAT = "instaqnas 1"  # changes with the meaning of inputs, outputs or metadata
PACKAGES = ("onnx", "onnxruntime")
ERRORS_ONLY = 3  # onnxruntime warns of every optional input


def check_packages() -> None:
    """Raises InputError if a package for ONNX files is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{' and '.join(missing)}: not installed; scripts/setup.sh --deploy does it")


def new_session(model: Path | bytes, threads: int = 0) -> Any:
    """A session of onnxruntime on the CPU; `threads` 0 for one per core."""
    import onnxruntime  # optional, so not at the top

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, ERRORS_ONLY
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class OnnxModel:
    """A session and its metadata, see `onnx_export.metadata`."""

    path: Path
    session: Any
    metadata: dict[str, Any]

    @staticmethod
    def load(path: Path, threads: int = 0) -> OnnxModel:
        """Reads a file.

        Args:
            path: the file.
            threads: of the session; 0 for one per core.

        Raises: InputError if it cannot be read, or is no file of this version of `tools.export`.
        """
        check_packages()
        try:
            session = new_session(path, threads)
        except Exception as error:  # onnxruntime has a class for each status code, without a common base
            raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
        properties = dict(session.get_modelmeta().custom_metadata_map)
        if properties.get("format") != FORMAT:
            raise InputError(f"{path}: not a file of this version of instaqnas.tools.export; export it again")
        plain = {key: properties.pop(key) for key in ("format", "kind", "form")}
        return OnnxModel(path, session, plain | {key: json.loads(value) for key, value in properties.items()})

    def run(self, images: np.ndarray, price: float | None = None) -> dict[str, np.ndarray]:
        """Outputs by name.

        Args:
            images: uint8 RGB [B, S, S, 3]; B is 1 for adaptive models.
            price: shifts the policy to another mean cost; None for the policy as it was trained.

        Raises: InputError for images of another size or type, and for a price outside the table of the file.
        """
        side = self.metadata["image_size"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise InputError(f"image: expected uint8 [B, {side}, {side}, 3], got {images.dtype} {list(images.shape)}")
        inputs: dict[str, np.ndarray] = {"image": images}
        if price is not None:
            self._check_price(price)
            inputs["price"] = np.array([price], np.float32)
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def _check_price(self, price: float) -> None:
        """Raises InputError for a price outside the table; without a table, for one that is not finite."""
        prices = [price for price, _ in self.metadata["prices"]]
        if "price" not in [value.name for value in self.session.get_overridable_initializers()]:
            raise InputError(f"price: {self.path} has no policy")
        if not np.isfinite(price) or (prices and not min(prices) <= price <= max(prices)):
            known = f"{min(prices):.4g} to {max(prices):.4g}" if prices else "a finite number"
            raise InputError(f"price {price:g}: expected {known}")
