"""The settings of an experiment.

One YAML file serves all stages. Each dataclass below is one section of it, and a setting that the YAML leaves out takes
the default of its field. The docstrings are also the texts of `--help`. Nothing here imports torch, so that `--help`
and configuration errors answer at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from instaqnas.bits import (
    Amp,
    Augmentation,
    Baseline,
    BitChoice,
    CompileMode,
    Configurations,
    ImageCache,
    OptimizerName,
    Orientation,
    PolicyInput,
    Positions,
    QuantizerName,
    RewardName,
    RewardQuality,
    Samples,
    SearchStart,
    WeightSharing,
    choice_names,
)
from instaqnas.config.ranges import (
    BITS,
    BITS_BEHIND_RELU,
    BOX_SIZES,
    BUDGETS,
    CHOICES,
    FRACTION,
    FRACTION_BELOW_1,
    LEVELS,
    BoxSizes,
    Budgets,
    Range,
    at_least,
    at_most,
    check_ranges,
    more_than,
    setting,
    unexpected,
)

FOLDERS = Range(all, "folders")
SOME_FOLDERS = Range(lambda roots: len(roots) > 0 and all(roots), "at least one folder, such as [VOCdevkit/VOC2007]")
SPLIT_NAME = Range(bool, "the name of a split")
WORKERS = Range(lambda workers: workers >= -1, "at least 0, or -1 for one per CPU")
SAMPLES = Range(lambda samples: samples == "all" or samples >= 1, "at least 1, or all")
DEVICE = Range(
    lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None, "auto, cpu, cuda, or one GPU such as cuda:1"
)
SEED = Range(lambda seed: 0 <= seed < 2**32, "0 to 4294967295")


@dataclass(frozen=True)
class DataConfig:
    """Images and boxes in PASCAL VOC layout; see instaqnas/data/voc.py.

    Args:
        roots: folders with JPEGImages, Annotations and ImageSets/Main; several are joined.
        train_split: split to train on.
        val_split: split that picks the best checkpoint of pretraining and finetuning; empty: the last one counts.
        test_roots: folders of the test split; empty: `roots`.
        test_split: split that eval.py reports on.
        augmentation: `ssd` zooms, crops, distorts colours and flips; `flips` only flips, which suits short trainings.
        vertical_flip: flip training images upside down too (microscopy, drawings).
        workers: processes that decode and augment; 0: the main process does it; -1: one per CPU, at most 8.
        cache: `ram` decodes every training image once and keeps it, its shorter side at most twice `image_size`.
        orientation: pixels that boxes refer to in images with an EXIF orientation: `stored` ones, those of the
            `upright` picture, or `auto`: stored, unless only the upright picture has the size in the annotation.
        policy_share: fraction of the train split that trains only the policy, from 0 to below 1; the rest trains the
            detector. 0: all images train both.
    """

    roots: list[str] = field(metadata={"range": SOME_FOLDERS})
    train_split: str = setting("train", SPLIT_NAME)
    val_split: str = ""
    test_roots: list[str] = field(default_factory=list, metadata={"range": FOLDERS})
    test_split: str = setting("test", SPLIT_NAME)
    augmentation: Augmentation = "ssd"
    vertical_flip: bool = False
    workers: int = setting(-1, WORKERS)
    cache: ImageCache = "none"
    orientation: Orientation = "auto"
    policy_share: float = setting(0.0, FRACTION_BELOW_1)


@dataclass(frozen=True)
class DetectorConfig:
    """MobileNetV1-SSD.

    Args:
        image_size: side of the square input in pixels, at least 64.
        width: width multiplier of all channels, above 0.
        extras_batch_norm: BatchNorm in the extra feature layers; not in the paper, but helps training from scratch.
        box_sizes: sizes of the default boxes in pixels, a pair [smaller, larger] for each of the six feature maps. They
            are of the network's input, but do not follow `image_size`. null: the published ones, 20 % to 110 % of
            `image_size`, which do. instaqnas.tools.preflight tells how many objects they fit, and suggests others.
        min_negatives: least number of hard negatives of each image in the loss. The paper has none for an image without
            objects, which then teaches nothing; 3 or more let empty images teach.
    """

    image_size: int = setting(300, at_least(64))
    width: float = setting(1.0, more_than(0))
    extras_batch_norm: bool = False
    box_sizes: list[BoxSizes] | None = setting(None, BOX_SIZES)
    min_negatives: int = setting(0, at_least(0))


@dataclass(frozen=True)
class BitsConfig:
    """Bit-widths of the detector, as pairs [weight bits, activation bits]: 2 to 8, or 32 for full precision.

    In all layers but the stem, activations come from a ReLU and may also have 1 bit; the stem then has 2.

    Args:
        choices: 1 to 8 different pairs, from which the policy chooses at each position.
        positions: layers that the policy controls, one choice each; `pointwise`: the 13 pointwise convolutions, as in
            the paper. `network`: one choice per image, a level, for all layers together.
        levels: for `network`, 1 to 8 levels, each a list of the bits of all layers, or the JSON file of
            instaqnas.tools.levels that holds them. null: each of the choices is a level, with the same bits in all
            layers.
        stem: bits of the first convolution, unless the policy controls it.
        depthwise: bits of the depthwise convolutions, unless the policy controls them.
        extras: bits of the extra feature layers, unless the policy controls them.
        heads: bits of the box and class heads, unless the policy controls them.
        quantizer: quantization method; see instaqnas/quant/quantizers.py.
        weights: `shared`: one weight for all choices; `separate`: one for each, as in the paper; `nested`: one weight,
            whose integers at fewer bits are the top bits of the widest (lsq and lsq_plus).
        per_channel: one step size for each output channel of a weight, not one for all (lsq and lsq_plus).
    """

    choices: list[BitChoice] = field(
        default_factory=lambda: [(3, 4), (4, 4), (5, 4)],
        metadata={"range": CHOICES},
    )
    positions: Positions = "pointwise"
    levels: list[list[BitChoice]] | None = setting(None, LEVELS)
    stem: BitChoice = setting((8, 8), BITS)
    depthwise: BitChoice = setting((8, 8), BITS_BEHIND_RELU)
    extras: BitChoice = setting((4, 4), BITS_BEHIND_RELU)
    heads: BitChoice = setting((8, 8), BITS_BEHIND_RELU)
    quantizer: QuantizerName = "lsq_plus"
    weights: WeightSharing = "shared"
    per_channel: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the K choices, see `instaqnas.bits.choice_names`."""
        return choice_names(self.choices, self.levels)


@dataclass(frozen=True)
class PolicyConfig:
    """The policy network.

    Args:
        input: `image`, or the features of the detector's `stem`, whose pretrained weights then stay as they are.
        pool: factor by which the input is average-pooled first; the features have half the size of the image.
        width: channels of the first residual block; the next three have 2, 4 and 8 times as many.
        bits: [weight bits, activation bits] of the policy's own layers; the last has at least 8 of each.
        effort: one more output for the whole image, which shifts all positions towards more or fewer bits.
    """

    input: PolicyInput = "image"
    pool: int = setting(8, at_least(1))
    width: int = setting(16, more_than(0))
    bits: BitChoice = setting((8, 8), BITS)
    effort: bool = False


@dataclass(frozen=True)
class RewardConfig:
    """Reward of one image, from its detection quality q and its GBitOps, policy included.

    q lies in [0, 1], or is minus the detector's loss on the image, which has no lower bound. Minus the loss goes with
    the rewards `quality` and `budget`, where only differences of q count. `ratio` and `window_*` need q in [0, 1]:
    `ratio` would reward cost if q were negative, and the threshold of `window_*` is a number from 0 to 1. Losses differ
    more than F1 does; `multiplier_lr` and `multiplier_gain` have to grow in proportion.

    Args:
        name: the formula; see instaqnas/policy/reward.py.
        quality: q: `precision`, `recall`, `f1` or `ap` of the image's detections, or minus the `loss`.
        score_threshold: lowest score of a detection that counts for q, from 0 to 1; `loss` has no threshold.
        exponent: exponent of the relative cost in `ratio`.
        window_lower: lower end of the window of `window_*`, in GBitOps.
        window_upper_start: upper end of the window in the first epoch, in GBitOps.
        window_upper_end: upper end of the window in the last epoch; linear in between.
        positive: factor for images with q >= `quality_threshold` in `window_*`.
        negative: factor for the other images in `window_gate` and `window_signed`, at most 0.
        quality_threshold: lowest q of a good image in `window_*`, from 0 to 1.
        target_gbitops: mean GBitOps of the greedy configurations that `budget` aims at, above 0 there.
        multiplier_lr: step of dual ascent in `budget`: every policy step adds
            multiplier_lr * (mean GBitOps / target - 1) to the multiplier.
        multiplier_gain: factor of the proportional term, multiplier_gain * (moving mean of GBitOps / target - 1), which
            is added to the multiplier and damps oscillations around the target.
    """

    name: RewardName = "ratio"
    quality: RewardQuality = "f1"
    score_threshold: float = setting(0.3, FRACTION)
    exponent: float = setting(0.1, at_least(0))
    window_lower: float = setting(42.0, at_least(0))
    window_upper_start: float = 49.0
    window_upper_end: float = 49.0
    positive: float = setting(30.0, at_least(0))
    negative: float = setting(-10.0, at_most(0))
    quality_threshold: float = setting(0.6, FRACTION)
    target_gbitops: float = setting(0.0, at_least(0))
    multiplier_lr: float = setting(0.3, more_than(0))
    multiplier_gain: float = setting(20.0, at_least(0))


@dataclass(frozen=True)
class TrainConfig:
    """One training of the detector.

    Args:
        epochs: passes over the training split.
        batch_size: images per step, over all processes.
        optimizer: `adamw`, or `sgd` with Nesterov momentum 0.9.
        lr: peak learning rate; after the warm-up it falls to 0 along a cosine, step by step.
        warmup_epochs: epochs of linear warm-up, at most `epochs`; fractions are allowed.
        weight_decay: weight decay of the convolution weights; other parameters have none.
        step_size_lr_factor: learning rate of the quantizers' parameters, relative to `lr`.
        clip_grad_norm: largest norm of the gradient, separately for the quantizers' parameters and for all others;
            0: no clipping.
        eval_every: epochs between evaluations on the val split; the last epoch is always evaluated.
        save_every: epochs between checkpoints; the last epoch is always saved.
        save_minutes: minutes between checkpoints within an epoch; 0: none within an epoch.
        keep_checkpoints: number of older epochs whose checkpoints are kept, in addition to last.pt and best.pt.
        accumulate: number of equal parts of a batch, computed one after the other to save memory; BatchNorm normalises
            each part on its own.
        ema_decay: decay per step of a moving average of the weights, from 0 to below 1; the average is validated and
            kept. 0: no average.
    """

    epochs: int = setting(10, at_least(1))
    batch_size: int = setting(32, at_least(1))
    optimizer: OptimizerName = "adamw"
    lr: float = setting(1e-3, more_than(0))
    warmup_epochs: float = setting(0.0, at_least(0))
    weight_decay: float = setting(1e-4, at_least(0))
    step_size_lr_factor: float = setting(1.0, at_least(0))
    clip_grad_norm: float = setting(5.0, at_least(0))
    eval_every: int = setting(5, at_least(1))
    save_every: int = setting(1, at_least(1))
    save_minutes: float = setting(10.0, at_least(0))
    keep_checkpoints: int = setting(0, at_least(0))
    accumulate: int = setting(1, at_least(1))
    ema_decay: float = setting(0.0, FRACTION_BELOW_1)


@dataclass(frozen=True)
class PretrainFp32Config(TrainConfig):
    """The training in full precision.

    Args:
        pretrained: file with weights to start from, in a format of instaqnas/detector/pretrained.py; empty: random
            weights.
    """

    pretrained: str = ""


@dataclass(frozen=True)
class QuantTrainConfig(TrainConfig):
    """One training of the quantized detector.

    Args:
        distill_weight: weight of the distillation loss, against the outputs of the full-precision network; 0: none.
        batch_norm_batches: number of training batches, at most one epoch, that the result's BatchNorm statistics are
            computed from; 0: the running statistics stay.
        batch_renorm: batch renormalization in layers with several choices: training normalises by the running
            statistics, as evaluation does, within limits.
    """

    distill_weight: float = setting(0.0, at_least(0))
    batch_norm_batches: int = setting(0, at_least(0))
    batch_renorm: bool = False


@dataclass(frozen=True)
class PretrainQuantConfig(QuantTrainConfig):
    """The quantized training under many bit configurations.

    Args:
        configurations: of the images; `random`: every choice equally likely; `sandwich`: a third of each batch has the
            cheapest choice at all positions, a third the most expensive one, the others random ones; `ends`: every step
            runs its batch at the most expensive choice at all positions, then at the cheapest one, which learns from
            the outputs of the former, at twice the time and with `accumulate` 1; `policy`: sampled
            from a first policy, whose cost per image grows with the loss of the full-precision network, and is
            `reward.target_gbitops` on average. `policy` needs `policy.effort` and the reward `budget`.
        explore: share of the images that get random choices under `policy`, from 0 to 1.
    """

    configurations: Configurations = "random"
    explore: float = setting(0.1, FRACTION)


@dataclass(frozen=True)
class SearchConfig(QuantTrainConfig):
    """The search: each epoch trains the policy, then the detector under configurations sampled from it.

    Args:
        train_detector: train the detector too. If not, it stays as pretrained, except for BatchNorm statistics
            (`batch_norm_batches` of `batch_size` images); learning rate and losses of the detector are then ignored.
        policy_lr: learning rate of the policy (Adam, constant).
        policy_batch_size: images per policy step, over all processes.
        epsilon_start: exploration in the first epoch, from 0 to 1: choices are sampled from a mixture of the policy
            and, with this weight, the uniform distribution.
        epsilon_end: exploration in the last epoch; linear in between.
        entropy_start: weight of the entropy bonus in the first epoch.
        entropy_end: weight of the entropy bonus in the last epoch; linear in between.
        baseline: reward that a sample's reward is compared with: of the `greedy` configuration, or the mean of the
            image's other samples (`rloo`).
        start: initial distribution of the policy: `uniform`; mostly the best fixed configuration within
            `reward.target_gbitops` (`static`); mostly the best configuration for each image, by the `sensitivity` of
            positions times a factor that grows with the image's loss at the cheapest bits; or the policy that the
            network was `pretrained` under. All but `uniform` need the reward `budget`; `sensitivity` needs
            `policy.effort` and `reward.quality` `loss`, `pretrained` needs `pretrain_quant.configurations` `policy`.
        samples: configurations sampled for each image of a policy step; `rloo` needs 2. `all` judges each of the K
            choices once and takes the exact expectation, without `epsilon_*` and `baseline`; it needs
            `bits.positions` `network`.
        normalize_advantage: scale the advantages of a policy step to a root mean square of 1.
    """

    train_detector: bool = True
    policy_lr: float = setting(5e-4, more_than(0))
    policy_batch_size: int = setting(64, at_least(1))
    epsilon_start: float = setting(0.5, FRACTION)
    epsilon_end: float = setting(0.0, FRACTION)
    entropy_start: float = setting(0.01, at_least(0))
    entropy_end: float = setting(0.0, at_least(0))
    baseline: Baseline = "greedy"
    start: SearchStart = "uniform"
    samples: Samples = setting(1, SAMPLES)
    normalize_advantage: bool = True


@dataclass(frozen=True)
class FinetuneConfig(QuantTrainConfig):
    """The training under the frozen policy.

    Args:
        budgets: [lowest, highest] mean GBitOps, policy included, between which every batch draws a budget of its own,
            so that all levels stay trained for what other budgets give them. null: the policy as it is.
    """

    budgets: Budgets | None = setting(None, BUDGETS)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and post-processing.

    Args:
        batch_size: images per step, over all processes.
        score_threshold: lowest score of a detection, from 0 to 1.
        nms_iou: highest IoU of two detections of one class, from 0 to 1; NMS drops the one with the lower score.
        candidates_per_class: boxes per class and image that enter NMS, the best by score.
        max_detections: detections kept per image.
    """

    batch_size: int = setting(32, at_least(1))
    score_threshold: float = setting(0.01, FRACTION)
    nms_iou: float = setting(0.45, FRACTION)
    candidates_per_class: int = setting(200, at_least(1))
    max_detections: int = setting(200, at_least(1))


@dataclass(frozen=True)
class RuntimeConfig:
    """Speed. Except for `amp`, these settings change results only by rounding.

    There is no fp16: integer sums exceed its largest number, 65,504.

    Args:
        compile: fuse the elementwise passes of quantized layers with torch.compile; `auto` if a compiler is found, `on`
            fails without one.
        channels_last: use the channels-last memory layout for the full-precision network.
        amp: arithmetic of the detector's convolutions; `bf16` is exact for levels up to 256 and rounds their sums.
        threads: CPU threads of the main process; 0: the default of torch.
    """

    compile: CompileMode = "auto"
    channels_last: bool = True
    amp: Amp = "off"
    threads: int = setting(0, at_least(0))


@dataclass(frozen=True)
class Config:
    """A whole experiment.

    Args:
        data: images and boxes.
        detector: the network that is quantized.
        bits: bit-widths of its layers.
        policy: the network that chooses them.
        reward: the reward that the policy is trained for.
        pretrain_fp32: first training of pretrain.py, in full precision.
        pretrain_quant: second training of pretrain.py, quantized under random bit configurations.
        search: training of search.py.
        finetune: training of finetune.py.
        eval: evaluation and post-processing.
        runtime: speed.
        seed: seed of all random numbers, 0 to 4294967295.
        device: `auto` takes CUDA if there is one; `cpu`, `cuda`, or one GPU of several, such as `cuda:1`.

    Raises:
        InputError: a value outside its range, or settings that do not go together; the message names the dotted key.
    """

    data: DataConfig
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pretrain_fp32: PretrainFp32Config = field(default_factory=PretrainFp32Config)
    pretrain_quant: PretrainQuantConfig = field(default_factory=PretrainQuantConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = setting(0, SEED)
    device: str = setting("auto", DEVICE)

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_trainings(self)
        _check_policy(self)
        _check_bits(self.bits)
        _check_reward(self.reward)
        _check_search(self)
        _check_configurations(self)


# --- Settings that have to go together --------------------------------------------------------------------------------


def _check_trainings(config: Config) -> None:
    for section, training in ((item.name, getattr(config, item.name)) for item in fields(config)):
        if not isinstance(training, TrainConfig):
            continue
        epochs, batch = training.epochs, training.batch_size
        if training.warmup_epochs > epochs:
            raise unexpected(f"{section}.warmup_epochs", f"at most {section}.epochs = {epochs}", training.warmup_epochs)
        if batch % training.accumulate:
            raise unexpected(
                f"{section}.accumulate", f"a divisor of {section}.batch_size = {batch}", training.accumulate
            )


def _check_policy(config: Config) -> None:
    pool, image_size, positions = config.policy.pool, config.detector.image_size, config.bits.positions
    if config.policy.input == "stem":
        if positions != "pointwise":
            raise unexpected("policy.input", f"image for bits.positions = {positions}", config.policy.input)
        if pool > (image_size + 1) // 2:  # the stem has stride 2
            raise unexpected("policy.pool", f"at most half of detector.image_size = {image_size}", pool)
    if pool > image_size:
        raise unexpected("policy.pool", f"at most detector.image_size = {image_size}", pool)


def _check_bits(bits: BitsConfig) -> None:
    if bits.levels is not None and bits.positions != "network":
        raise unexpected("bits.positions", "network for bits.levels", bits.positions)
    if bits.quantizer not in ("lsq_plus", "lsq"):
        if bits.per_channel:
            raise unexpected("bits.per_channel", f"false for bits.quantizer = {bits.quantizer}", value=True)
        if bits.weights == "nested":
            raise unexpected("bits.weights", f"shared or separate for bits.quantizer = {bits.quantizer}", bits.weights)


def _check_reward(reward: RewardConfig) -> None:
    if reward.quality == "loss" and reward.name not in ("quality", "budget"):
        raise unexpected("reward.quality", f"precision, recall, f1 or ap for reward.name = {reward.name}", "loss")
    if reward.name == "budget" and reward.target_gbitops == 0:
        raise unexpected("reward.target_gbitops", "more than 0 for the reward `budget`", reward.target_gbitops)
    if reward.name.startswith("window_"):
        lower = reward.window_lower
        for name, upper in (("start", reward.window_upper_start), ("end", reward.window_upper_end)):
            if upper <= lower:
                raise unexpected(f"reward.window_upper_{name}", f"more than reward.window_lower = {lower}", upper)


def _check_search(config: Config) -> None:
    search = config.search
    if search.start == "sensitivity" and not config.policy.effort:
        raise unexpected("policy.effort", "true for search.start = sensitivity", config.policy.effort)
    if search.start == "sensitivity" and config.reward.quality != "loss":  # the start's price is loss per GBitOps
        raise unexpected("reward.quality", "loss for search.start = sensitivity", config.reward.quality)
    if search.start != "uniform" and config.reward.name != "budget":
        raise unexpected("search.start", f"uniform for reward.name = {config.reward.name}", search.start)
    if search.ema_decay and not search.train_detector:
        raise unexpected("search.ema_decay", "0 for search.train_detector = false", search.ema_decay)
    if search.samples == "all":
        if config.bits.positions != "network":
            raise unexpected("search.samples", f"a number for bits.positions = {config.bits.positions}", "all")
    elif search.baseline == "rloo" and search.samples < 2:
        raise unexpected("search.samples", "at least 2 for search.baseline = rloo", search.samples)
    if search.start == "pretrained" and config.pretrain_quant.configurations != "policy":
        expected = "policy for search.start = pretrained"
        raise unexpected("pretrain_quant.configurations", expected, config.pretrain_quant.configurations)


def _check_configurations(config: Config) -> None:
    settings = config.pretrain_quant
    if settings.configurations == "ends" and settings.accumulate > 1:
        expected = "1 for pretrain_quant.configurations = ends"
        raise unexpected("pretrain_quant.accumulate", expected, settings.accumulate)
    if settings.configurations != "policy":
        return
    because = "for pretrain_quant.configurations = policy"
    if not config.policy.effort:
        raise unexpected("policy.effort", f"true {because}", config.policy.effort)
    if config.policy.input != "image":
        raise unexpected("policy.input", f"image {because}", config.policy.input)
    if config.reward.name != "budget":
        raise unexpected("reward.name", f"budget {because}", config.reward.name)
