"""The counter of MACs and GBitOps against figures worked out by hand for the published setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instaqnas.data.voc import VOC_CLASSES
from instaqnas.tools.profile import class_names_of, main

VOC_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "voc_paper.yaml"


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> dict:
    """The output of --json without data."""
    monkeypatch.chdir(tmp_path)
    main(["--config", str(VOC_CONFIG), "--json"])
    return json.loads(capsys.readouterr().out)


def voc_tree(root: Path, labels: str | None = None) -> str:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    if labels is not None:
        (root / "labels.txt").write_text(labels)
    return str(root)


def mobilenet_ssd_params(classes: int) -> int:
    """Weights, BatchNorm's two values a channel, and biases, layer by layer."""
    params, channels = 3 * 32 * 9 + 2 * 32, 32
    for out in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):
        params += channels * 9 + 2 * channels + channels * out + 2 * out
        channels = out
    for inner, out in ((256, 512), (128, 256), (128, 256), (128, 256)):
        params += channels * inner + inner + inner * out * 9 + out
        channels = out
    for source in (512, 1024, 512, 256, 256, 256):
        outputs = 6 * 4 + 6 * classes
        params += source * outputs * 9 + outputs
    return params


def test_detector_of_the_paper_has_the_known_macs_and_gbitops(counted: dict) -> None:
    assert list(counted) == ["macs", "params", "gbitops", "policy", "weight_bytes", "layers"]
    assert counted["macs"] == 1_526_986_688
    assert counted["gbitops"] == {
        "all_8_8": 97.727148032,
        "all_4_4": 24.431787008,
        "uniform": {"w3a4": 42.54570496, "w4a4": 46.561882112, "w5a4": 50.578059264},
    }


def test_params_are_those_of_the_full_precision_detector(counted: dict) -> None:
    assert counted["params"] == mobilenet_ssd_params(21)


def test_policy_is_counted_apart(counted: dict) -> None:
    # (side of the output, channels in, channels out, side of the kernel); the input is 300 / 2 = 150 pixels a side
    layers = [
        (75, 3, 16, 7),
        *[(38, 16, 16, 3)] * 2,
        *[(19, 16, 32, 3), (19, 32, 32, 3), (19, 16, 32, 1)],
        *[(10, 32, 64, 3), (10, 64, 64, 3), (10, 32, 64, 1)],
        *[(5, 64, 128, 3), (5, 128, 128, 3), (5, 64, 128, 1)],
        (1, 128, 13 * 3, 1),
    ]
    macs = sum(side**2 * inputs * outputs * kernel**2 for side, inputs, outputs, kernel in layers)
    assert counted["policy"] == {"macs": macs, "gbitops": macs * 64 / 1e9}


def test_table_names_every_layer_and_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--config", str(VOC_CONFIG)])
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines() if line]
    groups = {row[0]: row[1] for row in rows if row[0] in ("stem", "depthwise", "pointwise", "extras", "heads")}
    assert groups == {
        "stem": "19,440,000",
        "depthwise": "31,722,048",
        "pointwise": "1,004,044,288",
        "extras": "61,898,752",
        "heads": "409,881,600",
    }
    assert sum("." in row[0] for row in rows if row[0][0].isalpha()) == 1 + 26 + 8 + 12
    # 150 x 150 outputs of 32 inputs by 64: 46.08 million, times 12, 16 and 20
    first_pointwise = next(row for row in rows if row[0] == "backbone.blocks.0.pointwise")
    figures = ["46,080,000", "2,176", "w3a4", "w4a4", "w5a4", "0.5530", "0.7373", "0.9216", "768", "1,024", "1,280"]
    assert first_pointwise[1:] == figures  # the bytes are 2,048 weights of 3, 4 and 5 bits
    weights, channels = {8: 3 * 32 * 9, 12: 0, 4: 0}, 32  # by the bits that are stored of one: 3 + 4 + 5 = 12
    for out in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):
        weights[8] += channels * 9
        weights[12] += channels * out  # 3 + 4 + 5 bits, or nested 5
        channels = out
    for inner, out in ((256, 512), (128, 256), (128, 256), (128, 256)):
        weights[4] += channels * inner + inner * out * 9
        channels = out
    weights[8] += (512 + 1024 + 512 + 3 * 256) * 150 * 9
    total = sum(bits * count for bits, count in weights.items()) // 8
    assert ["weights", "as", "packed", f"{total:,}"] in rows
    main(["--config", str(VOC_CONFIG), "--bits.weights", "nested"])
    total -= weights[12] * (3 + 4) // 8
    assert ["weights", "as", "packed", f"{total:,}"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["positions", "w5a4", "50.5781"] in rows
    assert "data/VOCdevkit/VOC2007" in captured.err


def test_settings_can_be_overridden(capsys: pytest.CaptureFixture) -> None:
    main(["--config", str(VOC_CONFIG), "--json", "--bits.choices", "[[8, 8]]", "--bits.extras", "[8, 8]"])
    gbitops = json.loads(capsys.readouterr().out)["gbitops"]
    assert gbitops["uniform"] == {"w8a8": gbitops["all_8_8"]}


def test_one_configuration_is_counted(capsys: pytest.CaptureFixture) -> None:
    names = ["w5a4", *["w3a4"] * 12]
    main(["--config", str(VOC_CONFIG), "--json", "--configuration", ",".join(names)])
    found = json.loads(capsys.readouterr().out)
    choices = {f"backbone.blocks.{block}.pointwise": name for block, name in enumerate(names)}
    # all at w3a4, and the first pointwise layer, 46.08 million MACs, at two weight bits more
    gbitops = pytest.approx(42.54570496 + 46.08e6 * 2 * 4 / 1e9)
    assert found["configuration"] == {"choices": choices, "gbitops": gbitops}
    assert found["gbitops"]["uniform"] == {"w3a4": 42.54570496, "w4a4": 46.561882112, "w5a4": 50.578059264}
    assert {layer["name"]: layer["bits"] for layer in found["layers"] if layer["name"] in choices} == {
        name: [choice] for name, choice in choices.items()
    }
    main(["--config", str(VOC_CONFIG), "--configuration", "w4a4"])
    assert ["configuration", "46.5619"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_layers_are_counted_one_by_one(counted: dict) -> None:
    layers = {layer.pop("name"): layer for layer in counted["layers"]}
    assert len(layers) == 1 + 26 + 8 + 12
    assert sum(layer["macs"] for layer in layers.values()) == counted["macs"]
    assert sum(layer["params"] for layer in layers.values()) == counted["params"]
    assert sum(sum(layer["weight_bytes"]) for layer in layers.values()) == counted["weight_bytes"]
    assert layers["backbone.blocks.0.pointwise"] == {  # 150 x 150 outputs of 32 inputs by 64
        "macs": 46_080_000,
        "params": 2_176,
        "bits": ["w3a4", "w4a4", "w5a4"],
        "gbitops": [0.55296, 0.73728, 0.9216],
        "weight_bytes": [768, 1024, 1280],
    }


def test_nested_weights_take_the_bytes_of_the_widest_choice_at_any_configuration(capsys: pytest.CaptureFixture) -> None:
    totals = set()
    for words in ([], ["--configuration", "w3a4"], ["--configuration", "w5a4"]):
        main(["--config", str(VOC_CONFIG), "--json", "--bits.weights", "nested", *words])
        found = json.loads(capsys.readouterr().out)
        totals.add(found["weight_bytes"])
        [pointwise] = [layer for layer in found["layers"] if layer["name"] == "backbone.blocks.0.pointwise"]
        assert pointwise["weight_bytes"] == [1280]  # 2,048 weights of 5 bits
    assert len(totals) == 1
    main(["--config", str(VOC_CONFIG), "--json", "--configuration", "w3a4"])
    [pointwise] = [
        layer
        for layer in json.loads(capsys.readouterr().out)["layers"]
        if layer["name"] == "backbone.blocks.0.pointwise"
    ]
    assert pointwise["weight_bytes"] == [768]


@pytest.mark.parametrize("configuration", ["w2a2", "w3a4,w4a4", ""])
def test_wrong_configuration_is_one_line_and_status_2(configuration: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(VOC_CONFIG), "--configuration", configuration])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --configuration: expected ")


@pytest.mark.parametrize("option", ["--bits=static", "--run=runs/x", "--init=x.pt"])
def test_options_of_a_stage_are_refused(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(VOC_CONFIG), option])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {option.partition('=')[0]}: this tool has no such option\n"


def test_classes_come_from_the_roots_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert class_names_of([voc_tree(tmp_path / "cells", "red\nwhite\n")]) == ("red", "white")
    assert class_names_of([voc_tree(tmp_path / "VOC2007")]) == VOC_CLASSES
    assert capsys.readouterr().err == ""
    assert class_names_of([str(tmp_path / "gone"), str(tmp_path / "cells")]) == ("red", "white")
    assert f"no such folder: {tmp_path}/gone;" in capsys.readouterr().err


def test_wrong_config_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(tmp_path / "none.yaml")])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: No such file or directory\n"
