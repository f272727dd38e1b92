"""Checks integer inference on images: `python -m instaqnas.tools.verify --config FILE --run runs/NAME`.

Runs the test split through the fake-quantized networks in float32 and through their integer form, under the policy's
bit configurations and under random ones. Counts differences in the integers that enter each layer, in the policy's
choices and in the detections; all have to be equal. With `--onnx FILE`, compares the integer form with a file of
`instaqnas.tools.export` instead. Detections then may differ in the last bits of scores and boxes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from instaqnas import distributed
from instaqnas.data.loader import DetectionLoader
from instaqnas.detector.postprocess import Detections
from instaqnas.detector.ssd import SwitchableSSD
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.evaluation.inference import detect
from instaqnas.experiment.handover import Checkpoint, initial_checkpoint, latest_policy_checkpoint
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.stage import POLICY_KINDS
from instaqnas.policy.bit_config import ChooseBits, greedy_by
from instaqnas.quant.byte_conv import has_byte_products, in_floating_point
from instaqnas.quant.fused import compile_passes
from instaqnas.quant.integer import EXACT_IN_FLOAT32, IntegerConv2d, to_integer
from instaqnas.quant.switchable import SwitchableConv2d
from instaqnas.tools.arguments import run_command, run_parser
from instaqnas.tools.verify_onnx import is_equal, verify_onnx


@dataclass
class Comparison:
    """Counts of compared values and of differences.

    Args:
        images: number of images, counted once for each configuration they ran under.
        levels: number of integers that entered layers.
        different_levels: number of differing integers, by layer; layers without differences are left out.
        detections: number of detections of the fake-quantized detector.
        images_with_different_detections: number of images.
        images_with_different_choices: number of images.
        largest_sum: largest magnitude of an integer sum in any layer; sums are exact in float32 up to 2^24.
    """

    images: int = 0
    levels: int = 0
    different_levels: dict[str, int] = field(default_factory=dict)
    detections: int = 0
    images_with_different_detections: int = 0
    images_with_different_choices: int = 0
    largest_sum: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (
            self.different_levels or self.images_with_different_detections or self.images_with_different_choices
        )


class Recorder:
    """Compares the integers that enter the layers of a network and of its integer form, by forward hooks.

    Run `quantized` first, then `integer`, on the same images and configurations.

    Args:
        quantized: fake-quantized network.
        integer: its integer form.
        result: gets the counts.
        prefix: of the layer names in `result`.
    """

    def __init__(self, quantized: nn.Module, integer: nn.Module, result: Comparison, prefix: str = "") -> None:
        self.observed: dict[str, Tensor] = {}  # levels that entered each layer of `quantized`
        self.result = result
        for name, layer in quantized.named_modules():
            if isinstance(layer, SwitchableConv2d):
                layer.input_quantizer.register_forward_hook(self._keep(prefix + name))
        for name, layer in integer.named_modules():
            if isinstance(layer, IntegerConv2d):
                layer.register_forward_hook(self._compare(prefix + name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor]) -> None:
            self.observed[name] = output[0]  # kept as floats: rounding would hide levels that are not integers

        return hook

    def _compare(self, name: str) -> Callable[..., None]:
        def hook(layer: IntegerConv2d, args: tuple, output: tuple) -> None:
            x, choice = args if len(args) == 2 else (args[0], None)
            if choice is None:  # a layer with one choice
                choice = torch.zeros(len(output[0]), dtype=torch.int64)
            levels = layer.levels(x, choice) - layer.offset[choice].view(-1, 1, 1, 1)
            expected = self.observed.pop(name)
            different = int((levels != expected).sum())
            self.result.levels += expected.numel()
            if different:
                self.result.different_levels[name] = self.result.different_levels.get(name, 0) + different
            self.result.largest_sum = max(self.result.largest_sum, int(output[0].abs().max()))

        return hook


@torch.no_grad()
def compare(
    experiment: Experiment,
    detector: SwitchableSSD,
    loader: DetectionLoader,
    choose: tuple[ChooseBits, ChooseBits],
    integer: SwitchableSSD,
    result: Comparison,
) -> None:
    """Compares choices and detections of all images, and adds the counts to `result`.

    Args:
        experiment: has the settings of post-processing.
        detector: fake-quantized.
        loader: images to compare on.
        choose: chooses bits by the fake-quantized policy, and by its integer form.
        integer: integer form of `detector`.
        result: gets the counts.
    """
    settings = experiment.config.eval
    choose_bits, choose_bits_integer = choose
    for batch in distributed.progress_bar(loader, "verify"):
        observation, integer_observation = detector.observe(batch.images), integer.observe(batch.images)
        choices = choose_bits(observation.input, batch.keys)
        integer_choices = choose_bits_integer(integer_observation.input, batch.keys)
        result.images += len(batch.images)
        result.images_with_different_choices += int((choices != integer_choices).any(1).sum())

        # Both detectors run under `choices`, so that a different choice is not counted as different detections too.
        expected = detect(detector, batch.images, choices, settings, observation.stem)
        found = detect(integer, batch.images, choices, settings, integer_observation.stem)
        result.detections += int((expected.labels > 0).sum())
        for image in range(len(batch.images)):
            if not _same_detections(expected, found, image):
                result.images_with_different_detections += 1


def _same_detections(expected: Detections, found: Detections, image: int) -> bool:
    """Whether one image of a batch has exactly the same boxes, scores and labels in both."""
    # Rows of label 0 are padding, and their number depends on the other images.
    expected_rows, found_rows = expected.labels[image] > 0, found.labels[image] > 0
    return (
        torch.equal(expected.boxes_xyxy[image][expected_rows], found.boxes_xyxy[image][found_rows])
        and torch.equal(expected.scores[image][expected_rows], found.scores[image][found_rows])
        and torch.equal(expected.labels[image][expected_rows], found.labels[image][found_rows])
    )


def verify(experiment: Experiment, checkpoint: Checkpoint, random_configurations: int) -> dict[str, Comparison]:
    """Compares a detector and its policy with their integer forms on the test split.

    Args:
        experiment: parts of the config.
        checkpoint: has the detector and the policy.
        random_configurations: random bit configurations for each image.

    Returns: comparisons under the policy's configurations, "policy", and under random ones, "random".
    """
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
    checkpoint.load(experiment, detector, "detector", POLICY_KINDS)
    checkpoint.load(experiment, policy, "policy", POLICY_KINDS)
    integer, integer_policy = to_integer(detector, "detector."), to_integer(policy, "policy.")
    results = {"policy": Comparison(), "random": Comparison()}
    loader = experiment.test_loader()
    recorders = [
        Recorder(detector, integer, results["policy"]),
        Recorder(policy, integer_policy, results["policy"], "policy."),
    ]
    compare(experiment, detector, loader, (greedy_by(policy), greedy_by(integer_policy)), integer, results["policy"])
    for recorder in recorders:
        recorder.result = results["random"]
    for index in range(random_configurations):
        choose = (experiment.choose_random("verify", index), experiment.choose_random("verify", index))
        compare(experiment, detector, loader, choose, integer, results["random"])
    return results


def main(arguments: list[str] | None = None) -> None:
    """Prints the counts as JSON; the exit status is 1 if anything differs."""
    description = "Compare integer inference with the fake-quantized networks on the test split."
    parser = run_parser("verify", description, "--data.workers 0")
    parser.add_argument(
        "--random", type=int, metavar="N", help="random configurations per image (default: 20, with --onnx 2)"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="check a file of instaqnas.tools.export")
    options, overrides = parser.parse_known_args(arguments)
    random = options.random if options.random is not None else (20 if options.onnx is None else 2)
    with exit_on_input_error():
        if random < 0:
            raise InputError(f"--random: expected at least 0, got {random}")
        command = run_command(options, [*overrides, "--device", "cpu"])
        compile_passes(command.config.runtime.compile)
        if options.onnx is not None:
            figures = verify_onnx(command, options.onnx, random)
            equal = is_equal(figures)
        else:
            checkpoint = initial_checkpoint(command) or latest_policy_checkpoint(command)
            with in_floating_point():
                results = verify(Experiment(command.config), checkpoint, random)
            figures = {name: asdict(result) for name, result in results.items()}
            figures |= {"exact_up_to": EXACT_IN_FLOAT32, "byte_products": has_byte_products()}
            equal = all(result.is_equal for result in results.values())
    print(json.dumps(figures, indent=1))
    if random == 0:
        sys.stderr.write("note: --random 0: no random configuration has been compared\n")
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
