"""Packing a run: the file holds the networks of the run's checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.reading import from_plain
from instaqnas.deploy.packed import Architecture, load_packed
from instaqnas.detector.ssd import DetectorBits
from instaqnas.quant.integer import to_integer
from instaqnas.tools.pack import architecture_of, main
from instaqnas.training.stages import Experiment

BITS = {
    "choices": [[2, 2], [4, 3]],
    "positions": "backbone+extras",
    "stem": [8, 7],
    "depthwise": [7, 8],
    "extras": [5, 4],
    "heads": [6, 8],
    "weights": "nested",
    "quantizer": "lsq",
    "per_channel": True,
}
SETTINGS = {
    "detector": {
        "image_size": 64,
        "width": 0.125,
        "extras_batch_norm": True,
        "box_sizes": [[5 + 7 * k, 12 + 7 * k] for k in range(6)],
    },
    "bits": BITS,
    "policy": {"pool": 4, "width": 3, "bits": [6, 5]},
}


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """A folder with `tiny.yaml` and the finetuned run `runs/tiny`."""
    return make_run(SETTINGS)


def pack(folder: Path, *words: str | Path) -> None:
    main(["--config", str(folder / "tiny.yaml"), *map(str, words)])


def test_the_architecture_follows_the_config() -> None:
    assert architecture_of(from_plain({"data": {"roots": ["none"]}, **SETTINGS})) == Architecture(
        DetectorBits(
            choices=[(2, 2), (4, 3)],
            positions="backbone+extras",
            stem=(8, 7),
            depthwise=(7, 8),
            extras=(5, 4),
            heads=(6, 8),
            weights="nested",
            quantizer="lsq",
            per_channel=True,
        ),
        image_size=64,
        width=0.125,
        extras_batch_norm=True,
        policy_pool=4,
        policy_width=3,
        policy_bits=(6, 5),
        policy_input="image",
        policy_effort=False,
    )


@torch.no_grad()
def test_the_file_holds_the_networks_of_the_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "packed.pt"
    pack(folder, "--run", folder / "runs" / "tiny", "--out", path)
    state = load_checkpoint(folder / "runs" / "tiny" / "finetune" / "last.pt")
    parameters = sum(value.numel() for name, value in state["networks"]["detector"].items() if ".running_" not in name)
    written = re.fullmatch(
        r"(.*): ([\d,]+) bytes \(the detector's float32 parameters: ([\d,]+)\)\n", capsys.readouterr().out
    )
    assert written[1] == str(path)
    assert [int(figure.replace(",", "")) for figure in written.groups()[1:]] == [path.stat().st_size, 4 * parameters]

    model = load_packed(path)
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    detector, policy = experiment.quantized_detector(), experiment.policy()
    detector.load_state_dict(state["networks"]["detector"])
    policy.load_state_dict(state["networks"]["policy"])
    images = next(iter(experiment.test_loader())).images
    choices = torch.arange(len(detector.positions))[None] % 2
    expected, found = to_integer(detector)(images, choices), model.detector(images, choices)
    assert torch.equal(found.box_offsets, expected.box_offsets)
    assert torch.equal(found.class_logits, expected.class_logits)
    assert torch.equal(model.policy(images), to_integer(policy)(images))
    assert torch.equal(model.detector.default_boxes_cxcywh, detector.default_boxes_cxcywh)
    assert model.class_names == tuple(state["classes"])


def test_a_checkpoint_that_is_named_is_packed(folder: Path, tmp_path: Path) -> None:
    pack(folder, "--run", folder / "runs" / "tiny", "--out", tmp_path / "latest.pt")
    checkpoint = folder / "runs" / "tiny" / "finetune" / "last.pt"
    pack(folder, "--run", tmp_path / "none", "--init", checkpoint, "--out", tmp_path / "named.pt")
    latest, named = (load_checkpoint(tmp_path / name)["networks"]["detector"] for name in ("latest.pt", "named.pt"))
    for name, layer in latest.items():
        assert torch.equal(named[name]["streams"][0], layer["streams"][0])
        assert torch.equal(named[name]["scale"], layer["scale"])


def refusal(capsys: pytest.CaptureFixture, status: int, folder: Path, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        pack(folder, *words)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_an_untrained_run_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = refusal(capsys, 2, folder, "--run", tmp_path / "none", "--out", tmp_path / "packed.pt")
    assert "none/search: no checkpoint; run search.py first" in message
    assert not (tmp_path / "packed.pt").exists()


def test_other_bits_than_the_run_was_trained_with_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--run", folder / "runs" / "tiny", "--out", tmp_path / "packed.pt", "--bits.heads", "[8, 8]"]
    assert "trained with other settings: bits.heads" in refusal(capsys, 2, folder, *words)
    assert not (tmp_path / "packed.pt").exists()


def test_the_folder_of_the_file_is_made_and_the_data_need_not_be_there(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "packed.pt"
    pack(folder, "--run", folder / "runs" / "tiny", "--out", path, f"--data.roots=[{tmp_path}/none]")
    assert list(path.parent.iterdir()) == [path]
    assert len(load_checkpoint(path)["classes"]) == 8


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_in_the_place_of_the_file_is_refused(folder: Path, out: str, capsys: pytest.CaptureFixture) -> None:
    message = refusal(capsys, 2, folder, "--run", folder / "runs" / "tiny", "--out", out)
    assert message == f"error: --out {out}: is a folder, expected a file\n"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instaqnas.tools.pack.Experiment", None)
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "packed.pt"
    message = refusal(capsys, 2, folder, "--run", folder / "runs" / "tiny", "--out", path)
    assert message.startswith(f"error: {path}: cannot be written: ")


@pytest.mark.parametrize("bits", ["fp32", "uniform:w2a2", "all"])
def test_other_ways_to_choose_bits_are_refused(folder: Path, bits: str, capsys: pytest.CaptureFixture) -> None:
    message = refusal(capsys, 2, folder, "--out", "packed.pt", "--bits", bits)
    assert message == f"error: --bits {bits}: here the policy chooses the bits; eval.py compares other ways\n"
