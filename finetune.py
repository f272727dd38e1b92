"""Finetunes the detector under the frozen policy, which now always takes its most probable choice.

    python finetune.py --config configs/shapes.yaml
    python finetune.py --config configs/shapes.yaml --bits static

Starts from what search.py left in the run's folder and follows the section `finetune`; the same command continues an
interrupted training. `--bits` trains a rival of the policy instead, for as long: the pretrained detector under one
fixed bit configuration.
"""

import sys

from instaqnas.config import parse_command
from instaqnas.errors import exit_on_input_error


def main() -> None:
    with exit_on_input_error():
        command = parse_command("finetune")
        from instaqnas.training.stages import run_finetune  # only now: importing torch takes seconds

        run_finetune(command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command (without --restart) continues from the last checkpoint\n")
        sys.exit(130)
