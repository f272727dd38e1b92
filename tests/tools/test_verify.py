"""The check of integer inference reports no difference for equal networks, and every change made to one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.reading import from_plain
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.experiment.handover import Checkpoint
from instaqnas.quant.integer import IntegerConv2d, to_integer
from instaqnas.quant.switchable import SwitchableConv2d
from instaqnas.tools import verify
from instaqnas.training.stages import Experiment

IMAGES = 3
SETTINGS = {
    "detector": {"image_size": 64, "width": 0.125, "extras_batch_norm": True},
    "bits": {"choices": [[2, 3], [4, 4]], "weights": "nested"},
    "policy": {"pool": 4, "width": 4},
    "eval": {"batch_size": 2},
    "runtime": {"compile": "off"},
}


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """Has `tiny.yaml` and `runs/tiny`, a finished run of untrained networks."""
    return make_run(SETTINGS, test_images=IMAGES)


@pytest.fixture
def run_verify(folder: Path, capsys: pytest.CaptureFixture) -> Callable[..., dict]:
    def run(*words: str) -> dict:
        try:
            verify.main(["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny"), *words])
            status = 0
        except SystemExit as exit_:
            status = exit_.code
        return {"status": status, **json.loads(capsys.readouterr().out)}

    return run


class LayerCounter:
    """Counts the integers that enter the layers of a fake-quantized network, and keeps the largest sum."""

    def __init__(self, network: nn.Module) -> None:
        self.levels, self.largest = 0, 0.0
        for layer in network.modules():
            if isinstance(layer, SwitchableConv2d):
                layer.register_forward_hook(self._add)

    def _add(self, _layer: nn.Module, args: tuple, output: tuple) -> None:
        self.levels += args[0].shape.numel()
        self.largest = max(self.largest, output[0].abs().max().item())


@torch.no_grad()
def test_nothing_differs_and_everything_was_compared(folder: Path, run_verify: Callable[..., dict]) -> None:
    found = run_verify("--random", "2")
    assert found["status"] == 0
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    networks = load_checkpoint(folder / "runs" / "tiny" / "finetune" / "last.pt")["networks"]
    detector, policy = experiment.quantized_detector().eval(), experiment.policy().eval()
    detector.load_state_dict(networks["detector"])
    policy.load_state_dict(networks["policy"])
    counters = [LayerCounter(detector), LayerCounter(policy)]
    for batch in experiment.test_loader():
        detector(batch.images, policy(batch.images).argmax(-1))
    nothing = {"different_levels": {}, "images_with_different_detections": 0, "images_with_different_choices": 0}
    assert nothing.items() <= found["policy"].items()
    assert nothing.items() <= found["random"].items()
    assert found["policy"]["images"] == IMAGES
    assert found["random"]["images"] == 2 * IMAGES
    assert found["policy"]["levels"] == counters[0].levels + counters[1].levels
    assert found["random"]["levels"] == 2 * counters[0].levels
    assert found["policy"]["largest_sum"] == max(counter.largest for counter in counters)
    assert 0 < found["random"]["largest_sum"] < found["exact_up_to"] == 2**24
    assert found["policy"]["detections"] > 0
    assert found["random"]["detections"] > 0


@torch.no_grad()
def test_nothing_differs_with_a_policy_on_the_stem(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    settings = {**SETTINGS, "policy": {"input": "stem", "pool": 8, "width": 4}}
    folder = make_run(settings, test_images=IMAGES)
    verify.main(["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny"), "--random", "1"])
    found = json.loads(capsys.readouterr().out)
    for result in (found["policy"], found["random"]):
        assert result["different_levels"] == {}
        assert result["images_with_different_choices"] == result["images_with_different_detections"] == 0
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    networks = load_checkpoint(folder / "runs" / "tiny" / "finetune" / "last.pt")["networks"]
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
    detector.load_state_dict(networks["detector"])
    policy.load_state_dict(networks["policy"])
    counters = [LayerCounter(detector), LayerCounter(policy)]
    for batch in experiment.test_loader():
        choices = policy(detector.observe(batch.images).input).argmax(-1)
        detector(batch.images, choices, detector.observe(batch.images).stem)
    counted_twice = IMAGES * 3 * 64 * 64  # the stem ran twice above, once in the tool
    assert found["policy"]["levels"] == counters[0].levels + counters[1].levels - counted_twice


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, change: Callable[[IntegerConv2d], None]) -> None:
    """Applies `change` to one layer of the integer form of the detector or the policy."""

    def spoilt(network: nn.Module, prefix: str) -> nn.Module:
        network = to_integer(network, prefix)
        if isinstance(network, SwitchableSSD) == (kind == "detector"):
            change(network.get_submodule(name))
        return network

    monkeypatch.setattr(verify, "to_integer", spoilt)


def test_another_scale_is_found_in_the_layers_behind_it(
    run_verify: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "detector", "backbone.blocks.11.pointwise", lambda layer: layer.scale.mul_(1.1))
    found = run_verify("--random", "1")
    assert found["status"] == 1
    for result in (found["policy"], found["random"]):
        names = set(result["different_levels"])
        before = ("backbone.stem", *(f"backbone.blocks.{block}." for block in range(12)))
        assert "backbone.blocks.12.depthwise" in names
        assert not [name for name in names if name.startswith((*before, "box_heads.0", "class_heads.0", "policy"))]
        assert result["images_with_different_detections"] == result["images"] == IMAGES
        assert result["images_with_different_choices"] == 0


def test_other_scores_are_found_where_all_integers_agree(
    run_verify: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "detector", "class_heads.0", lambda layer: layer.scale.mul_(1.001))
    found = run_verify("--random", "0")
    assert found["status"] == 1
    assert found["policy"]["different_levels"] == {}
    assert found["policy"]["images_with_different_detections"] > 0
    assert found["random"]["images"] == 0


def test_other_choices_of_the_policy_are_found(
    run_verify: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def least_likely(layer: IntegerConv2d) -> None:
        layer.scale.neg_()
        layer.shift.neg_()

    spoil(monkeypatch, "policy", "head", least_likely)
    found = run_verify("--random", "1")
    assert found["status"] == 1
    assert found["policy"]["images_with_different_choices"] == IMAGES
    assert found["random"]["images_with_different_choices"] == 0
    assert found["policy"]["different_levels"] == {}
    assert found["policy"]["images_with_different_detections"] == 0


def test_a_wrong_integer_is_counted_in_its_layer(
    run_verify: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_higher(layer: IntegerConv2d) -> None:
        levels = layer.levels

        def wrong(*args: object) -> torch.Tensor:
            found = levels(*args).clone()
            found[:, 0, 0, 0] += 1
            return found

        layer.levels = wrong

    spoil(monkeypatch, "policy", "blocks.3.shortcut", one_higher)
    found = run_verify("--random", "0")
    assert found["status"] == 1
    assert found["policy"]["different_levels"]["policy.blocks.3.shortcut"] == IMAGES


def test_half_a_level_too_much_is_counted(run_verify: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off to an integer, the wrong level would equal the right one."""

    def half_higher(_module: nn.Module, _args: tuple, output: tuple) -> tuple:
        return output[0] + 0.5 * output[0].sign(), output[1]

    load = Checkpoint.load

    def spoilt(source: Checkpoint, experiment: Experiment, network: nn.Module, name: str, *args: object) -> None:
        load(source, experiment, network, name, *args)
        if name == "detector":
            network.box_heads[0].input_quantizer.register_forward_hook(half_higher)

    monkeypatch.setattr(Checkpoint, "load", spoilt)
    found = run_verify("--random", "0")
    assert found["status"] == 1
    assert set(found["policy"]["different_levels"]) == {"box_heads.0"}


def test_passes_are_compiled_as_the_setting_says_and_a_note_tells_of_no_random_configurations(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(verify, "compile_passes", modes.append)
    monkeypatch.setattr(verify, "verify", lambda *_: {})
    named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
    verify.main([*named, "--runtime.compile", "on"])
    assert capsys.readouterr().err == ""
    verify.main([*named, "--random", "0"])
    assert capsys.readouterr().err == "note: --random 0: no random configuration has been compared\n"
    assert modes == ["on", "off"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--random", "-1"], "--random: expected at least 0, got -1"),
        (["--bits", "random"], "--bits random: here the policy chooses the bits; eval.py compares other ways"),
    ],
)
def test_wrong_options_are_refused(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--config", str(folder / "tiny.yaml"), *words])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_an_untrained_run_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        verify.main(["--config", str(folder / "tiny.yaml"), "--run", str(tmp_path / "none")])
    assert exit_.value.code == 2
    assert "none/search: no checkpoint; run search.py first" in capsys.readouterr().err
