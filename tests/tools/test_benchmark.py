"""The networks that the benchmark compares with, its timing, and one run at a tiny size. No time is asserted."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from instaqnas.data.loader import Batch
from instaqnas.data.voc import VOC_CLASSES
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.metrics.voc import voc_map
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.switchable import SwitchableConv2d
from instaqnas.tools import benchmark
from instaqnas.tools.benchmark import (
    RATIOS,
    WARM_UPS,
    format_benchmark,
    main,
    measured_training_mib,
    medians_in_turn,
    ratios,
    voc07_records,
)
from instaqnas.tools.benchmark_rows import (
    CHOICES,
    PLANS,
    POSITIONS,
    Workload,
    fp32,
    initial_network,
    judge_batched,
    masked,
    ours,
    random_batch,
)
from instaqnas.tools.peers import BaselineSSD, MaskedBranches, TorchConv, detections_of_image, judge_in_loops

TINY = Workload(image_size=64, width=0.25, classes=4, choices=3, batch=3)
RATIO_KEYS = {
    "train_vs_fp32",
    "eval_vs_fp32",
    "integer_vs_fp32",
    "train_vs_fp32_compiled",
    "eval_vs_fp32_compiled",
    "train_vs_masked",
    "rollout_vs_masked",
    "memory_vs_masked",
    "k8_vs_k2_train",
    "k8_vs_k2_memory",
    "amp_bf16_vs_fp32_train",
    "metric_seconds_voc07",
    "loader_vs_decode",
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(TINY)


@pytest.fixture(scope="module")
def choices() -> Tensor:
    return torch.randint(TINY.choices, (TINY.batch, POSITIONS), generator=torch.Generator().manual_seed(1))


def scatter(network: nn.Module) -> None:
    """Makes all parameters and statistics differ, so that a mix-up shows; step sizes stay positive."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point() and tensor.ndim != 2:  # the default boxes have two dimensions
                tensor.mul_(0.8 + 0.4 * torch.rand(tensor.shape, generator=random))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_plain_network_has_the_parameters_of_the_full_precision_detector(batch: Batch, choices: Tensor) -> None:
    for width, classes in ((0.25, 4), (0.5, 21)):
        workload = replace(TINY, width=width, classes=classes)
        detector = SwitchableSSD(classes, DetectorBits.full_precision(), image_size=64, width=width)
        assert count(fp32(workload, batch.images, choices)) == count(detector)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_network_computes_the_outputs_of_the_full_precision_detector(batch: Batch, mode: str) -> None:
    source = initial_network(TINY, batch.images)
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, SwitchableConv2d) and module.norm is not None:
                module.norm.weight.uniform_(0.5, 1.5)
                module.norm.bias.uniform_(-0.5, 0.5)
    network = BaselineSSD(source, lambda _, layer: TorchConv(layer))
    assert not any(isinstance(module, SwitchableConv2d) for module in network.modules())
    zeros = torch.zeros(TINY.batch, POSITIONS, dtype=torch.int64)
    for each in (source, network):
        each.train(mode == "train")
    expected, output = source(batch.images, zeros), network(batch.images, zeros)
    torch.testing.assert_close(output.box_offsets, expected.box_offsets, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.class_logits, expected.class_logits, rtol=1e-3, atol=1e-4)
    expected, loss = (each.loss(output, batch.boxes_xyxy, batch.labels) for each in (source, network))
    assert loss == expected


def test_masked_network_equals_a_loop_over_images_each_in_its_own_branches(batch: Batch, choices: Tensor) -> None:
    network = masked(TINY, batch.images, choices).eval()
    scatter(network)
    # In double precision, so that no value lies near enough to a rounding edge to be rounded either way.
    network.double().stem.register_forward_pre_hook(lambda _, args: args[0].double())
    output = network(batch.images, choices)
    assert output.class_logits.dtype == torch.float64
    for index, config in enumerate(choices):
        alone = copy.deepcopy(network)
        pairs = zip(network.pointwise, config.tolist(), strict=True)
        alone.pointwise = nn.ModuleList(layer.branches[choice] for layer, choice in pairs)
        expected = alone(batch.images[index : index + 1], choices[index : index + 1])
        torch.testing.assert_close(output.box_offsets[index], expected.box_offsets[0])
        torch.testing.assert_close(output.class_logits[index], expected.class_logits[0])
    others = network(batch.images, (choices + 1) % TINY.choices)
    assert not torch.allclose(output.class_logits, others.class_logits)


def test_masked_network_has_k_times_the_pointwise_weights_at_k_bit_choices(batch: Batch, choices: Tensor) -> None:
    def pointwise_weights(network: BaselineSSD) -> int:
        convs = [module for module in network.pointwise.modules() if isinstance(module, nn.Conv2d)]
        return sum(conv.weight.numel() for conv in convs)

    network, single = masked(TINY, batch.images, choices), fp32(TINY, batch.images, choices)
    assert pointwise_weights(network) == TINY.choices * pointwise_weights(single)
    assert all(tuple(branch.bits for branch in layer.branches) == CHOICES[:3] for layer in network.pointwise)


def test_branches_round_to_their_grids_and_each_gets_a_gradient_on_every_batch() -> None:
    layer = SwitchableConv2d(4, 4, 1, [(32, 32)])
    branches = MaskedBranches(layer, [(2, 2), (8, 8)])
    seen = []
    branches.branches[0].norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(5, 4, 3, 3)
    branches(x, torch.ones(5, dtype=torch.int64)).sum().backward()  # no image chooses branch 0, yet it runs
    weight_step, input_step = branches.branches[0].steps.tolist()
    sums = seen[0].detach() / (weight_step * input_step)
    torch.testing.assert_close(sums, sums.round(), rtol=0, atol=1e-3)
    assert all(parameter.grad is not None for parameter in branches.parameters())
    assert branches.branches[1].steps.grad.abs().min() > 0


def test_all_rows_start_from_the_same_weights(batch: Batch, choices: Tensor) -> None:
    a, b, c = (build(TINY, batch.images, choices) for build in (fp32, masked, ours))
    for conv, masked_layer, block in zip(a.pointwise, b.pointwise, c.backbone.blocks, strict=True):
        for weight in [block.pointwise.weight, *(branch.conv.weight for branch in masked_layer.branches)]:
            assert torch.equal(weight, conv.conv.weight)
        for branch in masked_layer.branches:
            assert torch.equal(branch.norm.running_var, conv.norm.running_var)
    for head, masked_head, our_head in zip(a.class_heads, b.class_heads, c.class_heads, strict=True):
        assert torch.equal(head.conv.weight, masked_head.conv.weight)
        assert torch.equal(head.conv.weight, our_head.weight)


def test_judging_in_loops_gives_the_quality_of_the_batched_judge(batch: Batch, choices: Tensor) -> None:
    network = fp32(TINY, batch.images, choices).eval()
    with torch.no_grad():
        output = network(batch.images, choices)
        boxes, labels = batch.boxes_xyxy.clone(), batch.labels.clone()
        for index in range(TINY.batch):  # two of the objects are where a detection is
            found = detections_of_image(
                output.box_offsets[index], output.class_logits[index], network.default_boxes_cxcywh, 64
            )
            boxes[index, :2], labels[index, :2] = found[0][:2] + 0.5, found[1][:2]
        placed = replace(batch, boxes_xyxy=boxes, labels=labels)
        qualities = judge_in_loops(network, placed, choices)
        torch.testing.assert_close(qualities, judge_batched(network, placed, choices))
    assert (qualities > 0).all()


# --- Timing -----------------------------------------------------------------------------------------------------------


def test_actions_run_in_turn_and_the_median_leaves_out_the_warm_up() -> None:
    now, calls = 0.0, []
    durations = {"a": iter([100.0] * WARM_UPS + [3.0, 1.0, 2.0]), "b": iter([200.0] * WARM_UPS + [9.0, 7.0, 70.0])}

    def act(name: str) -> None:
        nonlocal now
        now += next(durations[name])
        calls.append(name)

    seconds = medians_in_turn({"a": lambda: act("a"), "b": lambda: act("b")}, 3, clock=lambda: now)
    assert seconds == {"a": 2.0, "b": 9.0}
    assert calls == ["a", "b"] * (WARM_UPS + 3)


def test_ratios_agree_with_a_hand_table_and_are_none_where_a_row_is_left_out() -> None:
    rows = {
        "fp32": {"train_seconds": 2.0, "eval_seconds": 1.0},
        "masked": {"train_seconds": 12.0, "rollout_seconds": 30.0, "memory_mib": 8000.0},
        "ours": {"train_seconds": 3.0, "eval_seconds": 0.5, "rollout_seconds": 5.0, "memory_mib": 2000.0},
        "ours_k2": {"train_seconds": 4.0, "memory_mib": 1000.0},
        "ours_k8": {"train_seconds": 5.0, "memory_mib": 1100.0},
        "ours_bf16": {"train_seconds": 1.5},
        "ours_integer": {"eval_seconds": 0.25},
    }
    assert ratios(rows) == {
        "train_vs_fp32": 1.5,
        "eval_vs_fp32": 0.5,
        "integer_vs_fp32": 0.25,
        "train_vs_fp32_compiled": None,
        "eval_vs_fp32_compiled": None,
        "train_vs_masked": 4.0,
        "rollout_vs_masked": 6.0,
        "memory_vs_masked": 0.25,
        "k8_vs_k2_train": 1.25,
        "k8_vs_k2_memory": 1.1,
        "amp_bf16_vs_fp32_train": 0.5,
    }


def test_synthetic_detections_have_50_to_150_an_image_and_some_are_right() -> None:
    records = voc07_records(70)
    detected = torch.cat([(batch.det_labels > 0).sum(1) for batch in records.batches])
    assert len(records.image_ids) == len(detected) == 70
    assert 50 <= detected.min() < 60 and 140 < detected.max() <= 150
    assert 0 < voc_map(records, VOC_CLASSES).map_11pt < 1


# --- The tool ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> Iterator[dict]:
    """The output of `--json` for a tiny network; nothing is compiled, here or in its subprocesses."""
    words = "--image-size 64 --width 0.125 --classes 4 --choices 3 --batch 2 --repetitions 1 --json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setattr(benchmark, "VOC07_TEST_IMAGES", 40)
        patch.setattr(benchmark, "LOADER_BATCHES", 1)
        main(words.split())
        yield json.loads(printed.getvalue())
    compile_passes("off")


@pytest.mark.slow
def test_json_has_all_ratios_and_the_figures_they_come_from(result: dict) -> None:
    assert set(RATIOS) | {"metric_seconds_voc07", "loader_vs_decode"} == RATIO_KEYS <= set(result)
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in RATIO_KEYS)
    for name, row in result["rows"].items():
        assert set(row) == set(PLANS[name].columns)
        assert all(math.isfinite(value) and value > 0 for value in row.values())
    assert set(result["train_seconds_by_batch"]) == {"1", "2"}
    assert result["settings"]["batch"] == 2
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_table_has_a_line_for_every_row_and_ratio(result: dict) -> None:
    lines = format_benchmark(result | {"train_vs_fp32_compiled": None}).splitlines()
    first_words = [line.split()[0] for line in lines]
    assert first_words[0] == "row"
    assert set(result["rows"]) | RATIO_KEYS <= set(first_words)
    assert lines[first_words.index("train_vs_fp32_compiled")].split() == ["train_vs_fp32_compiled", "-"]


@pytest.mark.slow
def test_peak_memory_leaves_out_the_calling_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    held = torch.ones(100 * 2**20)  # 400 MiB
    assert 0 < measured_training_mib("fp32", TINY) < 300
    assert held.sum() > 0


def test_compiled_row_can_be_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda *arguments: asked.append(arguments) or {"rows": {}})
    monkeypatch.setattr(torch, "compile", lambda function: function)
    main(["--no-compile", "--batch", "4"])
    main([])
    (workload, repetitions, names, roots), (_, _, all_names, _) = asked
    assert (workload, repetitions, roots) == (Workload(300, 1.0, 21, 3, 4), 5, [])
    assert set(all_names) - set(names) == {"fp32_compiled"}
    assert capsys.readouterr().out.startswith("row")


def test_without_a_compiler_the_error_names_the_option_to_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def compile_nothing(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(SystemExit) as exit_:
        main(["--batch", "4"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("leave fp32_compiled out with --no-compile\n")


def test_ratios_are_printed_with_their_limits() -> None:
    lines = format_benchmark({"rows": {}, "train_vs_masked": 4.0, "memory_vs_masked": None}).splitlines()
    assert lines[1].split() == ["train_vs_masked", "4", "(at", "least", "3.5)"]
    assert lines[2].split() == ["memory_vs_masked", "-", "(at", "most", "0.45)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 0", "--batch 0: must be at least 2"),
        ("--choices 9", "--choices 9: must be 2 to 8"),
        ("--image-size 32", "--image-size 32: must be at least 64"),
        ("--width nan", "--width nan: must be 0.01 to 8"),
        ("--no-compile --roots /nowhere/at/all", "/nowhere/at/all: not a folder"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(words: str, message: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {message}"
