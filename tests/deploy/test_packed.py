"""Deployment files: their content bit by bit, networks that come back exactly, and damaged files that are refused."""

from __future__ import annotations

import copy
import functools
import random
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config.command import parse_command
from instaqnas.config.settings import EvalConfig
from instaqnas.data.voc import VOC_CLASSES
from instaqnas.deploy.packed import Architecture, load_packed, pack_bits, save_packed, unpack_bits
from instaqnas.deploy.predictor import Predictor
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.experiment.parts import detector_bits
from instaqnas.policy.budget import PricePoint
from instaqnas.policy.network import PolicyNet, effort_of, policy_gbitops
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.integer import to_integer
from instaqnas.quant.switchable import SwitchableConv2d, calibrate
from instaqnas.tools.pack import architecture_of

CLASSES = ("disc", "ring", "star")
SIDE, WIDTH = 64, 0.125
FIXED = {"stem": (8, 8), "depthwise": (8, 7), "extras": (4, 4), "heads": (5, 8)}
BITS = {
    "lsq_plus": DetectorBits([(2, 2), (3, 4), (8, 8)], **FIXED),
    "separate": DetectorBits([(3, 4), (2, 2)], **FIXED, positions="backbone", weights="separate", per_channel=True),
    "nested": DetectorBits([(3, 3), (7, 4), (2, 8)], **FIXED, positions="all", weights="nested", per_channel=True),
    "one choice, nested": DetectorBits([(6, 5)], **FIXED, quantizer="lsq", weights="nested"),
    "pact": DetectorBits([(2, 2), (8, 4)], **FIXED, positions="backbone+extras", quantizer="pact"),
    "dorefa": DetectorBits([(8, 2), (4, 3)], **FIXED, positions="backbone", quantizer="dorefa", weights="separate"),
}
BOX_SIZES = {"pact": [(3 + 7 * k, 9 + 8 * k) for k in range(6)]}  # the others have the default sizes

SETTINGS = EvalConfig(batch_size=3, score_threshold=0.2, nms_iou=0.3, candidates_per_class=7, max_detections=5)

State = dict


def architecture(bits: DetectorBits) -> Architecture:
    return Architecture(
        bits, image_size=SIDE, width=WIDTH, extras_batch_norm=True, policy_pool=4, policy_width=4, policy_bits=(6, 8)
    )


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def random_choices(detector: SwitchableSSD, count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(len(detector.choice_names), (count, len(detector.positions)), generator=g)


def settle(network: nn.Module, forward: Callable[[], object]) -> None:
    """Sets step sizes and running statistics as a long training on the images of `forward` would."""
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    calibrate(network, forward)
    network.eval()


@functools.cache
def trained(name: str) -> tuple[SwitchableSSD, PolicyNet]:
    """Detector and policy at BITS[name], for all tests."""
    torch.manual_seed(0)
    bits = BITS[name]
    settings = {"image_size": SIDE, "width": WIDTH, "extras_batch_norm": True, "box_sizes": BOX_SIZES.get(name)}
    detector = SwitchableSSD(len(CLASSES) + 1, bits, **settings)
    policy = PolicyNet(len(detector.positions), len(bits.choices), pool=4, width=4, bits=(6, 8))
    images = random_images(6)
    settle(detector, lambda: detector(images, random_choices(detector, 6)))
    settle(policy, lambda: policy(images))
    return detector, policy


def save(path: Path, name: str) -> Path:
    save_packed(path, *trained(name), architecture(BITS[name]), CLASSES, SETTINGS)
    return path


def convolutions(network: nn.Module) -> dict[str, SwitchableConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, SwitchableConv2d)}


# --- Size -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "most"), [("shared", 10_000_000), ("nested", 7_500_000)])
def test_the_setting_of_the_paper_takes_a_fraction_of_full_precision(tmp_path: Path, weights: str, most: int) -> None:
    """9.47 million parameters are 37.9 MB in float32. First weights stand for trained ones."""
    command = parse_command("search", ["--config", "configs/voc_paper.yaml", f"--bits.weights={weights}"])
    bits, settings = detector_bits(command.config), command.config.policy
    torch.manual_seed(0)
    detector = SwitchableSSD(len(VOC_CLASSES) + 1, bits)
    shape = {"pool": settings.pool, "width": settings.width, "bits": settings.bits}
    policy = PolicyNet(len(detector.positions), len(bits.choices), **shape)
    images = torch.randint(0, 256, (4, 3, 300, 300), generator=torch.Generator().manual_seed(0)).byte()
    settle(detector, lambda: detector(images, random_choices(detector, 4)))
    settle(policy, lambda: policy(images))
    save_packed(tmp_path / "packed", detector, policy, architecture_of(command.config), VOC_CLASSES, SETTINGS)
    assert (tmp_path / "packed").stat().st_size <= most


# --- Bits -------------------------------------------------------------------------------------------------------------


def naive_stream(values: list[int], bits: int) -> bytes:
    """Written out as a string of zeros and ones, lowest bit first."""
    written = "".join(format(value, f"0{bits}b")[::-1] for value in values)
    written += "0" * (-len(written) % 8)
    return bytes(int(written[start : start + 8][::-1], 2) for start in range(0, len(written), 8))


def naive_values(stream: bytes, bits: int) -> list[int]:
    """The inverse, with values of the padding at the end if there is room for some."""
    written = "".join(format(byte, "08b")[::-1] for byte in stream)
    return [int(written[start : start + bits][::-1], 2) for start in range(0, len(written) - bits + 1, bits)]


def test_bits_are_packed_as_by_hand() -> None:
    # 1, 2, 3, 0, 3 lowest bit first: 10 01 11 00 | 11
    assert pack_bits(np.array([1, 2, 3, 0, 3], np.uint8), 2) == bytes([0b00111001, 0b00000011])
    # 5, 6: 101 011 | 00
    assert pack_bits(np.array([5, 6], np.uint8), 3) == bytes([0b00110101])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bits_are_those_of_a_string_and_come_back(bits: int) -> None:
    drawn = random.Random(bits)
    for count in (1, 2, 3, 7, 8, 9, 64, 333):
        for values in ([drawn.randrange(2**bits) for _ in range(count)], [2**bits - 1] * count, [0] * count):
            array = np.array(values, np.uint8)
            stream = pack_bits(array, bits)
            assert stream == naive_stream(values, bits)
            back = unpack_bits(stream, bits, count)
            assert back.dtype == np.uint8
            assert back.tolist() == values


@pytest.mark.parametrize(("length", "bits", "count"), [(3, 3, 5), (1, 3, 5), (0, 1, 1), (1, 8, 0)])
def test_streams_of_another_length_are_refused(length: int, bits: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"^{length} bytes for {count} values of {bits} bits$"):
        unpack_bits(bytes(length), bits, count)


# --- Networks come back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BITS)
@torch.no_grad()
def test_networks_come_back_exactly(name: str, tmp_path: Path) -> None:
    detector, policy = trained(name)
    model = load_packed(save(tmp_path / "packed.pt", name))
    whole, whole_policy = to_integer(detector), to_integer(policy)
    images, choices = random_images(3, seed=7), random_choices(detector, 3, seed=7)
    expected, found = whole(images, choices), model.detector(images, choices)
    assert torch.equal(found.box_offsets, expected.box_offsets)
    assert torch.equal(found.class_logits, expected.class_logits)
    assert torch.equal(model.costs.gbitops(choices), detector_costs(detector).gbitops(choices))
    assert torch.equal(model.policy(images), whole_policy(images))
    assert model.policy_gbitops == policy_gbitops(policy, SIDE)
    assert model.class_names == CLASSES
    assert model.settings == SETTINGS
    assert model.detector.positions == detector.positions
    assert model.detector.choice_names == detector.choice_names
    assert torch.equal(model.detector.default_boxes_cxcywh, detector.default_boxes_cxcywh)
    assert not [m for network in (model.detector, model.policy) for m in network.modules() if m.training]


def test_prices_come_back_and_shift_the_integer_policy_as_the_other_one(tmp_path: Path) -> None:
    detector, policy = copy.deepcopy(trained("lsq_plus"))
    prices, images = [PricePoint(9.0, 0.1), PricePoint(-2.0, 0.3)], random_images(5, seed=7)
    save_packed(tmp_path / "p.pt", detector, policy, architecture(BITS["lsq_plus"]), CLASSES, SETTINGS, prices=prices)
    model = load_packed(tmp_path / "p.pt")
    assert list(model.prices) == prices
    with torch.no_grad():
        before = policy(images)
        for network in (policy, model.policy):
            network.shift_to_budget(prices, model.costs, 0.2)  # half-way: a price of 3.5
        torch.testing.assert_close(policy(images), before - 3.5 * model.costs.gbitops_table().float())
        assert torch.equal(model.policy(images), to_integer(policy)(images))
    with pytest.raises(InputError, match="a budget of 0.4 GBitOps: expected 0.1 to 0.3"):
        Predictor.of_packed(tmp_path / "p.pt", 0.4)
    with pytest.raises(InputError, match=r"packed.pt: no prices for other budgets"):
        Predictor.of_packed(save(tmp_path / "packed.pt", "lsq_plus"), 0.2)


@torch.no_grad()
def test_a_policy_on_the_stem_comes_back_and_sees_the_stem_of_its_detector(tmp_path: Path) -> None:
    detector = copy.deepcopy(trained("lsq_plus")[0])
    detector.freeze_stem()
    images, choices = random_images(3, seed=7), random_choices(detector, 3, seed=7)
    torch.manual_seed(0)
    effort = effort_of([4, 12, 64])
    policy = PolicyNet(len(detector.positions), 3, pool=4, width=4, bits=(6, 8), stem_channels=8, effort=effort)
    settle(policy, lambda: policy(detector.observe(images).input))
    plain = replace(architecture(BITS["lsq_plus"]), policy_input="stem", policy_effort=True)
    save_packed(tmp_path / "packed.pt", detector, policy, plain, CLASSES, SETTINGS)
    model = load_packed(tmp_path / "packed.pt")
    whole, whole_policy = to_integer(detector), to_integer(policy)
    observation, expected = model.detector.observe(images), whole.observe(images)
    assert torch.equal(observation.input, expected.input)
    assert torch.equal(model.policy(observation.input), whole_policy(expected.input))
    found = model.detector(images, choices, observation.stem)
    assert torch.equal(found.class_logits, whole(images, choices).class_logits)
    assert model.policy_gbitops == policy_gbitops(policy, SIDE)


@torch.no_grad()
def test_a_file_that_predates_policies_on_the_stem_is_read(packed: Path, tmp_path: Path) -> None:
    state = copy.deepcopy(load_once(packed))
    del state["architecture"]["policy_input"], state["architecture"]["policy_effort"]
    save_checkpoint(tmp_path / "old.pt", state)
    images = random_images(2)
    assert torch.equal(load_packed(tmp_path / "old.pt").policy(images), load_packed(packed).policy(images))


@pytest.mark.parametrize(
    "plain",
    [
        architecture(BITS["nested"]),
        replace(architecture(BITS["dorefa"]), width=1.5, extras_batch_norm=False, policy_bits=(4, 4)),
    ],
)
def test_an_architecture_comes_back_from_lists(plain: Architecture) -> None:
    def listed(value: object) -> object:
        if isinstance(value, dict):
            return {key: listed(item) for key, item in value.items()}
        return [listed(item) for item in value] if isinstance(value, list | tuple) else value

    assert Architecture.from_plain(listed(asdict(plain))) == plain


# --- Content of the file ----------------------------------------------------------------------------------------------


def lowest_integer(bits: int) -> int:
    return -(2 ** (bits - 1))


@pytest.mark.parametrize("name", BITS)
def test_streams_hold_the_integer_weights_at_their_own_bits_and_nothing_else(name: str, tmp_path: Path) -> None:
    networks = load_checkpoint(save(tmp_path / "packed.pt", name))["networks"]
    assert networks.keys() == {"detector", "policy"}
    for kind, network in zip(("detector", "policy"), trained(name), strict=True):
        layers = convolutions(network)
        assert networks[kind].keys() == layers.keys()
        for layer_name, layer in layers.items():
            stored, widths = networks[kind][layer_name], [weight_bits for weight_bits, _ in layer.choices]
            with torch.no_grad():
                levels, _ = layer.weight_quantizer(layer.weight)
            is_nested = name == "nested" and len(widths) > 1
            kept = [widths.index(max(widths))] if is_nested else range(len(widths))
            halves = kind == "detector" and (is_nested or name in ("pact", "dorefa"))  # levels are 2q + 1
            assert len(stored["streams"]) == len(kept)
            for stream, k in zip(stored["streams"], kept, strict=True):
                inflated, count = zlib.decompress(stream.numpy().tobytes()), levels[k].numel()
                assert len(inflated) == -(-count * widths[k] // 8)
                integers = (levels[k].flatten().long() - 1) // 2 if halves else levels[k].flatten().long()
                found = naive_values(inflated, widths[k])[:count]
                assert [value + lowest_integer(widths[k]) for value in found] == integers.tolist()


def test_nested_weights_take_the_room_of_the_widest_choice(tmp_path: Path) -> None:
    def room(name: str) -> int:
        layers = load_checkpoint(save(tmp_path / "packed.pt", name))["networks"]["detector"]
        streams = layers["backbone.blocks.12.pointwise"]["streams"]
        return sum(len(zlib.decompress(stream.numpy().tobytes())) for stream in streams)

    weights = 128 * 128  # 1024 channels at a width of 0.125
    assert room("nested") == weights * 7 // 8
    assert room("lsq_plus") == weights * (2 + 3 + 8) // 8


# --- Damaged files ----------------------------------------------------------------------------------------------------

STEM, POINTWISE = "backbone.stem", "backbone.blocks.3.pointwise"


@pytest.fixture(scope="module")
def packed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return {name: save(folder / f"{name}.pt", name) for name in ("lsq_plus", "nested")}


@pytest.fixture
def packed(packed_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid file; loading skips the cost count, which takes most of the time."""
    monkeypatch.setattr("instaqnas.deploy.packed.detector_costs", lambda detector: None)
    monkeypatch.setattr("instaqnas.deploy.packed.policy_gbitops", lambda policy, image_size: None)
    return packed_files["lsq_plus"]


@pytest.fixture
def packed_nested(packed: Path, packed_files: dict[str, Path]) -> Path:
    return packed_files["nested"]


load_once = functools.cache(load_checkpoint)


def refusal(packed: Path, path: Path, change: Callable[[State], None]) -> str:
    """The error of loading a changed file, without the file's name at its start."""
    state = copy.deepcopy(load_once(packed))
    change(state)
    save_checkpoint(path, state)
    with pytest.raises(InputError) as error:
        load_packed(path)
    name, _, message = str(error.value).partition(": ")
    assert name == str(path)
    return message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(packed: Path, tmp_path: Path, share: float) -> None:
    whole = packed.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"/cut\.pt: not a readable checkpoint"):
        load_packed(tmp_path / "cut.pt")


def test_a_flipped_bit_is_noticed_wherever_a_value_is_stored(packed: Path, tmp_path: Path) -> None:
    whole, layer = packed.read_bytes(), load_checkpoint(packed)["networks"]["detector"][POINTWISE]
    for part in (layer["streams"][0], layer["scale"], layer["step"]):
        stored = part.numpy().tobytes()
        assert whole.count(stored) == 1
        for position in (0, len(stored) // 2, len(stored) - 1):
            flipped = bytearray(whole)
            flipped[whole.index(stored) + position] ^= 1
            (tmp_path / "flipped.pt").write_bytes(flipped)
            with pytest.raises(InputError, match=r"/flipped\.pt: damaged checkpoint"):
                load_packed(tmp_path / "flipped.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/none\.pt: no such checkpoint"):
        load_packed(tmp_path / "none.pt")


@pytest.mark.parametrize("changes", [{"stage": "search"}, {"version": 1}, {"version": None}])
def test_other_checkpoints_and_versions_are_refused(packed: Path, tmp_path: Path, changes: dict) -> None:
    message = refusal(packed, tmp_path / "other.pt", lambda state: state.update(changes))
    assert message.startswith("not a packed file of version 2")


SPOILS = {
    "a value too few": lambda values: values[..., :-1],
    "a dimension too many": lambda values: values[None],
    "NaN": lambda values: values.index_fill(-1, torch.tensor([0]), torch.nan),
    "infinite": lambda values: values.index_fill(-1, torch.tensor([0]), -torch.inf),
    "float64": lambda values: values.double(),
}
TABLES = {"step": [3], "lowest": [3], "highest": [3], "scale": [3, 32], "shift": [3, 32]}  # choices, output channels


@pytest.mark.parametrize(
    ("table", "spoil"),
    [*((table, "NaN") for table in TABLES), *(("scale", spoil) for spoil in SPOILS if spoil != "NaN")],
)
def test_tables_that_are_not_finite_float32_of_the_layers_shape_are_refused(
    packed: Path, tmp_path: Path, table: str, spoil: str
) -> None:
    def change(state: State) -> None:
        layer = state["networks"]["detector"][POINTWISE]
        layer[table] = SPOILS[spoil](layer[table]).clone()

    expected = f"invalid ({table}: expected finite float32 {TABLES[table]}); pack the run again"
    assert refusal(packed, tmp_path / "spoilt.pt", change) == f"detector.{POINTWISE}: {expected}"


LAYER_CHANGES = {
    "no layer": lambda layers: layers.pop(POINTWISE),
    "no table": lambda layers: layers[POINTWISE].pop("scale"),
    "no tensor": lambda layers: layers[POINTWISE].update(step=[0.1, 0.1, 0.1]),
    "a stream too few": lambda layers: layers[POINTWISE]["streams"].pop(),
    "a stream too many": lambda layers: layers[POINTWISE]["streams"].append(layers[POINTWISE]["streams"][0]),
    "streams in another order": lambda layers: layers[POINTWISE]["streams"].reverse(),
    "a stream of another layer": lambda layers: layers[POINTWISE].update(streams=layers[STEM]["streams"] * 3),
    "a cut stream": lambda layers: layers[POINTWISE].update(streams=[s[:-9] for s in layers[POINTWISE]["streams"]]),
    "no stream at all": lambda layers: layers[POINTWISE].update(streams=[torch.zeros(9, dtype=torch.uint8)] * 3),
    "nested": lambda layers: layers[POINTWISE].update(nested=True),
    "another layer": lambda layers: layers.update({POINTWISE: layers[STEM]}),
}


@pytest.mark.parametrize("change", LAYER_CHANGES.values(), ids=LAYER_CHANGES.keys())
def test_a_layer_that_does_not_fit_is_named(packed: Path, tmp_path: Path, change: Callable[[State], None]) -> None:
    message = refusal(packed, tmp_path / "changed.pt", lambda state: change(state["networks"]["detector"]))
    assert message.startswith(f"detector.{POINTWISE}: invalid (")


def test_a_stream_a_byte_too_long_or_too_short_is_refused(packed_nested: Path, tmp_path: Path) -> None:
    inflated = zlib.decompress(
        load_checkpoint(packed_nested)["networks"]["detector"][POINTWISE]["streams"][0].numpy().tobytes()
    )
    right = len(inflated)
    assert right == 16 * 32 * 7 // 8  # 128 and 256 channels at a width of 0.125
    for values in (inflated + b"\0", inflated[:-1]):
        stream = torch.frombuffer(bytearray(zlib.compress(values)), dtype=torch.uint8)
        message = refusal(
            packed_nested,
            tmp_path / "length.pt",
            lambda state, stream=stream: state["networks"]["detector"][POINTWISE].update(streams=[stream]),
        )
        assert message.startswith(f"detector.{POINTWISE}: ")
        assert f"({len(values)} bytes for 512 values of 7 bits)" in message


@pytest.mark.parametrize(
    ("change", "beginning"),
    [
        (lambda state: state["networks"]["detector"].update(stranger={}), "unknown layers stranger"),
        (lambda state: state["networks"]["policy"].update(stranger={}), "unknown layers stranger"),
        (lambda state: state["networks"]["policy"].pop("blocks.2.shortcut"), "'blocks.2.shortcut'"),
        (lambda state: state["networks"].pop("policy"), "'policy'"),
        (lambda state: state.pop("architecture"), "'architecture'"),
        (lambda state: state["architecture"].pop("width"), "width"),
        (lambda state: state["architecture"].update(depth=3), "depth"),
        (lambda state: state["architecture"]["bits"].update(positions="some"), "some"),
        (lambda state: state["classes"].append("more"), "bytes for"),
        (lambda state: state.pop("eval"), "'eval'"),
        (lambda state: state["eval"].update(nms_iou=2.0), "eval.nms_iou: expected a number from 0 to 1, got 2.0"),
        (lambda state: state["eval"].update(depth=3), "unknown key eval.depth"),
        (lambda state: state.update(default_boxes_cxcywh=state["default_boxes_cxcywh"][1:]), "expected float32 [144"),
        (lambda state: state.update(default_boxes_cxcywh=state["default_boxes_cxcywh"].double()), "expected float32"),
    ],
)
def test_other_contents_are_refused_and_named(
    packed: Path, tmp_path: Path, change: Callable[[State], None], beginning: str
) -> None:
    message = refusal(packed, tmp_path / "changed.pt", change)
    assert "invalid (" in message
    assert beginning in message


def test_a_decompression_bomb_is_not_inflated(packed: Path, tmp_path: Path) -> None:
    size = 2**26
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(size), 1)), dtype=torch.uint8)
    state = load_checkpoint(packed)
    state["networks"]["detector"][STEM]["streams"] = [bomb]
    save_checkpoint(tmp_path / "bomb.pt", state)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"/bomb\.pt: detector\.{STEM}: .*217 bytes for 216 values of 8 bits"):
            load_packed(tmp_path / "bomb.pt")
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()


def test_an_uncalibrated_network_is_not_packed(tmp_path: Path) -> None:
    detector, policy = map(copy.deepcopy, trained("nested"))
    with torch.no_grad():
        policy.head.input_quantizer.log_step.fill_(torch.nan)
    with pytest.raises(InputError, match=r"^policy\.head: not calibrated"):
        save_packed(tmp_path / "packed.pt", detector, policy, architecture(BITS["nested"]), CLASSES, SETTINGS)
    assert list(tmp_path.iterdir()) == []
