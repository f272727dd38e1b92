"""Times and peak memory of the detector beside what it is compared with: `python -m instaqnas.tools.benchmark`.

Rows: `fp32`, full precision in torch's own modules, channels-last; `fp32_compiled`, the same under torch.compile;
`masked`, the published strategy: at each position all K branches run on every image, then are masked; `ours`, also with
2 and 8 choices, in bf16, at half the batch, and on integers. Columns: a training step (forward, loss, backward, AdamW);
an evaluation forward; a rollout (the policy, then its sampled and its greedy configuration judged with suppression and
quality); the most memory that training takes.

All rows have the same images, objects and first weights, which stay, as the learning rate is 0. The detector is
untrained, so nearly every box scores above the threshold of evaluation, which is that of the rollouts here: suppression
and quality have as much to do as they can have, for `masked` and `ours` alike.

Times are medians, taken in turn in one process, one column after the other, so that weights do not change during an
evaluation or a rollout, as in their use; peaks are each from a process of its own, for freed memory stays with a
process. Only ratios within one run mean anything. `amp_bf16_vs_fp32_train` is a step of `ours_bf16` by one of `ours`,
the same quantized network with its convolutions in float32; the row `fp32` has no part in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from instaqnas.config import BitsConfig, PolicyConfig, RewardConfig, SearchConfig
from instaqnas.cpus import available_cpus
from instaqnas.data.loader import Batch, DetectionDataset, make_loader
from instaqnas.data.shapes import generate_shapes
from instaqnas.data.transforms import train_transform
from instaqnas.data.voc import VOC_CLASSES, read_class_names, read_image, read_split
from instaqnas.detector import ssd
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.metrics.voc import DetectionRecords, voc_map
from instaqnas.policy.bit_config import mix_uniform, sample
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.integer import to_integer
from instaqnas.quant.switchable import PerChoiceBatchNorm, SwitchableConv2d, calibrate
from instaqnas.seeds import SampleKey, generator, uniform_numbers
from instaqnas.tools.baselines import EVAL, BaselineSSD, MaskedBranches, TorchConv, judge_in_loops
from instaqnas.training.evaluate import detections_of, quality_of
from instaqnas.training.runtime import keep_freed_memory

BITS, POLICY, REWARD, SEARCH = BitsConfig(), PolicyConfig(), RewardConfig(), SearchConfig()
CHOICES = (*BITS.choices, (2, 4), (6, 4), (7, 4), (8, 4), (8, 8))
POSITIONS = ssd.position_count("pointwise")
WARM_UPS = 3  # rounds: the first compiles and allocates, the next find memory still in pieces
OBJECTS = 3  # an image
VOC07_TEST_IMAGES, VOC07_MOST_DETECTIONS = 4952, 150
VOC_SIDE = 433  # a square of as many pixels as VOC's 500 x 375
LOADER_BATCHES = 8  # for each worker


@dataclass(frozen=True)
class Settings:
    """Size of what is measured; `classes` counts the background, `choices` is K."""

    image_size: int
    width: float
    classes: int
    choices: int
    batch: int
    amp: ssd.Amp = "off"


# --- Rows -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge_batched(network: SwitchableSSD, batch: Batch, choices: Tensor) -> Tensor:
    """Quality [B] under bit configurations [B, L], as the search finds it but for the score threshold."""
    found = detections_of(network, network(batch.images, choices), EVAL)
    return quality_of(found, batch, REWARD.quality, EVAL.score_threshold)


def switchable(bits: DetectorBits, settings: Settings, images: Tensor) -> SwitchableSSD:
    """An untrained detector, on the device of the images."""
    torch.manual_seed(0)
    network = SwitchableSSD(
        settings.classes, bits, image_size=settings.image_size, width=settings.width, amp=settings.amp
    )
    return network.to(images.device)


def full_precision(settings: Settings, images: Tensor) -> SwitchableSSD:
    """The network whose weights all rows start from; its BatchNorm has seen the images."""
    network = switchable(DetectorBits.full_precision(), settings, images)
    for module in network.modules():
        if isinstance(module, PerChoiceBatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(images, torch.zeros(len(images), POSITIONS, dtype=torch.int64, device=images.device))
    return network


def plain(settings: Settings, images: Tensor, _choices: Tensor) -> BaselineSSD:
    """Full precision in torch's own modules."""
    network = BaselineSSD(full_precision(settings, images), lambda _, layer: TorchConv(layer))
    return network.to(images.device, memory_format=torch.channels_last)


def masked(settings: Settings, images: Tensor, _choices: Tensor) -> BaselineSSD:
    """All branches, then the mask."""

    def convert(group: str, layer: SwitchableConv2d) -> nn.Module:
        if group == "pointwise":
            return MaskedBranches(layer, CHOICES[: settings.choices])
        return TorchConv(layer, getattr(BITS, group))

    return BaselineSSD(full_precision(settings, images), convert).to(images.device)


def ours(settings: Settings, images: Tensor, choices: Tensor) -> SwitchableSSD:
    """Each image computed once, at its own bit configuration."""
    bits = DetectorBits(CHOICES[: settings.choices], BITS.stem, BITS.depthwise, BITS.extras, BITS.heads)
    network = switchable(bits, settings, images)
    ssd.copy_weights(full_precision(settings, images), network)
    calibrate(network, lambda: network(images, choices))
    return network


def ours_integer(settings: Settings, images: Tensor, choices: Tensor) -> SwitchableSSD:
    """`ours` on integers."""
    return to_integer(ours(settings, images, choices))


@dataclass(frozen=True)
class Row:
    """A network at work on a batch: each method does once what a column measures.

    `optimizer` is None for a network without parameters.
    """

    network: nn.Module
    batch: Batch
    choices: Tensor  # [B, L]
    policy: PolicyNet
    judge: Callable[[Any, Batch, Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None

    def train_step(self) -> None:
        """Forward, loss, backward and update."""
        self.network.train()
        output = self.network(self.batch.images, self.choices)
        losses = self.network.loss(output, self.batch.boxes_xyxy, self.batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def eval_forward(self) -> None:
        """Raw outputs of the batch."""
        self.network.eval()(self.batch.images, self.choices)

    @torch.no_grad()
    def rollout(self) -> None:
        """The policy's bit configurations, sampled and greedy, and what they bring."""
        self.network.eval()
        logits = self.policy(self.batch.images)
        uniform = uniform_numbers(self.batch.keys, POSITIONS, "benchmark samples")
        sampled = sample(mix_uniform(logits, SEARCH.epsilon_start), uniform)
        for choices in (sampled, logits.argmax(-1)):
            self.judge(self.network, self.batch, choices)


ACTIONS = {"train_seconds": Row.train_step, "eval_seconds": Row.eval_forward, "rollout_seconds": Row.rollout}
ALL = (*ACTIONS, "memory_mib")
TRAINING = ("train_seconds", "memory_mib")


@dataclass(frozen=True)
class Plan:
    """How a row is built, and its columns."""

    build: Callable[[Settings, Tensor, Tensor], nn.Module]  # from images [B, 3, S, S] and choices [B, L]
    columns: tuple[str, ...]
    judge: Callable[[Any, Batch, Tensor], Tensor] = judge_batched
    adapt: Callable[[Settings], Settings] = replace  # of a copy, nothing


PLANS = {
    "fp32": Plan(plain, ("train_seconds", "eval_seconds", "memory_mib")),
    "fp32_compiled": Plan(lambda *arguments: torch.compile(plain(*arguments)), ("train_seconds", "eval_seconds")),
    "masked": Plan(masked, ALL, judge_in_loops),
    "ours": Plan(ours, ALL),
    "ours_k2": Plan(ours, TRAINING, adapt=partial(replace, choices=2)),
    "ours_k8": Plan(ours, TRAINING, adapt=partial(replace, choices=8)),
    "ours_bf16": Plan(ours, TRAINING, adapt=partial(replace, amp="bf16")),
    "ours_integer": Plan(ours_integer, ("eval_seconds",)),
    "ours_half_batch": Plan(ours, TRAINING, adapt=lambda settings: replace(settings, batch=settings.batch // 2)),
}
LIMITS = {  # what this project holds itself to, on a CPU
    "train_vs_fp32": "at most 1.3",
    "eval_vs_fp32": "at most 0.8",
    "integer_vs_fp32": "at most 0.7 with 8-bit products",
    "train_vs_masked": "at least 3.5",
    "rollout_vs_masked": "at least 5",
    "memory_vs_masked": "at most 0.45",
    "k8_vs_k2_train": "at most 1.15",
    "k8_vs_k2_memory": "at most 1.05",
    "metric_seconds_voc07": "at most 10",
    "loader_vs_decode": "at least 0.35",
}
RATIOS = {
    "train_vs_fp32": ("train_seconds", "ours", "fp32"),
    "eval_vs_fp32": ("eval_seconds", "ours", "fp32"),
    "integer_vs_fp32": ("eval_seconds", "ours_integer", "fp32"),
    "train_vs_fp32_compiled": ("train_seconds", "ours", "fp32_compiled"),
    "eval_vs_fp32_compiled": ("eval_seconds", "ours", "fp32_compiled"),
    "train_vs_masked": ("train_seconds", "masked", "ours"),  # a speed-up, like the next
    "rollout_vs_masked": ("rollout_seconds", "masked", "ours"),
    "memory_vs_masked": ("memory_mib", "ours", "masked"),
    "k8_vs_k2_train": ("train_seconds", "ours_k8", "ours_k2"),
    "k8_vs_k2_memory": ("memory_mib", "ours_k8", "ours_k2"),
    "amp_bf16_vs_fp32_train": ("train_seconds", "ours_bf16", "ours"),  # `ours` in bf16 by itself in float32
}
Figures = dict[str, dict[str, float]]  # by row and column


def build_row(name: str, settings: Settings, device: torch.device) -> Row:
    """The row `name` of PLANS, ready to run."""
    plan, settings = PLANS[name], PLANS[name].adapt(settings)
    batch = random_batch(settings).to(device)
    random = generator("benchmark choices")
    choices = torch.randint(settings.choices, (settings.batch, POSITIONS), generator=random).to(device)
    network = plan.build(settings, batch.images, choices)
    policy = PolicyNet(POSITIONS, settings.choices, pool=POLICY.pool, width=POLICY.width, bits=POLICY.bits).to(device)
    calibrate(policy, lambda: policy(batch.images))
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True) if parameters else None
    return Row(network, batch, choices, policy, plan.judge, optimizer)


def random_batch(settings: Settings) -> Batch:
    """Noise with objects, the same for all rows."""
    images, size, random = settings.batch, settings.image_size, generator("benchmark images")
    pixels = torch.randint(256, (images, 3, size, size), generator=random, dtype=torch.uint8)
    boxes, labels = random_objects(images, OBJECTS, settings.classes, random)
    difficult, keys = torch.zeros_like(labels, dtype=torch.bool), [SampleKey(0, index) for index in range(images)]
    return Batch(pixels, boxes * size, labels, difficult, [str(index) for index in range(images)], keys)


def random_objects(images: int, objects: int, classes: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes xyxy [B, N, 4] in the unit square, 0.1 to 0.5 wide and high, and labels [B, N]."""
    corner, side = torch.rand(2, images, objects, 2, generator=random)
    labels = torch.randint(1, classes, (images, objects), generator=random)
    return torch.cat([corner / 2, corner / 2 + 0.1 + 0.4 * side], -1), labels


# --- Measuring --------------------------------------------------------------------------------------------------------


def medians_in_turn(
    actions: Mapping[Any, Callable[[], object]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, float]:
    """Median seconds of each action: A B C, A B C, ..., of which the first `WARM_UPS` rounds do not count."""
    seconds: dict[Any, list[float]] = {key: [] for key in actions}
    for _ in range(WARM_UPS + repetitions):
        for key, action in actions.items():
            start = clock()
            action()
            seconds[key].append(clock() - start)
    return {key: median(values[WARM_UPS:]) for key, values in seconds.items()}


def time_rows(names: Iterable[str], settings: Settings, repetitions: int, device: torch.device) -> Figures:
    """Median seconds by row and column."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    rows = {name: build_row(name, settings, device) for name in names}
    figures: Figures = {name: {} for name in rows}
    for column, action in ACTIONS.items():
        actions = {name: partial(action, row) for name, row in rows.items() if column in PLANS[name].columns}
        for name, seconds in medians_in_turn(actions, repetitions, clock).items():
            figures[name][column] = seconds
    return figures


def training_mib(name: str, settings: Settings) -> float:
    """MiB that building row `name` and training it takes at most; for a process that has computed nothing yet."""
    device = prepare()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else _resident_bytes("VmRSS")
    row = build_row(name, settings, device)
    for _ in range(WARM_UPS):  # the optimizer has its state from the second step on
        row.train_step()
    most = torch.cuda.max_memory_allocated(device) if cuda else _resident_bytes("VmHWM")
    return (most - before) / 2**20


def _resident_bytes(field: str) -> int:
    # Not resource.getrusage: its maximum starts from that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_fresh_process(name: str, settings: Settings) -> float:
    """`training_mib` in a process of its own that has done nothing but imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["instaqnas.training.evaluate"])  # the imports that take long
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(training_mib, name, settings).result()
        except BrokenExecutor:
            raise InputError(f"row {name} was killed, probably for want of memory: try a smaller --batch") from None


def prepare() -> torch.device:
    """The device, in a process that is from now on as one that trains."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compile_passes("auto")
    return device


def voc07_records(images: int) -> DetectionRecords:
    """Random objects, and 50 to 150 detections an image, the first of them near the objects."""
    random, records, classes = generator("benchmark detections"), DetectionRecords(), len(VOC_CLASSES) + 1
    for ids in torch.arange(images).split(EVAL.batch_size):
        boxes, labels = random_objects(len(ids), VOC07_MOST_DETECTIONS, classes, random)
        objects = boxes[:, :OBJECTS] + 0.01 * torch.randn(len(ids), OBJECTS, 4, generator=random)
        counts = torch.randint(50, VOC07_MOST_DETECTIONS + 1, (len(ids), 1), generator=random)
        detected = labels.where(torch.arange(VOC07_MOST_DETECTIONS) < counts, 0)
        scores = torch.rand(labels.shape, generator=random)
        difficult = torch.rand(len(ids), OBJECTS, generator=random) < 0.2
        records.add(ids.tolist(), boxes, scores, detected, objects, labels[:, :OBJECTS], difficult)
    return records


def loader_throughput(roots: Sequence[str], settings: Settings, repetitions: int) -> dict[str, float]:
    """Images per second of the training loader with full augmentation, and of bare decoding and resizing."""
    workers = available_cpus()
    images = LOADER_BATCHES * workers * settings.batch
    with tempfile.TemporaryDirectory() as folder:
        if not roots:
            roots = [f"{folder}/shapes"]
            generate_shapes(Path(roots[0]), {"train": images}, image_size=VOC_SIDE)
        annotations = read_split(roots, "train", read_class_names(roots))[:images]
        dataset = DetectionDataset(annotations, train_transform(settings.image_size, vertical_flip=False))
        loader = make_loader(dataset, settings.batch, shuffle=True, seed=0, workers=workers)
        bare = DataLoader(
            [annotation.image_path for annotation in annotations],
            settings.batch,
            num_workers=workers,
            collate_fn=partial(decoded, settings.image_size),
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=True,  # as in the training loader: their start is part of the warm-up
        )
        epochs = {"loader": partial(deque, loader, 0), "decode": partial(deque, bare, 0)}  # read and forget
        return {name: len(annotations) / seconds for name, seconds in medians_in_turn(epochs, repetitions).items()}


def decoded(image_size: int, paths: Sequence[Path]) -> Tensor:
    """The least a loader has to do: images decoded and resized, uint8 [B, S, S, 3]."""
    return torch.from_numpy(np.stack([cv2.resize(read_image(path), (image_size, image_size)) for path in paths]))


def measure(settings: Settings, repetitions: int, names: Sequence[str], roots: Sequence[str]) -> dict[str, Any]:
    """All that `--json` prints: ratios, None where a row is left out, then what they are made of."""
    keep_freed_memory()
    # What forks, and what needs the memory, comes first, while this process is small.
    logging.info("loader")
    images_per_second, memory = loader_throughput(roots, settings, repetitions), {}
    for name in (name for name in names if "memory_mib" in PLANS[name].columns):
        logging.info("memory of %s", name)
        memory[name] = {"memory_mib": in_fresh_process(name, settings)}
    device = prepare()
    logging.info("times of %s", ", ".join(names))
    if "fp32_compiled" in names:
        logging.info("compiling fp32_compiled, which takes minutes")
    seconds = time_rows(names, settings, repetitions, device)
    rows = {name: seconds[name] | memory.get(name, {}) for name in names}
    records = voc07_records(VOC07_TEST_IMAGES)
    metric = medians_in_turn({"voc07": lambda: voc_map(records, VOC_CLASSES)}, repetitions)
    return {
        **ratios(rows),
        "metric_seconds_voc07": metric["voc07"],
        "loader_vs_decode": images_per_second["loader"] / images_per_second["decode"],
        "train_seconds_by_batch": {
            str(settings.batch // 2): rows["ours_half_batch"]["train_seconds"],
            str(settings.batch): rows["ours"]["train_seconds"],
        },
        "images_per_second": images_per_second,
        "rows": rows,
        "settings": asdict(settings) | {"repetitions": repetitions},
        "machine": {
            "cpus": available_cpus(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch": torch.__version__,
        },
    }


def ratios(rows: Figures) -> dict[str, float | None]:
    """RATIOS of what was measured."""
    return {
        key: rows[row][column] / rows[other][column] if row in rows and other in rows else None
        for key, (column, row, other) in RATIOS.items()
    }


def format_table(result: Mapping[str, Any]) -> str:
    """Rows and columns, then everything else, a line each."""
    lines = [f"{'row':<24}" + "".join(f"{column:>17}" for column in ALL)]
    for name, row in result["rows"].items():
        lines.append(f"{name:<24}" + "".join(f"{_short(row.get(column)):>17}" for column in ALL))
    for key, value in result.items():
        if key != "rows":
            parts = value if isinstance(value, dict) else {"": value}
            limit = f"  ({LIMITS[key]})" if key in LIMITS else ""
            lines.append(f"{key:<24}" + ",".join(f" {name} {_short(part)}" for name, part in parts.items()) + limit)
    return "\n".join(lines)


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_compiler() -> None:
    """Raises InputError if nothing can be compiled here."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:  # what a missing or broken compiler raises has no common base
        raise InputError("torch.compile does not work here; leave fp32_compiled out with --no-compile") from error


# --- Command line -----------------------------------------------------------------------------------------------------

OPTIONS = {  # name: (default, lowest, highest, help)
    "image-size": (300, 64, math.inf, "side of the images in pixels"),
    "width": (1.0, 0.01, 8, "width multiplier of the networks"),
    "classes": (21, 2, math.inf, "classes, background included"),
    "choices": (3, 2, len(CHOICES), "bit choices at each position"),
    "batch": (16, 2, math.inf, "images a step"),
    "repetitions": (5, 1, math.inf, "measured rounds; the median counts"),
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what the command line asks for, and prints it."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.benchmark",
        description="Measure the detector beside a full-precision network and masked branches; also loader and metric.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, (default, _, _, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--roots", nargs="+", default=[], help="VOC-layout data for the loader; default: drawn shapes")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled full-precision network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    with exit_on_input_error():
        values = {name: getattr(options, name.replace("-", "_")) for name in OPTIONS}
        for name, (_, lowest, highest, _) in OPTIONS.items():
            if not lowest <= values[name] <= highest:
                wanted = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
                raise InputError(f"--{name} {values[name]}: must be {wanted}")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        *size, repetitions = values.values()
        left_out = {"fp32_compiled"} if options.no_compile else set()
        if torch.cuda.is_available():
            left_out.add("ours_integer")  # runs on the CPU only
        names = [name for name in PLANS if name not in left_out]
        if "fp32_compiled" in names:
            _check_compiler()
        result = measure(Settings(*size), repetitions, names, options.roots)
        print(json.dumps(result) if options.json else format_table(result))


if __name__ == "__main__":
    main()
