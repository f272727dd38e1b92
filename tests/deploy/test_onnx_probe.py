"""The integers that enter each layer: equal in the exact form, within one level in the fused form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instaqnas.deploy.packed import IntegerModel
from instaqnas.quant.integer import IntegerConv2d
from tests.deploy.onnx_models import BITS, Session, model, random_images

pytest.importorskip("onnx", reason="onnx is not installed: scripts/setup.sh --deploy")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/setup.sh --deploy")

from instaqnas.deploy.onnx_export import adaptive_model  # noqa: E402
from instaqnas.deploy.onnx_probe import levels_by_layer, probed  # noqa: E402

CONVOLUTIONS = 47


@torch.no_grad()
def levels_of(found: IntegerModel, images: torch.Tensor, choices: torch.Tensor) -> dict[str, np.ndarray]:
    """The levels that enter each layer of the integer networks, [C, H, W], without their offset."""
    levels = {}

    def hook(name: str):
        def keep(layer: IntegerConv2d, args: tuple, _output: object) -> None:
            choice = args[1] if len(args) > 1 and args[1] is not None else torch.zeros(1, dtype=torch.int64)
            levels[name] = (layer.levels(args[0], choice)[0] - layer.offset[choice]).numpy()

        return keep

    networks = (("", found.detector), ("policy.", found.policy))
    hooks = [
        layer.register_forward_hook(hook(prefix + name))
        for prefix, network in networks
        for name, layer in network.named_modules()
        if isinstance(layer, IntegerConv2d)
    ]
    found.detector(images, choices)
    found.policy(found.detector.observe(images).input)
    for handle in hooks:
        handle.remove()
    return levels


def offsets(found: IntegerModel, choices: dict[str, int], name: str) -> float:
    """The byte of level 0 in the input of a layer."""
    network = found.policy if name.startswith("policy.") else found.detector
    layer = network.get_submodule(name.removeprefix("policy."))
    return layer.offset[choices.get(name, choices.get("network", 0)) if len(layer.choices) > 1 else 0].item()


def differences(name: str, form: str) -> dict[str, np.ndarray]:
    """Level minus the integer networks' level, by layer, for one image under random choices."""
    found, images = model(name), random_images(1, seed=11)
    positions = found.detector.positions
    choices = torch.randint(
        len(found.detector.choice_names), (1, len(positions)), generator=torch.Generator().manual_seed(1)
    )
    by_position = dict(zip(positions, choices[0].tolist(), strict=True))
    outputs = Session(probed(adaptive_model(found, form), positions, choices[0].tolist()))(images)
    assert outputs["choices"].tolist() == choices[0].tolist()
    expected, result = levels_of(found, images, choices), {}
    for layer, levels in levels_by_layer(outputs).items():
        offset = offsets(found, by_position, layer) if levels.dtype == np.uint8 else 0
        result[layer] = levels[0].astype(np.float32) - offset - expected[layer]
    assert result.keys() == expected.keys()
    assert len([layer for layer in result if not layer.startswith("policy.")]) == CONVOLUTIONS
    return result


@pytest.mark.parametrize("name", BITS)
def test_no_integer_differs_in_the_exact_form(name: str) -> None:
    assert {layer: int((found != 0).sum()) for layer, found in differences(name, "exact").items() if found.any()} == {}


@pytest.mark.parametrize("name", BITS)
def test_first_fused_layers_differ_by_one_level_in_few_integers(name: str) -> None:
    """Later layers of these untrained networks amplify any difference."""
    found = differences(name, "fused")
    assert not found["backbone.stem"].any()
    assert not found["backbone.blocks.0.depthwise"].any()
    first = found["backbone.blocks.0.pointwise"]
    assert np.abs(first).max() <= 1
    assert np.count_nonzero(first) < 0.01 * first.size
