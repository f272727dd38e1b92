"""Weights of other projects: the same outputs as in their own code, and every key accounted for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instaqnas.detector.pretrained import LoadReport, load_pretrained
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError
from tests.plain_ssd import PytorchSSD, TimmMobileNet, backbone, trained

BACKBONE_VALUES = 27 * 5  # a weight and four of BatchNorm
HEADS_AND_EXTRAS = 2 * (8 + 12)  # weights and biases
Save = Callable[[object], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def run(state: object, **options: bool) -> Path:
        torch.save(state, tmp_path / "weights.pth", **options)
        return tmp_path / "weights.pth"

    return run


def detector(classes: int = 21, *, image_size: int = 300, width: float = 1.0, **settings: bool) -> SwitchableSSD:
    torch.manual_seed(5)
    bits = DetectorBits.full_precision()
    return SwitchableSSD(classes, bits, image_size=image_size, width=width, **settings).eval()


def small() -> SwitchableSSD:
    return detector(3, image_size=64, width=0.25)


def small_state() -> dict[str, Tensor]:
    return PytorchSSD(3, 0.25).state_dict()


def random_images(size: int) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def as_input(images: Tensor) -> Tensor:
    """The input of both projects' networks: (x - 127) / 128, RGB."""
    return (images.float() - 127) / 128


def last_map(network: SwitchableSSD, images: Tensor) -> Tensor:
    return network.backbone(as_input(images), {})[-1].value().relu()


def refusal(network: SwitchableSSD, path: Path) -> str:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_pretrained(network, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return str(caught.value).removeprefix(f"{path}: ")


# --- The same function ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("image_size", [300, 112])
def test_a_pytorch_ssd_detector_gives_the_same_outputs_here(save: Save, image_size: int) -> None:
    plain, images = trained(PytorchSSD(21)), random_images(image_size)
    ours = detector(image_size=image_size)
    load_pretrained(ours, save(plain.state_dict()))
    output = ours(images, torch.zeros(2, 13, dtype=torch.int64))
    logits, offsets = plain(as_input(images))
    assert logits.std() > 0.1
    torch.testing.assert_close(output.class_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.box_offsets, offsets, rtol=1e-5, atol=1e-5)


class Classifier(nn.Module):
    """The ImageNet network of pytorch-ssd."""

    def __init__(self) -> None:
        super().__init__()
        self.model = backbone()
        self.fc = nn.Linear(1024, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@torch.no_grad()
@pytest.mark.parametrize("build", [backbone, Classifier, TimmMobileNet])
def test_an_imagenet_backbone_gives_the_same_features_here(save: Save, build: Callable[[], nn.Module]) -> None:
    plain, images, ours = trained(build()), random_images(96), detector(image_size=96)
    load_pretrained(ours, save(plain.state_dict()))
    features = plain(as_input(images))
    assert features.std() > 0.1
    torch.testing.assert_close(last_map(ours, images), features, rtol=1e-5, atol=1e-5)


def test_timm_still_uses_these_names() -> None:
    """With the real package, where it is installed."""
    timm = pytest.importorskip("timm")
    real = timm.create_model("mobilenetv1_100", pretrained=False).state_dict()
    assert {key: value.shape for key, value in TimmMobileNet().state_dict().items()} == {
        key: value.shape for key, value in real.items()
    }


def test_the_older_format_of_torch_save_is_read(save: Save) -> None:
    state = trained(PytorchSSD(3, 0.25)).state_dict()
    ours = small()
    load_pretrained(ours, save(state, _use_new_zipfile_serialization=False))
    assert torch.equal(ours.class_heads[5].bias, state["classification_headers.5.bias"])


# --- The report -------------------------------------------------------------------------------------------------------


def accounted(report: LoadReport, state: dict[str, Tensor], network: SwitchableSSD) -> bool:
    keys, values = [*report.loaded, *report.skipped], [*report.loaded.values(), *report.missing]
    return sorted(keys) == sorted(state) and sorted(values) == sorted(network.state_dict())


def test_every_key_of_a_detector_is_loaded_or_a_batch_counter(save: Save) -> None:
    state, ours = small_state(), small()
    report = load_pretrained(ours, save(state))
    assert accounted(report, state, ours)
    assert len(report.loaded) == BACKBONE_VALUES + HEADS_AND_EXTRAS
    assert all(key.endswith("num_batches_tracked") for key in report.skipped)
    assert str(report) == (
        "MobileNetV1-SSD of pytorch-ssd: 175 keys loaded; 27 skipped: 27 batch counters "
        "(base_net.0.1.num_batches_tracked, base_net.1.1.num_batches_tracked, base_net.1.4.num_batches_tracked, "
        "base_net.2.1.num_batches_tracked, base_net.2.4.num_batches_tracked, ...); 0 values left unchanged"
    )


@pytest.mark.parametrize("build", [backbone, Classifier, TimmMobileNet])
def test_a_backbone_leaves_extras_and_heads_unchanged(save: Save, build: Callable[[], nn.Module]) -> None:
    state, ours = build().state_dict(), detector()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    report = load_pretrained(ours, save(state))
    assert accounted(report, state, ours)
    assert len(report.loaded) == BACKBONE_VALUES
    assert all(torch.equal(before[name], ours.state_dict()[name]) for name in report.missing)
    assert str(report).endswith("; 40 values left unchanged: 16 of extras, 12 of box_heads, 12 of class_heads")
    assert ("2 of the ImageNet classifier" in str(report)) == (build is not backbone)


def test_a_key_that_is_unknown_is_named(save: Save) -> None:
    report = load_pretrained(small(), save({**small_state(), "source_layer_add_ons.0.weight": torch.zeros(1)}))
    assert report.skipped["source_layer_add_ons.0.weight"] == "unknown"
    assert "1 unknown (source_layer_add_ons.0.weight)" in str(report)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_another_shape_is_an_error_that_names_the_key_and_both_shapes(save: Save) -> None:
    other_classes = detector(4, image_size=64, width=0.25)
    message = "classification_headers.0.weight: shape [18, 128, 3, 3], but the network needs [24, 128, 3, 3]"
    assert refusal(other_classes, save(small_state())) == message
    wider = detector(3, image_size=64, width=0.5)
    message = "base_net.0.0.weight: shape [8, 3, 3, 3], but the network needs [16, 3, 3, 3]"
    assert refusal(wider, save(small_state())) == message
    state = {**small_state(), "base_net.7.4.running_var": torch.ones(1)}  # would broadcast to all channels
    assert refusal(small(), save(state)) == "base_net.7.4.running_var: shape [1], but the network needs [128]"


def test_a_missing_key_is_an_error(save: Save) -> None:
    state = small_state()
    del state["extras.3.2.bias"]
    message = "extras.3.2.bias: missing, so the file is not a complete MobileNetV1-SSD of pytorch-ssd"
    assert refusal(small(), save(state)) == message


def test_biases_do_not_fit_where_this_network_has_batch_norm(save: Save) -> None:
    ours = detector(3, image_size=64, width=0.25, extras_batch_norm=True)
    message = "extras.0.0.bias: this network has BatchNorm instead; set detector.extras_batch_norm to false"
    assert refusal(ours, save(small_state())) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stage": "search"}, "a checkpoint of this program; search.py and finetune.py take it with --init"),
        ({"features.0.weight": torch.zeros(1)}, "weights in no known format (first keys: features.0.weight); known: "),
        ({"conv_stem.weight": 3}, "not a state dict with a tensor for every key"),
        ([torch.zeros(1)], "not a state dict with a tensor for every key"),
        ({}, "weights in no known format (first keys: none); known: "),
    ],
)
def test_other_content_is_an_error(save: Save, content: object, message: str) -> None:
    assert refusal(small(), save(content)).startswith(message)


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_a_file_that_would_run_code_is_not_opened(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(small(), save({"conv_stem.weight": Harmful()})).startswith("not readable weights (")
    assert not (tmp_path / "harm").exists()


def test_files_that_are_absent_or_damaged_are_errors(save: Save, tmp_path: Path) -> None:
    assert refusal(small(), tmp_path / "absent.pth") == "no such file"
    path = save(small_state())
    content = path.read_bytes()
    value = content.index(weight_bytes(path))
    path.write_bytes(content[:value] + bytes([content[value] ^ 1]) + content[value + 1 :])
    assert refusal(small(), path).startswith("damaged (checksum of weights/data/")
    for damaged in (content[: len(content) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        assert refusal(small(), path).startswith("not readable weights (")


def weight_bytes(path: Path) -> bytes:
    """The bytes of a weight in the file."""
    return torch.load(path, weights_only=True)["base_net.5.3.weight"].numpy().tobytes()
