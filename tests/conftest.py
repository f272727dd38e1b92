"""A tiny experiment on generated shapes, run once through all four stages.

One thread: the tests' tensors are too small for more, and results do not depend on the machine's load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from instaqnas.config.command import Command, parse_command
from instaqnas.data.shapes import generate_shapes
from instaqnas.training.stages import run_eval, run_finetune, run_pretrain, run_search

torch.set_num_threads(1)

CONFIG = """
data: {{roots: [{root}], val_split: val, vertical_flip: true, workers: 0}}
detector: {{image_size: 64, width: 0.125, extras_batch_norm: true}}
bits: {{choices: [[2, 2], [3, 3], [4, 4]]}}
policy: {{pool: 4, width: 4}}
reward: {{name: ratio, score_threshold: 0.05}}
pretrain_fp32: {{epochs: 2, batch_size: 4, lr: 0.002, eval_every: 1}}
pretrain_quant: {{epochs: 2, batch_size: 4, lr: 0.001}}
search: {{epochs: 2, batch_size: 4, policy_batch_size: 4, policy_lr: 0.01}}
finetune: {{epochs: 1, batch_size: 4, lr: 0.0001}}
eval: {{batch_size: 4}}
runtime: {{compile: off}}
"""
SPLITS = {"train": 8, "val": 4, "test": 6}
MakeCommand = Callable[..., Command]


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of the tiny experiment, its data generated."""
    folder = tmp_path_factory.mktemp("experiment")
    generate_shapes(folder / "shapes", SPLITS, image_size=64, seed=3)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(root=folder / "shapes"))
    return path


@pytest.fixture(scope="session")
def make_command(config_file: Path) -> MakeCommand:
    """Builds the command of a stage, as its script would, with further options."""

    def make(stage: str, run: Path, *options: str) -> Command:
        return parse_command(stage, ["--config", str(config_file), "--run", str(run), *options])

    return make


@pytest.fixture(scope="session")
def finished_run(make_command: MakeCommand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all four stages and the comparison."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run_pretrain(make_command("pretrain", run))
    run_search(make_command("search", run))
    run_finetune(make_command("finetune", run))
    run_eval(make_command("eval", run, "--bits", "all"))
    return run
