"""Evaluates a run on the test split: detection quality, GBitOps, and the bit-widths chosen for each image.

    python eval.py --config configs/shapes.yaml
    python eval.py --config configs/shapes.yaml --bits all

Evaluates the latest stage in the run folder. `--bits` evaluates another way to choose bits, or compares several.
"""

from instaqnas.entry import main

if __name__ == "__main__":
    main("eval")
