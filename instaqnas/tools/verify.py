"""Proves integer inference on images: `python -m instaqnas.tools.verify --config FILE --run runs/NAME`.

Runs the test split through the fake-quantized networks, in float32, and through their integer form, under the policy's
bit configurations and under random ones, and counts what differs: the integers that enter each layer, the policy's
choices and the detections.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from instaqnas import distributed
from instaqnas.data.loader import DetectionLoader
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


@dataclass
class Comparison:
    """What was compared, and how much of it differs.

    `levels` are integers that enter layers, `different_levels` counts by layer those that differ; `largest_sum` is the
    largest integer sum of any layer, exact in float32 up to 2^24.
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
    """Keeps the integers that enter the layers of `quantized`, and compares those of its integer form with them."""

    def __init__(self, quantized: nn.Module, integer: nn.Module, result: Comparison, prefix: str = "") -> None:
        self.seen: dict[str, Tensor] = {}
        self.result = result
        for name, layer in quantized.named_modules():
            if isinstance(layer, SwitchableConv2d):
                layer.input_quantizer.register_forward_hook(self._keep(prefix + name))
        for name, layer in integer.named_modules():
            if isinstance(layer, IntegerConv2d):
                layer.register_forward_hook(self._compare(prefix + name))

    def _keep(self, name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: tuple[Tensor, Tensor]) -> None:
            self.seen[name] = output[0]  # floats: what is no whole number differs from any integer

        return hook

    def _compare(self, name: str) -> Callable:
        def hook(layer: IntegerConv2d, args: tuple, output: tuple) -> None:
            x, choice = args if len(args) == 2 else (args[0], None)
            choice = choice if choice is not None else torch.zeros(len(output[0]), dtype=torch.int64)
            levels = layer.levels(x, choice) - layer.offset[choice].view(-1, 1, 1, 1)
            expected = self.seen.pop(name)
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
    """Adds all images of `loader` to `result`; `choose` gives their bits by float and by integer networks."""
    for batch in distributed.progress_bar(loader, "verify"):
        observations = [network.observe(batch.images) for network in (detector, integer)]
        choices, same = (
            ways(observation.input, batch.keys) for ways, observation in zip(choose, observations, strict=True)
        )
        result.images += len(batch.images)
        result.images_with_different_choices += int((choices != same).any(1).sum())
        left, right = (
            detect(network, batch.images, choices, experiment.config.eval, observation.stem)
            for network, observation in zip((detector, integer), observations, strict=True)
        )
        result.detections += int((left.labels > 0).sum())
        for image in range(len(batch.images)):
            found = [
                (side.boxes_xyxy[image][keep], side.scores[image][keep], side.labels[image][keep])
                for side in (left, right)
                for keep in (side.labels[image] > 0,)
            ]
            equal = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            result.images_with_different_detections += not equal


def verify(experiment: Experiment, checkpoint: Checkpoint, random_configurations: int) -> dict[str, Comparison]:
    """Comparisons under the policy's configurations and under random ones, each image at that many."""
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
    """Prints the figures as JSON; exit status 1 if anything differs."""
    description = "Compare integer inference with the fake-quantized networks on the test split."
    parser = run_parser("verify", description, "--data.workers 0")
    parser.add_argument("--random", type=int, default=20, metavar="N", help="random configurations an image (20)")
    options, overrides = parser.parse_known_args(arguments)
    with exit_on_input_error():
        if options.random < 0:
            raise InputError(f"--random: expected at least 0, got {options.random}")
        command = run_command(options, [*overrides, "--device", "cpu"])
        compile_passes(command.config.runtime.compile)
        checkpoint = initial_checkpoint(command) or latest_policy_checkpoint(command)
        with in_floating_point():
            results = verify(Experiment(command.config), checkpoint, options.random)
    figures = {name: asdict(result) for name, result in results.items()}
    print(json.dumps({**figures, "exact_up_to": EXACT_IN_FLOAT32, "byte_products": has_byte_products()}, indent=1))
    if options.random == 0:
        sys.stderr.write("note: --random 0: no random configuration has been compared\n")
    if not all(result.is_equal for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
