"""Times and peak memory of the detector and of the networks it is compared with: `python -m instaqnas.tools.benchmark`.

Rows (`benchmark_rows.py`):

    fp32             full precision in torch's own modules, channels-last
    fp32_compiled    the same under torch.compile
    masked           the published strategy: at each position all K branches run on every image and are then masked
    ours             each image computed once, at its own bit configuration; also with 2 and 8 choices, in bf16,
                     at half the batch, and on integers

Columns:

    train_seconds      a training step: forward, loss, backward, AdamW
    eval_seconds       an evaluation forward
    rollout_seconds    the policy, then detections and quality of its sampled and of its greedy configuration
    memory_mib         peak memory of training

All rows have the same images, objects and initial weights; the learning rate is 0, so the weights stay. The detector is
untrained: nearly every box scores above the threshold of evaluation, which rollouts use here too, so suppression and
quality do as much work as they ever can, for `masked` and `ours` alike.

Times are medians over rounds in which the rows take turns in one process, one column after the other, so that weights
do not change during an evaluation or a rollout, as in use. Each peak comes from a process of its own, since a process
keeps freed memory. Only ratios within one run are comparable. `amp_bf16_vs_fp32_train` divides a step of `ours_bf16` by
a step of `ours`, the same quantized network with its convolutions in float32; it does not involve the row `fp32`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from instaqnas.cpus import available_cpus
from instaqnas.data.images import read_image
from instaqnas.data.loader import DetectionDataset, make_loader
from instaqnas.data.shapes import generate_shapes
from instaqnas.data.transforms import train_transform
from instaqnas.data.voc import VOC_CLASSES, read_class_names, read_split
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.metrics.voc import DetectionRecords, voc_map
from instaqnas.quant.fused import compile_passes
from instaqnas.seeds import generator
from instaqnas.tools.benchmark_rows import (
    ACTIONS,
    CHOICES,
    COLUMNS,
    OBJECTS,
    PLANS,
    Workload,
    build_row,
    random_objects,
)
from instaqnas.tools.peers import EVAL
from instaqnas.tools.processes import in_fresh_process, peak_resident_bytes, resident_bytes
from instaqnas.training.runtime import keep_freed_memory

WARM_UPS = 3  # rounds: the first compiles and allocates, the next find memory still fragmented
VOC07_TEST_IMAGES, VOC07_MOST_DETECTIONS = 4952, 150
VOC_SIDE = 433  # a square of as many pixels as VOC's 500 x 375
LOADER_BATCHES = 8  # for each worker

LIMITS = {  # goals of this project, on a CPU
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
RATIOS = {  # column, numerator, denominator
    "train_vs_fp32": ("train_seconds", "ours", "fp32"),
    "eval_vs_fp32": ("eval_seconds", "ours", "fp32"),
    "integer_vs_fp32": ("eval_seconds", "ours_integer", "fp32"),
    "train_vs_fp32_compiled": ("train_seconds", "ours", "fp32_compiled"),
    "eval_vs_fp32_compiled": ("eval_seconds", "ours", "fp32_compiled"),
    "train_vs_masked": ("train_seconds", "masked", "ours"),  # a speed-up, and so is the next
    "rollout_vs_masked": ("rollout_seconds", "masked", "ours"),
    "memory_vs_masked": ("memory_mib", "ours", "masked"),
    "k8_vs_k2_train": ("train_seconds", "ours_k8", "ours_k2"),
    "k8_vs_k2_memory": ("memory_mib", "ours_k8", "ours_k2"),
    "amp_bf16_vs_fp32_train": ("train_seconds", "ours_bf16", "ours"),
}
Figures = dict[str, dict[str, float]]  # by row and column


# --- Measuring --------------------------------------------------------------------------------------------------------


def medians_in_turn(
    actions: Mapping[str, Callable[[], object]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each action over `repetitions` rounds A B C, A B C, ..., after `WARM_UPS` that do not count."""
    seconds: dict[str, list[float]] = {key: [] for key in actions}
    for _ in range(WARM_UPS + repetitions):
        for key, action in actions.items():
            start = clock()
            action()
            seconds[key].append(clock() - start)
    return {key: median(values[WARM_UPS:]) for key, values in seconds.items()}


def time_rows(names: Iterable[str], workload: Workload, repetitions: int, device: torch.device) -> Figures:
    """Median seconds by row and column."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    rows = {name: build_row(name, workload, device) for name in names}
    figures: Figures = {name: {} for name in rows}
    for column, action in ACTIONS.items():
        actions = {name: partial(action, row) for name, row in rows.items() if column in PLANS[name].columns}
        for name, seconds in medians_in_turn(actions, repetitions, clock).items():
            figures[name][column] = seconds
    return figures


def training_mib(name: str, workload: Workload) -> float:
    """Peak MiB of building row `name` and training it, in a process that has computed nothing yet."""
    device = prepare()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else resident_bytes()
    row = build_row(name, workload, device)
    for _ in range(WARM_UPS):  # the optimizer has its state from the second step on
        row.train_step()
    peak = torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes()
    return (peak - before) / 2**20


def measured_training_mib(name: str, workload: Workload) -> float:
    """`training_mib` in a fresh process.

    Raises: InputError if that process is killed.
    """
    return in_fresh_process(
        partial(training_mib, name, workload),
        preload="instaqnas.evaluation.measure",  # imports torch and torchvision, which takes long
        killed=f"row {name} was killed, probably out of memory: try a smaller --batch",
    )


def prepare() -> torch.device:
    """The device to measure on; sets memory and compilation of this process up as training does."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compile_passes("auto")
    return device


def voc07_records(images: int) -> DetectionRecords:
    """Random objects, and 50 to 150 random detections an image, the first of them near the objects."""
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


def loader_throughput(roots: Sequence[str], workload: Workload, repetitions: int) -> dict[str, float]:
    """Images per second of the training loader with full augmentation, and of decoding and resizing alone."""
    workers = available_cpus()
    images = LOADER_BATCHES * workers * workload.batch
    with tempfile.TemporaryDirectory() as folder:
        if not roots:
            roots = [f"{folder}/shapes"]
            generate_shapes(Path(roots[0]), {"train": images}, image_size=VOC_SIDE)
        annotations = read_split(roots, "train", read_class_names(roots))[:images]
        dataset = DetectionDataset(annotations, train_transform(workload.image_size, vertical_flip=False))
        loader = make_loader(dataset, workload.batch, shuffle=True, seed=0, workers=workers)
        paths = [annotation.image_path for annotation in annotations]
        decoding: DataLoader[Path] = DataLoader(
            cast("Dataset[Path]", paths),  # a list will do: the loader indexes it and takes its length
            workload.batch,
            num_workers=workers,
            collate_fn=partial(decoded, workload.image_size),
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=True,  # as in the training loader: their start is part of the warm-up
        )
        epochs = {"loader": partial(_exhaust, loader), "decode": partial(_exhaust, decoding)}
        return {name: len(annotations) / seconds for name, seconds in medians_in_turn(epochs, repetitions).items()}


def decoded(image_size: int, paths: Sequence[Path]) -> Tensor:
    """Images decoded and resized, the least that any loader does: uint8 [B, S, S, 3]."""
    return torch.from_numpy(np.stack([cv2.resize(read_image(path), (image_size, image_size)) for path in paths]))


def _exhaust(items: Iterable[object]) -> None:
    """Reads all items and drops them."""
    deque(items, maxlen=0)


def run_benchmark(workload: Workload, repetitions: int, names: Sequence[str], roots: Sequence[str]) -> dict[str, Any]:
    """Everything that `--json` prints: first the ratios, None where a row is left out, then their ingredients.

    Args:
        workload: size of networks and batches.
        repetitions: measured rounds, of which the median counts.
        names: rows to measure, of PLANS.
        roots: VOC-layout data for the loader; none draws shapes.

    Raises: InputError if the data cannot be read, or a process is killed.
    """
    keep_freed_memory()
    # The loader, whose workers are forks, and the rows that need most memory come first, while this process is small.
    logging.info("loader")
    images_per_second = loader_throughput(roots, workload, repetitions)
    memory = {}
    for name in names:
        if "memory_mib" in PLANS[name].columns:
            logging.info("memory of %s", name)
            memory[name] = {"memory_mib": measured_training_mib(name, workload)}
    device = prepare()
    logging.info("times of %s", ", ".join(names))
    if "fp32_compiled" in names:
        logging.info("compiling fp32_compiled, which takes minutes")
    seconds = time_rows(names, workload, repetitions, device)
    rows = {name: seconds[name] | memory.get(name, {}) for name in names}
    records = voc07_records(VOC07_TEST_IMAGES)
    metric = medians_in_turn({"voc07": lambda: voc_map(records, VOC_CLASSES)}, repetitions)
    return {
        **ratios(rows),
        "metric_seconds_voc07": metric["voc07"],
        "loader_vs_decode": images_per_second["loader"] / images_per_second["decode"],
        "train_seconds_by_batch": {
            str(workload.batch // 2): rows["ours_half_batch"]["train_seconds"],
            str(workload.batch): rows["ours"]["train_seconds"],
        },
        "images_per_second": images_per_second,
        "rows": rows,
        "settings": asdict(workload) | {"repetitions": repetitions},
        "machine": {
            "cpus": available_cpus(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch": torch.__version__,
        },
    }


def ratios(rows: Figures) -> dict[str, float | None]:
    """All RATIOS, None where a row is left out."""
    return {
        key: rows[row][column] / rows[other][column] if row in rows and other in rows else None
        for key, (column, row, other) in RATIOS.items()
    }


def format_benchmark(result: Mapping[str, Any]) -> str:
    """A table of rows and columns, then a line for everything else; ratios have their limits beside them."""
    lines = [f"{'row':<24}" + "".join(f"{column:>17}" for column in COLUMNS)]
    for name, row in result["rows"].items():
        lines.append(f"{name:<24}" + "".join(f"{_short(row.get(column)):>17}" for column in COLUMNS))
    for key, value in result.items():
        if key != "rows":
            parts = value if isinstance(value, dict) else {"": value}
            limit = f"  ({LIMITS[key]})" if key in LIMITS else ""
            lines.append(f"{key:<24}" + ",".join(f" {name} {_short(part)}" for name, part in parts.items()) + limit)
    return "\n".join(lines)


def _short(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_compiler() -> None:
    """Raises InputError if torch.compile does not work on this machine."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:  # errors of a missing or broken compiler have no common base class
        raise InputError("torch.compile does not work here; leave fp32_compiled out with --no-compile") from error


# --- Command line -----------------------------------------------------------------------------------------------------

OPTIONS = {  # name: (default, lowest, highest, help)
    "image-size": (300, 64, math.inf, "side of the images in pixels"),
    "width": (1.0, 0.01, 8, "width multiplier of the networks"),
    "classes": (21, 2, math.inf, "classes, including the background"),
    "choices": (3, 2, len(CHOICES), "bit choices at each position"),
    "batch": (16, 2, math.inf, "images per step"),
    "repetitions": (5, 1, math.inf, "measured rounds, of which the median counts"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.benchmark",
        description="Measure time and memory of the detector against a full-precision network and masked branches, and "
        "the speed of the loader and of the mAP computation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, (default, _, _, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--roots", nargs="+", default=[], help="VOC-layout data for the loader; without, drawn shapes")
    parser.add_argument("--no-compile", action="store_true", help="leave out the row fp32_compiled")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    with exit_on_input_error():
        for name, (_, lowest, highest, _) in OPTIONS.items():
            value = getattr(options, name.replace("-", "_"))
            if not lowest <= value <= highest:
                wanted = f"at least {lowest}" if highest == math.inf else f"{lowest} to {highest}"
                raise InputError(f"--{name} {value}: must be {wanted}")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        left_out = {"fp32_compiled"} if options.no_compile else set()
        if torch.cuda.is_available():
            left_out.add("ours_integer")  # runs on the CPU only
        names = [name for name in PLANS if name not in left_out]
        if "fp32_compiled" in names:
            _check_compiler()
        workload = Workload(options.image_size, options.width, options.classes, options.choices, options.batch)
        result = run_benchmark(workload, options.repetitions, names, options.roots)
        print(json.dumps(result) if options.json else format_benchmark(result))


if __name__ == "__main__":
    main()
