"""Counts MACs, parameters and GBitOps of a config's networks: `python -m instaqnas.tools.profile --config FILE`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from instaqnas.bits import choice_name
from instaqnas.config.command import parse_command
from instaqnas.config.settings import Config
from instaqnas.data.voc import VOC_CLASSES, read_class_names
from instaqnas.detector.ssd import DetectorBits, detector_layers
from instaqnas.errors import InputError, exit_on_input_error
from instaqnas.experiment.parts import Experiment
from instaqnas.policy.network import policy_layers
from instaqnas.quant.bitops import CostTable, LayerCost
from instaqnas.tools.arguments import refuse

GROUPS = {
    "stem": ".stem",
    "depthwise": ".depthwise",
    "pointwise": ".pointwise",
    "extras": "extras.",
    "heads": "_heads.",
}


@dataclass(frozen=True)
class Profile:
    """Costs of one image.

    layers: convolutions of the detector, with the config's bit choices; parameters are counted in full precision.
    positions: names of the layers with the same choice at each position, by the name of the position.
    nested: the weights of all choices are stored as one.
    uniform_gbitops: cost of the detector with all positions at one choice, by the name of the choice.
    policy_layers: convolutions of the policy.
    configuration: index of the choice of each layer that the policy controls, by its name; empty counts all choices.
    """

    layers: list[LayerCost]
    positions: dict[str, list[str]]
    nested: bool
    uniform_gbitops: dict[str, float]
    policy_layers: list[LayerCost]
    configuration: dict[str, int] = field(default_factory=dict)

    def counted_choices(self, layer: LayerCost) -> list[int]:
        """Indices of a layer's choices: all, or the configuration's."""
        if layer.name in self.configuration:
            return [self.configuration[layer.name]]
        return list(range(len(layer.choices)))

    def bits(self, layer: LayerCost) -> list[str]:
        """Names of the counted choices of a layer."""
        return [choice_name(layer.choices[k]) for k in self.counted_choices(layer)]

    def gbitops(self, layer: LayerCost) -> list[float]:
        """GBitOps of a layer at each counted choice."""
        return [layer.bitops(k) / 1e9 for k in self.counted_choices(layer)]

    def weight_bytes(self, layer: LayerCost) -> list[int]:
        """Bytes of a layer's weights in a packed file, before deflation, at each counted choice.

        Nested weights are stored once, at the widest of all choices.
        """
        if self.nested:
            return [max(layer.weight_bytes(k) for k in range(len(layer.choices)))]
        return [layer.weight_bytes(k) for k in self.counted_choices(layer)]

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON: MACs, parameters and GBitOps of the detector, of the policy, then layer by layer.

        The key `configuration`, its choices and GBitOps, exists if one is counted.
        """
        macs = sum(layer.macs for layer in self.layers)
        configuration = {"configuration": self._plain_configuration()} if self.configuration else {}
        return {
            "macs": macs,
            "params": sum(layer.params for layer in self.layers),
            "gbitops": {
                "all_8_8": macs * 8 * 8 / 1e9,
                "all_4_4": macs * 4 * 4 / 1e9,
                "uniform": self.uniform_gbitops,
            },
            "policy": {
                "macs": sum(layer.macs for layer in self.policy_layers),
                "gbitops": sum(layer.bitops() for layer in self.policy_layers) / 1e9,
            },
            "weight_bytes": sum(sum(self.weight_bytes(layer)) for layer in self.layers),
            "layers": [self._plain_layer(layer) for layer in self.layers],
            **configuration,
        }

    def _plain_layer(self, layer: LayerCost) -> dict[str, Any]:
        return {
            "name": layer.name,
            "macs": layer.macs,
            "params": layer.params,
            "bits": self.bits(layer),
            "gbitops": self.gbitops(layer),
            "weight_bytes": self.weight_bytes(layer),
        }

    def _plain_configuration(self) -> dict[str, Any]:
        return {
            "choices": {layer.name: self.bits(layer)[0] for layer in self.layers if layer.name in self.configuration},
            "gbitops": sum(layer.bitops(k) for layer in self.layers for k in self.counted_choices(layer)) / 1e9,
        }


def profile(config: Config, class_names: tuple[str, ...]) -> Profile:
    """Costs of the detector and the policy of `config`, for these classes (without background)."""
    experiment = Experiment(replace(config, device="cpu"), class_names)
    full = detector_layers(experiment.detector(DetectorBits.full_precision()))
    detector = experiment.quantized_detector()
    quantized = detector_layers(detector)
    layers = [replace(layer, choices=same.choices) for layer, same in zip(full, quantized, strict=True)]
    costs = CostTable(layers, detector.layers_at)
    uniform = {
        name: costs.gbitops(torch.full((1, len(detector.positions)), k)).item()
        for k, name in enumerate(detector.choice_names)
    }
    nested = config.bits.weights == "nested"
    return Profile(layers, detector.layers_at, nested, uniform, policy_layers(experiment.policy(), detector.image_size))


def at_configuration(result: Profile, configuration: str) -> Profile:
    """The profile of one bit configuration.

    Args:
        result: the profile of all choices.
        configuration: names of choices such as w3a4, one for all positions or one for each, separated by commas.

    Raises: InputError for an unknown name or a wrong number of names.
    """
    names = configuration.split(",")
    known = list(result.uniform_gbitops)
    if set(names) - set(known):
        raise InputError(f"--configuration: expected choices of {', '.join(known)}, got {configuration}")
    if len(names) not in (1, len(result.positions)):
        raise InputError(f"--configuration: expected 1 or {len(result.positions)} choices, got {len(names)}")
    numbers = [known.index(name) for name in names * (len(result.positions) // len(names))]
    chosen: dict[str, int] = {}
    for layers, number in zip(result.positions.values(), numbers, strict=True):
        chosen |= dict.fromkeys(layers, number)
    return replace(result, configuration=chosen)


def class_names_of(roots: Sequence[str]) -> tuple[str, ...]:
    """Class names of the roots that exist, or the VOC classes; a note on standard error names missing roots.

    Raises: InputError as `read_class_names`.
    """
    present = [root for root in roots if Path(root).exists()]
    names = read_class_names(present) if present else VOC_CLASSES
    missing = [root for root in roots if root not in present]
    if missing:
        classes = f"the classes of {', '.join(present)}" if present else f"the {len(VOC_CLASSES)} VOC classes"
        sys.stderr.write(f"note: no such folder: {', '.join(missing)}; using {classes}\n")
    return names


def format_profile(result: Profile) -> str:
    """A table of all layers by group, then the totals; bytes count the packed weights."""
    lines = [_line("layer", "MACs", "params", "bits", "GBitOps", "bytes")]
    for group, mark in GROUPS.items():
        members = [layer for layer in result.layers if mark in layer.name]
        totals = (f"{sum(layer.macs for layer in members):,}", f"{sum(layer.params for layer in members):,}")
        lines += ["", _line(group, *totals), *(_layer_line(result, layer) for layer in members)]
    plain = result.plain()
    lines += ["", _line("detector", f"{plain['macs']:,}", f"{plain['params']:,}")]
    gbitops = plain["gbitops"]
    figures = {f"positions {name}": value for name, value in gbitops["uniform"].items()}
    if result.configuration:
        figures["configuration"] = plain["configuration"]["gbitops"]
    figures |= {"all w8a8": gbitops["all_8_8"], "all w4a4": gbitops["all_4_4"]}
    lines += [_line("", bits=name, gbitops=f"{value:.4f}") for name, value in figures.items()]
    lines.append(_line("", bits="weights as packed", weight_bytes=f"{plain['weight_bytes']:,}"))
    bits = choice_name(result.policy_layers[0].choices[0])
    policy = plain["policy"]
    lines.append(_line("policy", f"{policy['macs']:,}", bits=bits, gbitops=f"{policy['gbitops']:.4f}"))
    return "\n".join(lines)


def _layer_line(result: Profile, layer: LayerCost) -> str:
    bits = " ".join(result.bits(layer))
    gbitops = " ".join(f"{value:.4f}" for value in result.gbitops(layer))
    weight_bytes = " ".join(f"{value:,}" for value in result.weight_bytes(layer))
    return _line(f"  {layer.name}", f"{layer.macs:,}", f"{layer.params:,}", bits, gbitops, weight_bytes)


def _line(
    name: str, macs: str = "", params: str = "", bits: str = "", gbitops: str = "", weight_bytes: str = ""
) -> str:
    return f"{name:<32}{macs:>15}{params:>12}  {bits:<24}{gbitops:<24}{weight_bytes}".rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Prints the costs of a config."""
    parser = argparse.ArgumentParser(
        prog="python -m instaqnas.tools.profile",
        description="Count MACs, parameters and GBitOps of a config's networks for one image. The data may be missing: "
        "the detector then has the 20 VOC classes.",
        epilog="Settings can be overridden, such as --detector.width 0.5.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the experiment")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--configuration",
        metavar="CHOICES",
        help="count one bit configuration: a choice such as w3a4 for all positions, or one for each, joined by commas",
    )
    options, overrides = parser.parse_known_args(arguments)

    with exit_on_input_error():
        refuse(overrides, "--run", "--init", "--bits")
        config = parse_command("eval", ["--config", options.config, *overrides]).config
        result = profile(config, class_names_of(config.data.roots))
        if options.configuration is not None:
            result = at_configuration(result, options.configuration)
        print(json.dumps(result.plain()) if options.json else format_profile(result))


if __name__ == "__main__":
    main()
