"""Searches the policy by REINFORCE, and trains the detector along under the configurations it samples.

    python search.py --config configs/shapes.yaml

Starts from what pretrain.py left in the run's folder and follows the sections `search`, `policy` and `reward`; the same
command continues an interrupted search.
"""

import sys

from instaqnas.config import parse_command
from instaqnas.errors import exit_on_input_error


def main() -> None:
    with exit_on_input_error():
        command = parse_command("search")
        from instaqnas.training.stages import run_search  # only now: importing torch takes seconds

        run_search(command)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command (without --restart) continues from the last checkpoint\n")
        sys.exit(130)
