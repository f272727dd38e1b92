"""Pretrains the detector: full precision first, then quantized under random bit configurations.

    python pretrain.py --config configs/shapes.yaml

The first training follows the section `pretrain_fp32`, the second `pretrain_quant`. Both write to runs/shapes, or to
the folder given with `--run`; the same command continues an interrupted training.
"""

import sys

from instaqnas.config import parse_command
from instaqnas.errors import exit_on_input_error


def main() -> None:
    with exit_on_input_error():
        command = parse_command("pretrain")
        from instaqnas.training.stages import run_pretrain  # only now: importing torch takes seconds

        run_pretrain(command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command (without --restart) continues from the last checkpoint\n")
        sys.exit(130)
