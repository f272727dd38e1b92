"""The program of docs/deployment.md, run as it stands there where torch cannot be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from instaqnas.config.settings import EvalConfig
from instaqnas.deploy.predictor import Predictor
from tests.deploy.onnx_models import CLASSES, SIDE, model, random_images

pytest.importorskip("onnx", reason="onnx is not installed: scripts/setup.sh --deploy")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/setup.sh --deploy")

from instaqnas.deploy.onnx_export import adaptive_model, save_model  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"
IMAGES = 20


def program() -> str:
    (text,) = [
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "onnxruntime" in text
    ]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, an exported detector, images of the network's size, and a module `torch` that cannot be imported."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "detect.py").write_text(program())
    (folder / "torch.py").write_text("raise ImportError('torch is not there')\n")
    save_model(adaptive_model(replace(model("network"), settings=EvalConfig(score_threshold=0.05))), folder / "x.onnx")
    for number, image in enumerate(random_images(IMAGES, seed=3)):
        cv2.imwrite(str(folder / f"{number}.png"), image.permute(1, 2, 0).numpy()[..., ::-1])
    return folder


def test_the_program_is_short() -> None:
    assert len([line for line in program().splitlines() if line.strip()]) <= 40


def test_its_boxes_are_those_of_predict(folder: Path) -> None:
    names = [f"{number}.png" for number in range(IMAGES)]
    words = [sys.executable, "detect.py", "x.onnx", *names]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    found: dict[str, list[tuple]] = {name: [] for name in names}
    for path, label, score, *box, gbitops, _ in map(str.split, done.stdout.splitlines()):
        found[path].append((label, float(score), [float(value) for value in box], float(gbitops)))
    whole = model("network")
    predictor = Predictor(
        whole.detector,
        whole.policy,
        whole.costs,
        whole.policy_gbitops,
        CLASSES,
        EvalConfig(score_threshold=0.05),
        torch.device("cpu"),
    )
    assert sum(map(len, found.values())) >= IMAGES
    for name in names:
        expected = predictor(folder / name, 0.3)
        assert len(found[name]) == len(expected.names)
        left = list(found[name])
        for label, score, box in zip(
            expected.names, expected.scores.tolist(), expected.boxes_xyxy.tolist(), strict=True
        ):
            near = [item for item in left if item[0] == label and abs(item[1] - score) < 1e-3]
            near = [item for item in near if np.abs(np.array(item[2]) - box).max() < 1]
            assert near
            assert near[0][3] == pytest.approx(expected.gbitops, rel=1e-3)
            left.remove(near[0])
        assert (folder / f"{name}.detections.png").exists()


@pytest.mark.parametrize("height, width", [(100, 80), (40, 200), (SIDE, SIDE), (333, 50)])
def test_it_resizes_as_the_project_to_one_grey_level(height: int, width: int) -> None:
    names: dict = {}
    exec(program().partition("options =")[0], names)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = v2.functional.resize(image, [SIDE, SIDE], antialias=True).permute(1, 2, 0).int()
    resized = torch.from_numpy(names["resized"](image.permute(1, 2, 0).numpy(), SIDE)).int()
    assert (resized - expected).abs().max() <= 1
    if (height, width) == (SIDE, SIDE):
        assert torch.equal(resized, expected)
