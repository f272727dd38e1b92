"""Finetunes the detector under the frozen, greedy policy: the most probable choice at each position.

    python finetune.py --config configs/shapes.yaml
    python finetune.py --config configs/shapes.yaml --bits static

Starts from the result of search.py in the run folder and follows the section `finetune` of the YAML. After an
interruption the same command continues. `--bits` trains a baseline of the policy for as many epochs: the pretrained
detector under one fixed bit configuration.
"""

from instaqnas.entry import main

if __name__ == "__main__":
    main("finetune")
