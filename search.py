"""Searches the policy by REINFORCE, and trains the detector under the configurations that the policy samples.

    python search.py --config configs/shapes.yaml

Starts from the result of pretrain.py in the run folder and follows the sections `search`, `policy` and `reward` of the
YAML. After an interruption the same command continues.
"""

from instaqnas.entry import main

if __name__ == "__main__":
    main("search")
