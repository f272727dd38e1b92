"""The detector as a whole: shapes, independence of images, weights from full precision, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_convert, box_iou

from instaqnas.data.transforms import drop_difficult
from instaqnas.detector.default_boxes import decode
from instaqnas.detector.mobilenet import scaled_channels
from instaqnas.detector.ssd import DetectorBits, SSDOutput, SwitchableSSD, copy_weights
from instaqnas.quant.batch_norm import PerChoiceBatchNorm, reestimate_batch_norm
from instaqnas.quant.switchable import SwitchableConv2d, calibrate

CHOICES = [(2, 2), (3, 4), (4, 4)]
SWITCHABLE = DetectorBits(CHOICES, stem=(8, 8), depthwise=(8, 8), extras=(4, 4), heads=(8, 8))


def random_images(count: int, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def random_choices(count: int, seed: int = 0) -> Tensor:
    return torch.randint(len(CHOICES), (count, 13), generator=torch.Generator().manual_seed(seed))


def small(bits: DetectorBits, *, classes: int = 4, seed: int = 0, **settings: bool) -> SwitchableSSD:
    torch.manual_seed(seed)
    return SwitchableSSD(classes, bits, image_size=64, width=0.125, **settings)


def settle(detector: SwitchableSSD, images: Tensor, choices: Tensor) -> SwitchableSSD:
    """Step sizes and running statistics as after a long training on these images."""
    for module in detector.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    calibrate(detector, lambda: detector(images, choices))
    return detector.eval()


@pytest.fixture
def calibrated() -> SwitchableSSD:
    """A small quantized detector; every choice occurs at every position of the calibration."""
    choices = (torch.arange(9)[:, None] + torch.arange(13)) % len(CHOICES)
    return settle(small(SWITCHABLE), random_images(9), choices)


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.5, 1.0])
@pytest.mark.parametrize(
    "image_size, maps",
    [(112, [7, 4, 2, 1, 1, 1]), (128, [8, 4, 2, 1, 1, 1]), (224, [14, 7, 4, 2, 1, 1]), (300, [19, 10, 5, 3, 2, 1])],
)
def test_maps_agree_with_the_default_boxes_at_all_sizes_and_widths(
    width: float, image_size: int, maps: list[int]
) -> None:
    with torch.device("meta"):  # shapes alone
        detector = SwitchableSSD(21, DetectorBits.full_precision(), image_size=image_size, width=width)
        shapes = []
        for head in detector.box_heads:
            head.register_forward_hook(lambda _layer, _args, y: shapes.append(y.shape[2:]))
        images, choices = torch.zeros(2, 3, image_size, image_size), torch.zeros(2, 13, dtype=torch.int64)
        output = detector(images, choices)
    boxes = 6 * sum(cells**2 for cells in maps)
    assert [tuple(shape) for shape in shapes] == [(cells, cells) for cells in maps]
    assert detector.default_boxes_cxcywh.shape == (boxes, 4)
    assert output.box_offsets.shape == (2, boxes, 4)
    assert output.class_logits.shape == (2, boxes, 21)


@pytest.mark.parametrize("image_size", [65, 95, 127])
def test_odd_sizes_agree_with_the_default_boxes(image_size: int) -> None:
    detector = SwitchableSSD(3, DetectorBits.full_precision(), image_size=image_size, width=0.125)
    output = detector(torch.zeros(2, 3, image_size, image_size), torch.zeros(2, 13, dtype=torch.int64))
    assert output.class_logits.shape == (2, len(detector.default_boxes_cxcywh), 3)


def test_channels_under_a_width_multiplier_are_multiples_of_eight() -> None:
    channels = [scaled_channels(c, w) for c, w in ((32, 1.0), (32, 0.5), (32, 0.125), (64, 0.3), (512, 0.75))]
    assert channels == [32, 16, 8, 16, 384]


def test_positions_name_the_pointwise_convolutions_in_order() -> None:
    detector = small(SWITCHABLE)
    assert len(detector.positions) == 13
    switchable = [
        name for name, m in detector.named_modules() if isinstance(m, SwitchableConv2d) and len(m.choices) > 1
    ]
    assert switchable == list(detector.positions)


# --- Forward ----------------------------------------------------------------------------------------------------------


def test_in_evaluation_an_image_does_not_depend_on_the_rest_of_its_batch(calibrated: SwitchableSSD) -> None:
    images, choices = random_images(5, seed=3), random_choices(5, seed=3)
    with torch.no_grad():
        together = calibrated(images, choices)
        for part in ([0], [4, 2]):
            alone = calibrated(images[part], choices[part])
            torch.testing.assert_close(alone.box_offsets, together.box_offsets[part], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.class_logits, together.class_logits[part], rtol=1e-4, atol=1e-4)


def test_every_position_changes_the_output_of_its_image_only(calibrated: SwitchableSSD) -> None:
    images = random_images(2, seed=4)
    with torch.no_grad():
        choices = torch.full((2, 13), 2)
        before = calibrated(images, choices).class_logits
        for position in range(13):
            changed = choices.clone()
            changed[0, position] = 0
            after = calibrated(images, changed).class_logits
            assert (after[0] - before[0]).abs().max() > 1e-3, position
            torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-4)


def test_uint8_and_float_images_agree(calibrated: SwitchableSSD) -> None:
    images, choices = random_images(2), random_choices(2)
    with torch.no_grad():
        bytes_, floats = calibrated(images, choices), calibrated(images.float(), choices)
    assert torch.equal(bytes_.box_offsets, floats.box_offsets)
    assert torch.equal(bytes_.class_logits, floats.class_logits)


def test_full_precision_equals_a_plain_mobilenet_of_torch_layers() -> None:
    detector = small(DetectorBits.full_precision(), extras_batch_norm=True)
    images, choices = random_images(3), torch.zeros(3, 13, dtype=torch.int64)
    with torch.no_grad():
        detector(images, choices)  # moves the running statistics
    detector.eval()

    def run(layer: SwitchableConv2d, x: Tensor) -> Tensor:
        padding, groups = layer.weight.shape[-1] // 2, x.shape[1] // layer.weight.shape[1]
        y = F.conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=padding, groups=groups)
        if layer.norm is None:
            return y
        norm = layer.norm
        return F.batch_norm(y, norm.running_mean[0], norm.running_var[0], norm.weight[0], norm.bias[0]).relu()

    x = run(detector.backbone.stem, (images.float() - 127) / 128)
    sources = []
    for block, layers in enumerate(detector.backbone.blocks):
        x = run(layers.pointwise, run(layers.depthwise, x))
        if block in (10, 12):
            sources.append(x)
    for extra in detector.extras:
        x = run(extra.down, run(extra.reduce, x))
        sources.append(x)
    logits = []
    for head, source in zip(detector.class_heads, sources, strict=True):
        y = run(head, source)
        for row in range(y.shape[2]):
            for column in range(y.shape[3]):
                logits += [y[:, box * 4 : (box + 1) * 4, row, column] for box in range(6)]
    with torch.no_grad():
        torch.testing.assert_close(detector(images, choices).class_logits, torch.stack(logits, 1), rtol=1e-4, atol=1e-4)


def test_uncalibrated_bits_give_nan_and_not_numbers() -> None:
    assert small(SWITCHABLE)(random_images(2), random_choices(2)).class_logits.isnan().all()


# --- Weights from full precision --------------------------------------------------------------------------------------


def shuffle_parameters(network: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for n, b in network.named_buffers() if "running" in n)]:
            tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)


@pytest.mark.parametrize("extras_batch_norm", [False, True])
def test_copied_weights_spread_over_all_choices(extras_batch_norm: bool) -> None:
    source = small(DetectorBits.full_precision(), extras_batch_norm=extras_batch_norm)
    target = small(SWITCHABLE, extras_batch_norm=extras_batch_norm, seed=1)
    shuffle_parameters(source, 5)
    copy_weights(source, target)
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    spread = 0
    for name, value in [*target.named_parameters(), *target.named_buffers()]:
        if "quantizer" in name:
            continue
        if ".norm." in name:
            assert value.shape[0] in (1, 3)
            spread += value.shape[0] == 3
            assert torch.equal(value, values[name].expand_as(value))
        else:
            assert torch.equal(value, values[name])
    assert spread == 13 * 4  # weight, bias, running mean and variance of each position


def test_copied_weights_are_copies_and_leave_step_sizes_alone() -> None:
    source, target = small(DetectorBits.full_precision()), small(SWITCHABLE, seed=1)
    copy_weights(source, target)
    steps = [p for name, p in target.named_parameters() if "log_step" in name]
    assert steps
    assert all(p.isnan().all() for p in steps)
    before = target.backbone.stem.weight.clone()
    nn.init.zeros_(source.backbone.stem.weight)
    assert torch.equal(target.backbone.stem.weight, before)
    assert all(p.requires_grad for p in target.parameters())


def test_weights_copied_to_32_bit_choices_give_the_output_of_the_source() -> None:
    off = (32, 32)
    source = small(DetectorBits.full_precision())
    target = small(DetectorBits([(2, 2), off, (4, 4)], off, off, off, off), seed=1)
    images = random_images(3)
    copy_weights(source, target)
    source.eval()
    target.eval()
    with torch.no_grad():
        expected = source(images, torch.zeros(3, 13, dtype=torch.int64))
        copied = target(images, torch.ones(3, 13, dtype=torch.int64))
    torch.testing.assert_close(copied.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copied.box_offsets, expected.box_offsets, rtol=1e-4, atol=1e-4)


# --- Learning ---------------------------------------------------------------------------------------------------------

OBJECTS = torch.tensor([[[4.0, 6.0, 30.0, 34.0], [33.0, 20.0, 60.0, 62.0], [0.0, 0.0, 0.0, 0.0]]])
LABELS = torch.tensor([[1, 3, 0]])


def test_loss_encodes_objects_against_the_default_boxes() -> None:
    detector = small(DetectorBits.full_precision()).eval()
    with torch.no_grad():
        output = detector(random_images(1), torch.zeros(1, 13, dtype=torch.int64))
        losses = detector.loss(output, OBJECTS, LABELS)
    defaults = detector.default_boxes_cxcywh * 64
    iou = box_iou(OBJECTS[0, :2], box_convert(defaults, "cxcywh", "xyxy"))
    expected, positives = 0.0, 0
    for p in range(len(defaults)):
        owner = max(range(2), key=lambda n: iou[n, p].item())
        for n in range(2):
            if iou[n].argmax() == p:
                owner = n
                break
        else:
            if iou[owner, p] < 0.5:
                continue
        positives += 1
        center, size = (
            (OBJECTS[0, owner, :2] + OBJECTS[0, owner, 2:]) / 2,
            OBJECTS[0, owner, 2:] - OBJECTS[0, owner, :2],
        )
        x_y, w_h = (center - defaults[p, :2]) / defaults[p, 2:] / 0.1, torch.log(size / defaults[p, 2:]) / 0.2
        expected += F.smooth_l1_loss(output.box_offsets[0, p], torch.cat([x_y, w_h]), reduction="sum").item()
    assert positives >= 2
    assert losses["box"].item() == pytest.approx(expected / positives, rel=1e-4)


@pytest.mark.parametrize("bits", [DetectorBits.full_precision(), SWITCHABLE], ids=["full precision", "quantized"])
def test_a_few_steps_on_one_image_lower_the_loss(bits: DetectorBits) -> None:
    detector = small(bits, extras_batch_norm=True)
    image = torch.full((1, 3, 64, 64), 120, dtype=torch.uint8)
    image[0, 0, 6:34, 4:30] = 255
    image[0, 2, 20:62, 33:60] = 10
    images = image.expand(4, -1, -1, -1)
    boxes, labels = OBJECTS.expand(4, -1, -1), LABELS.expand(4, -1)
    choices = random_choices(4) if len(bits.choices) > 1 else torch.zeros(4, 13, dtype=torch.int64)
    calibrate(detector, lambda: detector(images, choices))
    descent = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    history = []
    for _ in range(20):
        loss = sum(detector.loss(detector(images, choices), boxes, labels).values())
        descent.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
        descent.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


@pytest.mark.slow
def test_a_trained_full_precision_detector_finds_the_object_of_its_training_image() -> None:
    detector = small(DetectorBits.full_precision(), extras_batch_norm=True)
    image = torch.full((1, 3, 64, 64), 120, dtype=torch.uint8)
    image[0, 0, 6:34, 4:30] = 255
    images, choices = image.expand(2, -1, -1, -1), torch.zeros(2, 13, dtype=torch.int64)
    boxes, labels = OBJECTS[:, :1].expand(2, -1, -1), LABELS[:, :1].expand(2, -1)
    descent = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    for _ in range(60):
        loss = sum(detector.loss(detector(images, choices), boxes, labels).values())
        descent.zero_grad()
        loss.backward()
        descent.step()
    with torch.no_grad():
        output = detector(images, choices)
    best = output.class_logits[0, :, 1:].max(1).values.sub(output.class_logits[0, :, 0]).argmax()
    assert output.class_logits[0, best].argmax() == 1
    found = decode(output.box_offsets[0], detector.default_boxes_cxcywh)[best] * 64
    assert box_iou(found[None], OBJECTS[0, :1]).item() > 0.8


def test_the_loss_of_an_image_does_not_depend_on_its_batch(calibrated: SwitchableSSD) -> None:
    boxes = torch.cat([OBJECTS, OBJECTS.flip(1), torch.zeros(1, 3, 4)])
    labels = torch.tensor([[1, 3, 0], [0, 2, 0], [0, 0, 0]])
    with torch.no_grad():
        output = calibrated(random_images(3, seed=4), random_choices(3, seed=4))
        losses = calibrated.image_losses(output, boxes, labels, torch.zeros_like(labels, dtype=torch.bool))
        for image in range(3):
            one = slice(image, image + 1)
            alone = SSDOutput(output.box_offsets[one], output.class_logits[one])
            positives = calibrated.targets(boxes[one], labels[one]).positives
            expected = sum(calibrated.loss(alone, boxes[one], labels[one]).values()) * positives
            torch.testing.assert_close(losses[image], expected)
    assert losses[:2].min() > 0
    assert losses[2] == 0


@pytest.mark.parametrize("difficult", [(False, True), (True, False), (True, True), (False, False)])
def test_the_loss_of_an_image_drops_difficult_objects_as_training_does(
    calibrated: SwitchableSSD, difficult: tuple[bool, bool]
) -> None:
    boxes, labels, flags = OBJECTS[:, :2], LABELS[:, :2], torch.tensor([difficult])
    sample = {
        "boxes": tv_tensors.BoundingBoxes(boxes[0], format="XYXY", canvas_size=(64, 64)),
        "labels": labels[0],
        "difficult": flags[0],
    }
    trained = drop_difficult(sample)
    with torch.no_grad():
        output = calibrated(random_images(1, seed=4), random_choices(1, seed=4))
        loss = calibrated.image_losses(output, boxes, labels, flags)
        kept = trained["boxes"].as_subclass(Tensor)[None], trained["labels"][None], trained["difficult"][None]
        expected = calibrated.image_losses(output, *kept)
        both = calibrated.image_losses(output, boxes, labels, torch.zeros_like(flags))
    assert torch.equal(loss, expected)
    assert torch.equal(loss, both) == (not any(difficult))
    assert (loss == 0) == all(difficult)


# --- The frozen stem --------------------------------------------------------------------------------------------------


class Calls:
    """How often a layer has run."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        layer.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def test_the_policy_takes_the_image_unless_the_stem_is_frozen(calibrated: SwitchableSSD) -> None:
    images = random_images(2)
    observation = calibrated.observe(images)
    assert observation.input is images
    assert observation.stem is None


@pytest.mark.parametrize("training", [False, True])
def test_the_detector_continues_from_the_output_of_the_frozen_stem(calibrated: SwitchableSSD, training: bool) -> None:
    calibrated.freeze_stem()
    calibrated.train(training)
    images, choices = random_images(5, seed=2), random_choices(5, seed=2)
    calls = Calls(calibrated.backbone.stem)
    whole = calibrated(images, choices)
    assert calls.count == 1
    observation = calibrated.observe(images)
    output = calibrated(images, choices, observation.stem)
    assert calls.count == 2
    assert torch.equal(output.class_logits, whole.class_logits)
    assert torch.equal(output.box_offsets, whole.box_offsets)
    assert observation.input.shape == (5, 8, 32, 32)
    assert not observation.input.requires_grad


def test_the_policy_takes_the_features_after_their_relu(calibrated: SwitchableSSD) -> None:
    images, stem = random_images(3, seed=3), calibrated.backbone.stem
    with torch.no_grad():
        weight, weight_step = stem.weight_quantizer(stem.weight)
        x, input_step = stem.input_quantizer((images.float() - 127) / 128, None)
        y = F.conv2d(x * input_step, weight[0] * weight_step, stride=2, padding=1)
        norm = stem.norm
        y = F.batch_norm(y, norm.running_mean[0], norm.running_var[0], norm.weight[0], norm.bias[0])
    calibrated.freeze_stem()
    observed = calibrated.observe(images).input
    torch.testing.assert_close(observed, y.relu(), rtol=1e-4, atol=1e-5)
    assert (observed == 0).any()


@pytest.mark.parametrize("frozen", [False, True])
def test_training_changes_a_stem_unless_it_is_frozen(calibrated: SwitchableSSD, frozen: bool) -> None:
    if frozen:
        calibrated.freeze_stem()
    calibrated.train()
    before = {name: value.clone() for name, value in calibrated.state_dict().items()}
    descent = torch.optim.SGD([p for p in calibrated.parameters() if p.requires_grad], lr=0.1)
    images, choices = random_images(3, seed=5), random_choices(3, seed=5)
    output = calibrated(images, choices, calibrated.observe(images).stem)
    sum(calibrated.loss(output, OBJECTS.expand(3, -1, -1), LABELS.expand(3, -1)).values()).backward()
    descent.step()
    reestimate_batch_norm(calibrated, lambda: calibrated(images, choices))
    changed = {name for name, value in calibrated.state_dict().items() if not torch.equal(value, before[name])}
    stem = {name for name in changed if name.startswith("backbone.stem.")}
    assert {"backbone.blocks.0.depthwise.weight", "backbone.blocks.0.depthwise.norm.running_mean"} <= changed
    assert stem == set() if frozen else {"backbone.stem.weight", "backbone.stem.norm.running_mean"} <= stem


def test_a_stem_whose_bits_the_policy_chooses_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="cannot freeze the stem"):
        small(replace(SWITCHABLE, positions="backbone")).freeze_stem()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu_in_full_precision() -> None:
    detector = small(DetectorBits.full_precision()).eval()
    images, choices = random_images(2), torch.zeros(2, 13, dtype=torch.int64)
    with torch.no_grad():
        cpu = detector(images, choices).class_logits
        cuda = detector.cuda()(images.cuda(), choices.cuda()).class_logits.cpu()
    torch.testing.assert_close(cuda, cpu, rtol=1e-2, atol=1e-2)
