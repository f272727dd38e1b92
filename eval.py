"""Evaluates a run on the test split: detection quality, GBitOps, and the bits that each image got.

    python eval.py --config configs/shapes.yaml
    python eval.py --config configs/shapes.yaml --bits all

Takes the latest stage in the run's folder; `--bits` measures other ways to choose bits, or compares all.
"""

import sys

from instaqnas.config import parse_command
from instaqnas.errors import exit_on_input_error


def main() -> None:
    with exit_on_input_error():
        command = parse_command("eval")
        from instaqnas.training.stages import run_eval  # only now: importing torch takes seconds

        run_eval(command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing is lost, the same command evaluates again\n")
        sys.exit(130)
