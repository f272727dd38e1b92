"""Every setting of an experiment, and how it is read: one YAML file, then overrides from the command line.

One YAML serves all stages. Each dataclass below is one section of it; a field's default is what the YAML may leave out.
Nothing here imports torch, so that `--help` and configuration errors answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from instaqnas.errors import InputError

BitChoice = tuple[int, int]  # (weight bits, activation bits); 32 means "not quantized"
BoxSizes = tuple[int, int]  # (smaller, larger) in pixels


@dataclass(frozen=True)
class DataConfig:
    """Images and boxes in PASCAL VOC layout.

    Args:
        roots: folders with JPEGImages, Annotations and ImageSets/Main; several are joined.
        train_split: name of the split to train on.
        val_split: split that picks the best checkpoint; empty means that the last checkpoint counts.
        test_roots: folders of the test split; empty means `roots`.
        test_split: name of the split that eval.py reports.
        augmentation: `ssd` zooms, crops, distorts and flips; `flips` only flips: better in short trainings.
        vertical_flip: also flip images upside down in training (microscopy, drawings).
        workers: processes that decode and augment; 0 does it in the main process, -1 takes one per CPU, at most 8.
        cache: `ram` decodes every image once and keeps it, its shorter side shrunk to twice the network's input.
        policy_share: share of the train split, kept from the detector, that the policy learns from; 0: both get all.
    """

    roots: list[str]
    train_split: str = "train"
    val_split: str = ""
    test_roots: list[str] = field(default_factory=list)
    test_split: str = "test"
    augmentation: Literal["ssd", "flips"] = "ssd"
    vertical_flip: bool = False
    workers: int = -1
    cache: Literal["none", "ram"] = "none"
    policy_share: float = 0.0


@dataclass(frozen=True)
class DetectorConfig:
    """MobileNetV1-SSD.

    Args:
        image_size: side of the square input in pixels.
        width: width multiplier of all channels.
        extras_batch_norm: BatchNorm in the extra feature layers (the paper has none; helps training from scratch).
        box_sizes: six pairs [smaller, larger], the default boxes of each map in pixels; None takes the usual ones.
    """

    image_size: int = 300
    width: float = 1.0
    extras_batch_norm: bool = False
    box_sizes: list[BoxSizes] | None = None


@dataclass(frozen=True)
class BitsConfig:
    """Bit-widths as [weight bits, activation bits], 2 to 8, or 32 for full precision.

    Activations may have 1 bit where they are behind a ReLU: everywhere but at the stem.

    Args:
        choices: what the policy may choose from at each position, 1 to 8 pairs.
        positions: the layers that the policy controls; `pointwise` are the 13 of the paper.
        stem: fixed bits of the first convolution, where the policy does not control it.
        depthwise: fixed bits of the depthwise convolutions, likewise.
        extras: fixed bits of the extra feature layers, likewise.
        heads: fixed bits of the box and class heads, likewise.
        quantizer: how values are put on integer grids; see instaqnas/quant/quantizers.py.
        weights: one `shared` by all choices, `separate` ones (the paper), or a shared one with `nested` integers.
        per_channel: a step size per output channel of a weight instead of one per weight (lsq and lsq_plus).
    """

    choices: list[BitChoice] = field(default_factory=lambda: [(3, 4), (4, 4), (5, 4)])
    positions: Literal["pointwise", "backbone", "backbone+extras", "all"] = "pointwise"
    stem: BitChoice = (8, 8)
    depthwise: BitChoice = (8, 8)
    extras: BitChoice = (4, 4)
    heads: BitChoice = (8, 8)
    quantizer: Literal["lsq_plus", "lsq", "pact", "dorefa"] = "lsq_plus"
    weights: Literal["shared", "separate", "nested"] = "shared"
    per_channel: bool = False


@dataclass(frozen=True)
class PolicyConfig:
    """The policy network.

    Args:
        input: what it looks at, the `image` or the features of the detector's `stem`, which then stays as pretrained.
        pool: factor by which the image, or the features at half its size, are average-pooled first.
        width: channels of the first residual block; the later ones have 2, 4 and 8 times as many.
        bits: [weight bits, activation bits] at which it runs and is counted.
        effort: one more output, for the whole image, that moves all positions towards more or fewer bits.
    """

    input: Literal["image", "stem"] = "image"
    pool: int = 8
    width: int = 16
    bits: BitChoice = (8, 8)
    effort: bool = False


@dataclass(frozen=True)
class RewardConfig:
    """Reward of one image from its detection quality and its GBitOps, policy included.

    Quality is 0 to 1, or the negative `loss` of the detector on the image, which has no lower end. That goes with
    `quality` and `budget`, in which only differences of quality count. The multiplier of `budget` has to rise as far as
    losses differ, so `multiplier_lr` and `multiplier_gain` are to grow in that proportion. The other rewards need a
    share: `ratio` would look for costs where quality is negative, and the threshold of `window_*` lies from 0 to 1.

    Args:
        name: the formula; see instaqnas/policy/reward.py.
        quality: what quality means.
        score_threshold: detections scored lower do not count for the quality; `loss` counts all.
        exponent: strength of the cost in `ratio`.
        window_lower: lower end of the GBitOps window in `window_*`.
        window_upper_start: upper end of the window in the first epoch.
        window_upper_end: upper end of the window in the last epoch; between them it moves linearly.
        positive: weight of good images in `window_*`.
        negative: weight of bad images in `window_*`.
        quality_threshold: quality from which an image is good in `window_*`.
        target_gbitops: mean GBitOps of the greedy configurations that `budget` settles on.
        multiplier_lr: step of the multiplier of `budget` per policy step, by how far the cost is off, as a part of it.
        multiplier_gain: how much of that takes effect at once, beyond the steps; it damps swings about the target.
    """

    name: Literal["quality", "ratio", "window_gate", "window_scaled", "window_signed", "budget"] = "ratio"
    quality: Literal["precision", "recall", "f1", "ap", "loss"] = "f1"
    score_threshold: float = 0.3
    exponent: float = 0.1
    window_lower: float = 42.0
    window_upper_start: float = 49.0
    window_upper_end: float = 49.0
    positive: float = 30.0
    negative: float = -10.0
    quality_threshold: float = 0.6
    target_gbitops: float = 0.0
    multiplier_lr: float = 0.3
    multiplier_gain: float = 20.0


@dataclass(frozen=True)
class TrainConfig:
    """One training of the detector.

    Args:
        epochs: passes over the training split.
        batch_size: images a step, those of all processes.
        optimizer: `sgd` has Nesterov momentum 0.9.
        lr: peak learning rate; it falls to 0 on a cosine, per step.
        warmup_epochs: epochs of linear rise to the peak.
        weight_decay: on convolution weights only.
        step_size_lr_factor: learning rate of the quantizers' step sizes relative to `lr`.
        clip_grad_norm: largest norm of the gradients, of those of quantizers and of all others; 0 does not clip.
        eval_every: epochs between evaluations on the val split (the last epoch is always evaluated).
        save_every: epochs between checkpoints (the last epoch is always saved).
        save_minutes: minutes between checkpoints within an epoch; 0 has none there.
        keep_checkpoints: how many checkpoints of the last epochs to keep beside the last and the best.
        accumulate: equal parts of a batch, computed one after the other: less memory, BatchNorm for each part.
        ema_decay: validate and keep an average of the network that takes 1 - ema_decay of it at every step; 0 does not.
    """

    epochs: int = 10
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    warmup_epochs: float = 0.0
    weight_decay: float = 1e-4
    step_size_lr_factor: float = 1.0
    clip_grad_norm: float = 5.0
    eval_every: int = 5
    save_every: int = 1
    save_minutes: float = 10.0
    keep_checkpoints: int = 0
    accumulate: int = 1
    ema_decay: float = 0.0


@dataclass(frozen=True)
class PretrainFp32Config(TrainConfig):
    """The training in full precision.

    Args:
        pretrained: file of another project's weights to start from, as instaqnas/detector/pretrained.py reads; or none.
    """

    pretrained: str = ""


@dataclass(frozen=True)
class QuantTrainConfig(TrainConfig):
    """One training of the quantized detector.

    Args:
        distill_weight: weight of a further loss, the distance to the outputs of the full-precision network; 0 has none.
        batch_norm_batches: training batches, all at most, that give a result its BatchNorm statistics; 0: running ones.
        batch_renorm: normalise layers with several choices in training as in use, by BatchNorm's running statistics,
            within limits (batch renormalization).
    """

    distill_weight: float = 0.0
    batch_norm_batches: int = 0
    batch_renorm: bool = False


@dataclass(frozen=True)
class PretrainQuantConfig(QuantTrainConfig):
    """The training under random bit configurations.

    Args:
        sandwich: run a third of each batch at the cheapest choice everywhere, and a third at the dearest.
    """

    sandwich: bool = False


@dataclass(frozen=True)
class SearchConfig(QuantTrainConfig):
    """The search: each epoch trains the policy, then the detector under configurations sampled from it.

    Args:
        train_detector: if not, the policy alone is trained, and the detector stays as it was pretrained, but for the
            BatchNorm statistics that `batch_norm_batches` asks for, in batches of `batch_size`; learning rate and
            losses of the detector are then of no account.
        policy_lr: learning rate of the policy (Adam, constant).
        policy_batch_size: images a policy step, those of all processes.
        epsilon_start: share of uniform exploration in the first epoch.
        epsilon_end: share of uniform exploration in the last epoch; between them it moves linearly.
        entropy_start: weight of the entropy bonus in the first epoch.
        entropy_end: weight of the entropy bonus in the last epoch; between them it moves linearly.
        baseline: what a sample's reward is compared with, that of the `greedy` configuration or of the others (`rloo`).
        start: first distribution of the policy, `uniform`; mostly the best fixed configuration that the target of the
            reward `budget` allows (`static`); or the best for each image by the `sensitivity` of positions, which is
            taken to be the higher the more loss the image has under the cheapest bits (with `policy.effort`, the reward
            `budget` and `reward.quality` `loss`).
        samples: configurations that are drawn and judged for each image of a policy step; `rloo` needs 2.
        normalize_advantage: scale the advantages of a policy step to a root mean square of 1.
    """

    train_detector: bool = True
    policy_lr: float = 5e-4
    policy_batch_size: int = 64
    epsilon_start: float = 0.5
    epsilon_end: float = 0.0
    entropy_start: float = 0.01
    entropy_end: float = 0.0
    baseline: Literal["greedy", "rloo"] = "greedy"
    start: Literal["uniform", "static", "sensitivity"] = "uniform"
    samples: int = 1
    normalize_advantage: bool = True


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and post-processing.

    Args:
        batch_size: images a step.
        score_threshold: detections scored lower are dropped.
        nms_iou: boxes of one class that overlap a better one by more than this are dropped.
        candidates_per_class: boxes a class and image that enter non-maximum suppression.
        max_detections: detections kept an image.
    """

    batch_size: int = 32
    score_threshold: float = 0.01
    nms_iou: float = 0.45
    candidates_per_class: int = 200
    max_detections: int = 200


@dataclass(frozen=True)
class RuntimeConfig:
    """How fast it runs. Apart from `amp`, only rounding depends on it.

    There is no fp16: integer sums pass its largest number, 65,504.

    Args:
        compile: fuse the elementwise passes of quantized layers; `auto` does if a compiler is found, `on` insists.
        channels_last: memory layout of the full-precision network.
        amp: arithmetic of the detector's convolutions; bf16 holds levels up to 256 exactly and rounds the sums.
        threads: CPU threads of the main process; 0 leaves it to torch.
    """

    compile: Literal["auto", "on", "off"] = "auto"
    channels_last: bool = True
    amp: Literal["off", "bf16"] = "off"
    threads: int = 0


@dataclass(frozen=True)
class Config:
    """A whole experiment.

    Args:
        data: images and boxes.
        detector: the network that is quantized.
        bits: bit-widths of its layers.
        policy: the network that chooses them.
        reward: what the policy is trained for.
        pretrain_fp32: first training of pretrain.py, full precision.
        pretrain_quant: second training of pretrain.py, quantized under random bit configurations.
        search: training of search.py.
        finetune: training of finetune.py.
        eval: evaluation and post-processing.
        runtime: speed.
        seed: seed of everything random.
        device: `auto` takes CUDA if present.

    Raises:
        InputError: a value outside its range; the message names its dotted key.
    """

    data: DataConfig
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pretrain_fp32: PretrainFp32Config = field(default_factory=PretrainFp32Config)
    pretrain_quant: PretrainQuantConfig = field(default_factory=PretrainQuantConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: QuantTrainConfig = field(default_factory=QuantTrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_combinations(self)


# --- Allowed values ---------------------------------------------------------------------------------------------------


def _are_signed_bits(pair: BitChoice) -> bool:
    return all(2 <= bits <= 8 or bits == 32 for bits in pair)


def _are_bits(pair: BitChoice) -> bool:
    weight_bits, activation_bits = pair
    return _are_signed_bits(pair) or (activation_bits == 1 and _are_signed_bits((weight_bits, 2)))


def _are_choices(choices: list[BitChoice]) -> bool:
    return 1 <= len(choices) <= 8 and len(set(map(tuple, choices))) == len(choices) and all(map(_are_bits, choices))


def _are_box_sizes(sizes: list[BoxSizes] | None) -> bool:
    return sizes is None or (len(sizes) == 6 and all(0 < smaller < larger for smaller, larger in sizes))


# (fields, the test, what it asks for). A rule holds for the field of that name in every section.
_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("roots", lambda v: len(v) > 0 and all(v), "at least one folder, such as [VOCdevkit/VOC2007]"),
    ("test_roots", all, "folders"),
    ("train_split test_split", len, "the name of a split"),
    (
        "epochs batch_size policy_batch_size samples accumulate eval_every save_every pool candidates_per_class "
        "max_detections",
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        "threads warmup_epochs weight_decay step_size_lr_factor clip_grad_norm entropy_start entropy_end exponent "
        "window_lower positive target_gbitops multiplier_gain distill_weight batch_norm_batches save_minutes "
        "keep_checkpoints",
        lambda v: v >= 0,
        "at least 0",
    ),
    ("ema_decay policy_share", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    ("workers", lambda v: v >= -1, "at least 0, or -1 for one per CPU"),
    ("seed", lambda v: 0 <= v < 2**32, "0 to 4294967295"),
    ("negative", lambda v: v <= 0, "at most 0"),
    ("width lr policy_lr multiplier_lr", lambda v: v > 0, "more than 0"),
    (
        "score_threshold quality_threshold nms_iou epsilon_start epsilon_end",
        lambda v: 0 <= v <= 1,
        "a number from 0 to 1",
    ),
    ("image_size", lambda v: v >= 64, "at least 64"),
    ("stem bits", _are_signed_bits, "bit-widths from 2 to 8, or 32"),
    ("depthwise extras heads", _are_bits, "bit-widths from 2 to 8, or 32, or 1 for activations"),
    ("choices", _are_choices, "one to eight different pairs of bit-widths from 2 to 8, or 32, or 1 for activations"),
    ("box_sizes", _are_box_sizes, "six pairs [smaller, larger] above 0"),
]
_RANGE_OF = {name: (test, wanted) for names, test, wanted in _RANGES for name in names.split()}


def _check_ranges(config: Config) -> None:
    for key, value in _flatten(asdict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise _unexpected(key, "a finite number", value)
        test, wanted = _RANGE_OF.get(key.rpartition(".")[2], (None, ""))
        if test is not None and not test(value):
            raise _unexpected(key, wanted, value)


def _check_combinations(config: Config) -> None:
    for section in ("pretrain_fp32", "pretrain_quant", "search", "finetune"):
        settings: TrainConfig = getattr(config, section)
        warmup, epochs, parts, batch = settings.warmup_epochs, settings.epochs, settings.accumulate, settings.batch_size
        if warmup > epochs:
            raise _unexpected(f"{section}.warmup_epochs", f"at most {section}.epochs = {epochs}", warmup)
        if batch % parts:
            raise _unexpected(f"{section}.accumulate", f"a divisor of {section}.batch_size = {batch}", parts)
    _check_policy(config)
    _check_bits(config.bits)
    _check_reward(config.reward)
    if config.search.start == "sensitivity" and not config.policy.effort:
        raise _unexpected("policy.effort", "true for search.start = sensitivity", config.policy.effort)
    if config.search.start == "sensitivity" and config.reward.quality != "loss":  # its price is in units of that
        raise _unexpected("reward.quality", "loss for search.start = sensitivity", config.reward.quality)
    if config.search.start != "uniform" and config.reward.name != "budget":
        raise _unexpected("search.start", f"uniform for reward.name = {config.reward.name}", config.search.start)
    if config.search.ema_decay and not config.search.train_detector:
        raise _unexpected("search.ema_decay", "0 for search.train_detector = false", config.search.ema_decay)
    if config.search.baseline == "rloo" and config.search.samples < 2:
        raise _unexpected("search.samples", "at least 2 for search.baseline = rloo", config.search.samples)


def _check_policy(config: Config) -> None:
    pool, image_size, positions = config.policy.pool, config.detector.image_size, config.bits.positions
    if config.policy.input == "stem":
        if positions != "pointwise":
            raise _unexpected("policy.input", f"image for bits.positions = {positions}", config.policy.input)
        if pool > (image_size + 1) // 2:
            raise _unexpected("policy.pool", f"at most half of detector.image_size = {image_size}", pool)
    if pool > image_size:
        raise _unexpected("policy.pool", f"at most detector.image_size = {image_size}", pool)


def _check_bits(bits: BitsConfig) -> None:
    if bits.positions != "pointwise" and any(activation_bits == 1 for _, activation_bits in bits.choices):
        wanted = (
            f"at least 2 bits for activations with bits.positions = {bits.positions}: the image is not behind a ReLU"
        )
        raise _unexpected("bits.choices", wanted, bits.choices)
    if bits.quantizer not in ("lsq_plus", "lsq"):
        if bits.per_channel:
            raise _unexpected("bits.per_channel", f"false for bits.quantizer = {bits.quantizer}", value=True)
        if bits.weights == "nested":
            raise _unexpected("bits.weights", f"shared or separate for bits.quantizer = {bits.quantizer}", bits.weights)


def _check_reward(reward: RewardConfig) -> None:
    if reward.quality == "loss" and reward.name not in ("quality", "budget"):
        raise _unexpected("reward.quality", f"precision, recall, f1 or ap for reward.name = {reward.name}", "loss")
    if reward.name == "budget" and reward.target_gbitops == 0:
        raise _unexpected("reward.target_gbitops", "more than 0 for the reward `budget`", reward.target_gbitops)
    if reward.name.startswith("window_"):
        lower = reward.window_lower
        for name, upper in (("start", reward.window_upper_start), ("end", reward.window_upper_end)):
            if upper <= lower:
                raise _unexpected(f"reward.window_upper_{name}", f"more than reward.window_lower = {lower}", upper)


def _unexpected(key: str, wanted: str, value: object) -> InputError:
    return InputError(f"{key}: expected {wanted}, got {_shown(value)}")


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # one line, whatever the value


# --- Plain dictionaries -----------------------------------------------------------------------------------------------


def to_plain(config: Config) -> dict[str, Any]:
    """Returns the nested dictionaries, lists, numbers and texts that YAML and checkpoints can hold."""
    return _plain(asdict(config))


def from_plain(plain: dict[str, Any]) -> Config:
    """Returns the `Config` of nested dictionaries as `to_plain` makes them; keys left out take their defaults.

    Raises:
        InputError: an unknown key, a value of the wrong type or outside its range; the message names the dotted key.
    """
    parser = _SettingParser()
    return parser.build(parser.parse_object(_leaves(plain)))


def completed(plain: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Returns sections of a plain configuration with the defaults of settings that did not exist when it was written.

    What the other sections hold does not matter; they may be of a version with other settings.

    Raises:
        KeyError: it has no such section.
        InputError: as `from_plain`.
    """
    wanted = dict.fromkeys(sections)
    whole = to_plain(from_plain({section: plain[section] for section in {**wanted, "data": None}}))
    return {section: whole[section] for section in wanted}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line such as `search.epochs: 8 -> 10` for each setting in which two plain configurations differ."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    absent = object()
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        values = [side.get(key, absent) for side in (before, after)]
        if values[0] != values[1]:
            lines.append(f"{key}: " + " -> ".join("(absent)" if value is absent else _shown(value) for value in values))
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flatten(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each setting."""
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --- Reading YAML -----------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice, of which YAML readers silently keep the last."""

    # Checked while composing: by the time of constructing, `<<` may have merged keys that are allowed to repeat.
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in first_line:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value} is written twice, first on line {first_line[key.value]}",
                    problem_mark=key.start_mark,
                )
            first_line[str(key.value)] = key.start_mark.line + 1
        return node


# `off` and `on` are words, as YAML 1.2 has it: PyYAML would make booleans of them.
_BOOLEAN = "tag:yaml.org,2002:bool"
_UniqueKeyLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _read_yaml(path: Path) -> dict[str, Any]:
    """Returns the nested dictionaries of a YAML file, keys and types not yet checked."""
    try:
        content = yaml.load(path.read_bytes(), _UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {_one_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2012-31-31
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections such as `data:`, got {_one_line(content)}")
    return content


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# --- Keys and types ---------------------------------------------------------------------------------------------------

_WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts, such as [a, b]",
    list[BoxSizes] | None: "a list of [smaller, larger]",
    BitChoice: "[weight bits, activation bits]",
    list[BitChoice]: "a list of [weight bits, activation bits]",
}


@dataclass(frozen=True)
class _Setting:
    """One field of one section: its type, default (None if it has none) and text in the section's docstring."""

    hint: Any
    default: Any
    text: str

    @property
    def wanted(self) -> str:
        if get_origin(self.hint) is Literal:
            return f"one of {', '.join(get_args(self.hint))}"
        return _WANTED[self.hint]


def _settings(section: type = Config, prefix: str = "") -> dict[str, _Setting]:
    """Returns every setting by its dotted key, in the order of the dataclasses."""
    hints, texts = get_type_hints(section), _texts(section)
    found: dict[str, _Setting] = {}
    for item in fields(section):
        key, hint = prefix + item.name, hints[item.name]
        if is_dataclass(hint):
            found |= _settings(hint, f"{key}.")
        else:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            found[key] = _Setting(hint, None if default is MISSING else default, texts[item.name])
    return found


def _texts(section: type) -> dict[str, str]:
    """Returns the texts below `Args:` by field name, each as one line, those of the base class included."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        texts = re.findall(r"^    (\w+): (.+(?:\n {8,}.+)*)$", inspect.cleandoc(cls.__doc__), flags=re.MULTILINE)
        found |= {name: " ".join(text.split()) for name, text in texts}
    return found


def _leaves(values: dict[str, Any], section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Returns the values by dotted key, once each of them is known to be a setting; their types are not yet checked."""
    hints = get_type_hints(section)
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            advice = _did_you_mean(key, [*_settings(), *get_type_hints(Config)])
            if "." in str(name):
                advice = " YAML sections are indented, not dotted;"
            raise InputError(f"unknown key {key};{advice} known: {', '.join(hints)}")
        if not is_dataclass(hints[name]):
            found[key] = value
        elif isinstance(value, dict):
            found |= _leaves(value, hints[name], f"{key}.")
        elif value is not None:  # None: the section's name with nothing below it
            raise InputError(f"{key}: expected a section of settings, got {_one_line(value)}")
    return found


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {nearest[0]}?" if nearest else ""


class _SettingParser(jsonargparse.ArgumentParser):
    """Turns YAML values and the words after options into the types of the settings."""

    def __init__(self) -> None:
        super().__init__(usage=argparse.SUPPRESS, add_help=False)
        self.settings = _settings()
        titles = {"general": ""} | _texts(Config)
        groups: dict[str, Any] = {}
        for key, setting in self.settings.items():
            section = key.rpartition(".")[0] or "general"
            if section not in groups:
                groups[section] = self.add_argument_group(section, titles[section])
            groups[section].add_argument(
                f"--{key}", type=setting.hint, default=setting.default, help=setting.text.replace("%", "%%")
            )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        wrong_type = re.search(r'key "([\w.]+)".*value: (.*)', message, flags=re.DOTALL)
        if wrong_type and wrong_type[1] in self.settings:
            message = f"{wrong_type[1]}: expected {self.settings[wrong_type[1]].wanted}, got {wrong_type[2]}"
        raise InputError(_one_line(message)) from ex

    def build(self, values: jsonargparse.Namespace) -> Config:
        for key, setting in self.settings.items():
            if values[key] is None and type(None) not in get_args(setting.hint):  # jsonargparse takes None for any type
                raise InputError(f"{key}: no value given, expected {setting.wanted}")
        return _build(Config, values.as_dict())


def _build(section: type, values: dict[str, Any]) -> Any:
    hints = get_type_hints(section)
    return section(
        **{name: _build(hints[name], value) if is_dataclass(hints[name]) else value for name, value in values.items()}
    )


# --- The command line -------------------------------------------------------------------------------------------------

_STAGES = {
    "pretrain": "Trains the detector in full precision, then quantized under random bit configurations.",
    "search": "Trains the policy, and the detector under the configurations it samples.",
    "finetune": "Trains the detector under the frozen, greedy policy, or under one fixed bit configuration.",
    "eval": "Reports detection quality and cost on the test split.",
}
_INIT_TEXT = {
    "pretrain": "leave the full precision training out and quantize the detector of this checkpoint",
    "search": "start from this checkpoint instead of the run's pretrained one",
    "finetune": "start from this checkpoint instead of the run's searched one (fixed --bits: its pretrained one)",
    "eval": "evaluate this checkpoint instead of the run's latest stage",
}
SEVERAL_BITS = ("basic", "all")  # tables of eval.py: without and with the rivals that have to be looked for
_BITS = {  # ways to choose bits that a stage knows, beside the uniform ones
    "finetune": ("policy", "static", "modal"),
    "eval": ("policy", "fp32", "random", "shuffled", "frequencies", "modal", "static", *SEVERAL_BITS),
}


def known_bits(stage: str, choices: Sequence[BitChoice]) -> list[str]:
    """What `--bits` of finetune or eval takes; `uniform:w3a4` and so on for each of the choices."""
    return [*_BITS[stage], *(f"uniform:w{weight}a{activation}" for weight, activation in choices)]


@dataclass(frozen=True)
class Command:
    """What one of the entry scripts is asked to do.

    Args:
        config: every setting of the experiment.
        run: folder of all that the stages of one experiment write.
        init: checkpoint to start from; None takes that of the stage before.
        restart: start the stage over instead of continuing it; what it wrote so far is kept beside it.
        bits: how bits are chosen, one of `known_bits`; finetune.py and eval.py alone ask for it.
    """

    config: Config
    run: Path
    init: Path | None = None
    restart: bool = False
    bits: str = "policy"


def parse_command(stage: str, argv: list[str] | None = None) -> Command:
    """Returns the command for `stage` (pretrain, search, finetune or eval) from `argv` (default: the process's own).

    Settings come from the YAML file, then from options such as `--search.epochs 3`; `--help` prints them and exits.

    Raises:
        InputError: a file that is missing or not valid YAML, an unknown key or option, a value of the wrong type or
            outside its range. The message is one line that names it.
    """
    settings = _SettingParser()
    parser = _stage_parser(stage, settings)
    options, overrides = parser.parse_known_args(argv)
    _check_options(overrides, [*settings.settings, *vars(options)])
    if options.config is None:
        raise InputError(f"--config FILE is missing, such as: python {stage}.py --config configs/shapes.yaml")
    content = _read_yaml(options.config)
    try:
        values = settings.parse_object(_leaves(content))
    except InputError as error:
        raise InputError(f"{options.config}: {error}") from None
    config = settings.build(settings.parse_args(overrides, namespace=values))
    if options.init is not None and not options.init.is_file():
        raise InputError(f"--init {options.init}: no such file")
    if stage in _BITS:
        known = known_bits(stage, config.bits.choices)
        if options.bits not in known:
            raise InputError(f"--bits: expected one of {', '.join(known)}, got {options.bits}")
    run = options.run or Path("runs") / options.config.stem
    return Command(**{**vars(options), "config": config, "run": run})


class _StageParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _stage_parser(stage: str, settings: _SettingParser) -> argparse.ArgumentParser:
    """Returns the parser of the options that are no settings.

    It stands apart because jsonargparse cannot hold `--bits` beside `--bits.choices`.
    """
    parser = _StageParser(
        prog=f"{stage}.py",
        usage=f"python {stage}.py --config FILE [options] [--SECTION.SETTING VALUE ...]",
        description=_STAGES[stage],
        epilog="Settings, which override those of the YAML file:\n\n" + settings.format_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the experiment (required)")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="what the run writes (default: runs/<name of FILE>)")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help=_INIT_TEXT[stage])
    if stage in _BITS:
        parser.add_argument(
            "--bits",
            default="policy",
            help=f"{', '.join(_BITS[stage])} or uniform:w3a4 (any of bits.choices); default: policy; "
            "the settings --bits.choices and so on are something else",
        )
    if stage != "eval":
        parser.add_argument(
            "--restart", action="store_true", help="start the stage over; what it wrote so far is kept beside it"
        )
    return parser


def _check_options(words: list[str], known: list[str]) -> None:
    options = {f"--{name}" for name in known}
    for word in words:
        option = word.partition("=")[0].removesuffix("+")  # `--data.roots+ x` appends to a list
        if option.startswith("--") and option not in options:
            hint = _did_you_mean(option, options) or " --help lists all"
            raise InputError(f"unknown option {option};{hint}")
