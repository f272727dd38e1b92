"""Pretrains the detector: first in full precision, then quantized under random bit configurations.

    python pretrain.py --config configs/shapes.yaml

The first training follows the section `pretrain_fp32` of the YAML, the second `pretrain_quant`. Both write to
runs/shapes, or to the folder given with `--run`. After an interruption the same command continues.
"""

from instaqnas.entry import main

if __name__ == "__main__":
    main("pretrain")
