"""ONNX models give the detections, choices and costs of the integer networks they are made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from instaqnas.deploy.packed import IntegerModel
from instaqnas.evaluation.inference import detect
from tests.deploy.onnx_models import BITS, SIDE, Session, model, random_images, with_settings

onnx = pytest.importorskip("onnx", reason="onnx is not installed: scripts/setup.sh --deploy")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/setup.sh --deploy")

from instaqnas.deploy.onnx_export import adaptive_model, fixed_model, policy_model  # noqa: E402


def greedy(found: IntegerModel, images: torch.Tensor) -> torch.Tensor:
    """The policy's choices [B, L]."""
    with torch.no_grad():
        return found.policy(found.detector.observe(images).input).argmax(-1)


QUICK = ("pointwise", "network")  # the other networks of BITS are tested with -m slow


def check_detections(found: IntegerModel, outputs: dict, images: torch.Tensor, choices: torch.Tensor) -> None:
    """The outputs for one image are what the integer networks detect."""
    expected = detect(found.detector, images, choices, found.settings)
    np.testing.assert_allclose(outputs["scores"], expected.scores[0], rtol=0, atol=1e-6)
    # Detections whose scores differ in the last bit only may come in another order.
    left = list(zip(outputs["labels"].tolist(), outputs["scores"], outputs["boxes"], strict=True))
    for label, score, box in zip(expected.labels[0].tolist(), expected.scores[0], expected.boxes_xyxy[0], strict=True):
        near = [i for i, item in enumerate(left) if item[0] == label and abs(item[1] - score) < 1e-6]
        near = [i for i in near if np.abs(left[i][2] - box.numpy()).max() < 1e-3]
        assert near, f"no detection of label {label}, score {score}"
        left.pop(near[0])


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BITS]
)
def test_adaptive_models_detect_what_the_integer_networks_detect(name: str) -> None:
    found = model(name)
    run = Session(adaptive_model(found))
    for seed in range(3):
        images = random_images(1, seed=seed + 7)
        choices = greedy(found, images)
        outputs = run(images)
        assert outputs["choices"].tolist() == choices[0].tolist()
        assert outputs["gbitops"].tolist() == [found.costs.gbitops(choices).item() + found.policy_gbitops]
        check_detections(found, outputs, images, choices)


@pytest.mark.parametrize("pool", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_policy_on_the_stem_sees_the_stem_of_its_detector(pool: int) -> None:
    found = model("pointwise", on_stem=True, pool=pool)
    run = Session(adaptive_model(found))
    for seed in range(3):
        images = random_images(1, seed=seed)
        choices = greedy(found, images)
        outputs = run(images)
        assert outputs["choices"].tolist() == choices[0].tolist()
        check_detections(found, outputs, images, choices)


@pytest.mark.parametrize("settings", [{"score_threshold": 0.9}, {"max_detections": 1000, "candidates_per_class": 1000}])
def test_no_detection_and_all_detections(settings: dict) -> None:
    found, images = with_settings(model("pointwise"), **settings), random_images(1)
    outputs = Session(adaptive_model(found))(images)
    check_detections(found, outputs, images, greedy(found, images))
    assert (len(outputs["labels"]) == 0) == (settings.get("score_threshold") == 0.9)


def test_fixed_models_take_batches() -> None:
    found, images = with_settings(model("network"), max_detections=9), random_images(3, seed=7)
    for level in range(3):
        outputs = Session(fixed_model(found, [level]))(images)
        expected = detect(found.detector, images, torch.full((3, 1), level), found.settings)
        width = expected.labels.shape[1]  # the number that any image has; the model always gives as many
        assert outputs["labels"][:, :width].tolist() == expected.labels.tolist()
        assert not outputs["labels"][:, width:].any()
        np.testing.assert_allclose(outputs["boxes"][:, :width], expected.boxes_xyxy, rtol=0, atol=1e-3)
        np.testing.assert_allclose(outputs["scores"][:, :width], expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pointwise", "network"])
def test_prices_move_the_choices_as_they_move_logits(name: str) -> None:
    found, images = model(name), random_images(20, seed=3)
    run = Session(policy_model(found))
    with torch.no_grad():
        logits = found.policy(images)
    costs = found.costs.gbitops_table()
    means = []
    for price, _ in found.prices:
        outputs = run(images, price=np.array([price], np.float32))
        expected = (logits - (np.float32(price) * costs.float())).argmax(-1)
        assert outputs["choices"].tolist() == expected.tolist()
        np.testing.assert_allclose(outputs["gbitops"], found.costs.gbitops(expected) + found.policy_gbitops)
        means.append(outputs["gbitops"].mean())
    assert means == sorted(means)
    assert means[0] < means[-1]
    assert run(images)["choices"].tolist() == logits.argmax(-1).tolist()


def test_a_price_changes_the_detections_of_the_adaptive_model() -> None:
    found, images = model("network"), random_images(1, seed=3)
    run = Session(adaptive_model(found))
    for point, level in ((found.prices[0], 0), (found.prices[-1], 2)):
        outputs = run(images, price=np.array([point.price], np.float32))
        assert outputs["choices"].tolist() == [level]
        check_detections(found, outputs, images, torch.tensor([[level]]))


def test_metadata_name_classes_choices_and_prices() -> None:
    found = model("network")
    properties = {entry.key: entry.value for entry in adaptive_model(found).metadata_props}
    assert properties.pop("format") == "instaqnas 1"
    assert properties.pop("kind") == "adaptive"
    assert properties.pop("form") == "exact"
    values = {key: json.loads(value) for key, value in properties.items()}
    assert values == {
        "class_names": ["disc", "ring", "star"],
        "image_size": SIDE,
        "choice_names": ["w2a2", "w4a4", "w8a8"],
        "positions": ["network"],
        "policy_gbitops": found.policy_gbitops,
        "prices": [[point.price, point.gbitops] for point in found.prices],
        "score_threshold": 0.2,
    }


@pytest.mark.parametrize("name", QUICK)
def test_models_are_valid_onnx(name: str) -> None:
    onnx.checker.check_model(adaptive_model(model(name)), full_check=False)
