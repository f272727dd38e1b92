"""The export tool writes files that onnxruntime runs, verify finds what differs, and wrong input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from instaqnas.deploy import onnx_session
from instaqnas.deploy.onnx_session import OnnxModel
from instaqnas.errors import InputError
from instaqnas.tools import export, pack, verify

onnx = pytest.importorskip("onnx", reason="onnx is not installed: scripts/setup.sh --deploy")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: scripts/setup.sh --deploy")

SETTINGS = {
    "detector": {"image_size": 64, "width": 0.125, "extras_batch_norm": True},
    "bits": {"choices": [[2, 2], [4, 4]], "positions": "network"},
    "policy": {"pool": 4, "width": 4},
    "eval": {"batch_size": 2},
    "runtime": {"compile": "off"},
}
IMAGES = 3


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """Has `tiny.yaml`, `runs/tiny`, and `detector.onnx` exported from it."""
    folder = make_run(SETTINGS, test_images=IMAGES)
    export.main([*named(folder), "--out", str(folder / "detector.onnx")])
    return folder


def named(folder: Path) -> list[str]:
    return ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]


def run_verify(folder: Path, file: Path, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict]:
    capsys.readouterr()
    try:
        verify.main([*named(folder), "--onnx", str(file), *words])
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    return status, json.loads(capsys.readouterr().out)


def test_nothing_differs_in_an_exported_file(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status, found = run_verify(folder, folder / "detector.onnx", capsys, "--random", "1")
    assert status == 0
    for result in (found["policy"], found["random"]):
        assert result["different_levels"] == {}
        assert result["images"] == IMAGES
        assert result["levels"] > IMAGES * 64 * 64 * 3
        assert result["detections"] > 0
        assert result["images_with_different_detections"] == result["images_with_different_choices"] == 0
    assert found["form"] == "exact"
    assert found["policy"]["map_onnx"] == found["policy"]["map_integer"]


@pytest.mark.slow
def test_a_fused_file_reports_the_integers_that_differ(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "fused.onnx"
    export.main([*named(folder), "--out", str(path), "--form", "fused"])
    status, found = run_verify(folder, path, capsys, "--random", "0")
    assert found["form"] == "fused"
    different = found["policy"]["different_levels"]
    assert "backbone.stem" not in different
    assert (status == 1) == bool(different or found["policy"]["images_with_different_detections"])


def test_a_changed_scale_is_found_in_the_layers_behind_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    proto = onnx.load(folder / "detector.onnx")
    (choose,) = (node for node in proto.graph.node if node.op_type == "If" and node.name.startswith("network is 0"))
    for attribute in choose.attribute:
        nodes = attribute.g.node
        (levels,) = (n for n in nodes if n.output[0].startswith("levels of backbone.blocks.11.pointwise"))
        levels.op_type = "QuantizeLinear"
        constant = onnx.numpy_helper.from_array(np.float32(1.5), "another")
        attribute.g.initializer.append(constant)
        levels.input[1] = "another"
    onnx.save(proto, tmp_path / "changed.onnx")
    status, found = run_verify(folder, tmp_path / "changed.onnx", capsys, "--random", "1")
    assert status == 1
    for result in (found["policy"], found["random"]):
        assert "backbone.blocks.11.pointwise" in result["different_levels"]
        assert "backbone.blocks.12.depthwise" in result["different_levels"]
        assert "backbone.blocks.11.depthwise" not in result["different_levels"]
        assert not [name for name in result["different_levels"] if name.startswith("policy")]


def test_a_packed_file_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    pack.main([*named(folder), "--out", str(tmp_path / "packed.pt")])
    export.main(["--packed", str(tmp_path / "packed.pt"), "--out", str(tmp_path / "new" / "detector.onnx")])
    assert (tmp_path / "new" / "detector.onnx").read_bytes() == (folder / "detector.onnx").read_bytes()


def test_files_for_batches(folder: Path, tmp_path: Path) -> None:
    export.main([*named(folder), "--out", str(tmp_path), "--per-level"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.onnx", "w2a2.onnx", "w4a4.onnx"]
    export.main([*named(folder), "--out", str(tmp_path / "one.onnx"), "--fixed", "w4a4"])
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "w4a4.onnx").read_bytes()
    images = torch.randint(256, (5, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    choices = OnnxModel.load(tmp_path / "policy.onnx").run(images)["choices"]
    adaptive = OnnxModel.load(folder / "detector.onnx")
    levels = [OnnxModel.load(tmp_path / name).run(images) for name in ("w2a2.onnx", "w4a4.onnx")]
    for index, choice in enumerate(choices[:, 0]):
        alone = adaptive.run(images[index : index + 1])
        assert alone["choices"].tolist() == [choice]
        detections = len(alone["labels"])
        for name in ("boxes", "scores", "labels"):
            row = levels[choice][name][index]
            np.testing.assert_allclose(row[:detections], alone[name], rtol=0, atol=1e-6)
            assert not row[detections:].any()


@pytest.mark.parametrize(
    ("images", "price", "message"),
    [
        (
            np.zeros((1, 65, 64, 3), np.uint8),
            None,
            r"image: expected uint8 \[B, 64, 64, 3\], got uint8 \[1, 65, 64, 3\]",
        ),
        (np.zeros((1, 64, 64, 3), np.float32), None, r"image: expected uint8 .* got float32 \[1, 64, 64, 3\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), float("nan"), "price nan: expected a finite number"),
    ],
)
def test_wrong_inputs_are_refused(folder: Path, images: np.ndarray, price: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxModel.load(folder / "detector.onnx").run(images, price)


def test_prices_outside_the_table_are_refused(folder: Path) -> None:
    model = OnnxModel.load(folder / "detector.onnx")
    model.metadata["prices"] = [[2.0, 0.1], [-1.0, 0.3]]
    images = np.zeros((1, 64, 64, 3), np.uint8)
    assert model.run(images, 2.0)["choices"].shape == (1,)
    with pytest.raises(InputError, match=r"^price 2\.5: expected -1 to 2$"):
        model.run(images, 2.5)


def test_files_of_another_version_are_refused(folder: Path, tmp_path: Path) -> None:
    proto = onnx.load(folder / "detector.onnx")
    next(entry for entry in proto.metadata_props if entry.key == "format").value = "instaqnas 0"
    onnx.save(proto, tmp_path / "old.onnx")
    with pytest.raises(InputError, match=r"old\.onnx: not a file of this version"):
        OnnxModel.load(tmp_path / "old.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "detector.onnx").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.onnx: cannot be read"):
        OnnxModel.load(tmp_path / "cut.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fixed", "w9a9"], "error: --fixed w9a9: unknown choice; known: w2a2, w4a4"),
        (["--bits", "fp32"], "error: --bits fp32: here the policy chooses the bits; eval.py compares other ways"),
    ],
)
def test_wrong_options_are_refused(folder: Path, tmp_path: Path, error_of: Callable, words: list, message: str) -> None:
    assert error_of(export.main, [*named(folder), "--out", str(tmp_path / "x.onnx"), *words]) == message
    assert list(tmp_path.iterdir()) == []


def test_packed_files_take_no_settings(folder: Path, tmp_path: Path, error_of: Callable) -> None:
    words = ["--packed", "packed.pt", "--out", str(tmp_path / "x.onnx"), "--eval.nms_iou", "0.5"]
    assert error_of(export.main, words) == "error: --eval.nms_iou: not together with --packed, which needs no config"


def test_missing_packages_are_named_in_one_line(
    folder: Path, tmp_path: Path, error_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "PACKAGES", ("onnx", "no_such_package"))
    message = "error: no_such_package: not installed; scripts/setup.sh --deploy does it"
    assert error_of(export.main, [*named(folder), "--out", str(tmp_path / "x.onnx")]) == message
    assert error_of(verify.main, [*named(folder), "--onnx", "x.onnx"]) == message
