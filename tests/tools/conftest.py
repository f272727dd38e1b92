"""Tiny runs: untrained networks, calibrated on a few images, with checkpoints of a finished finetuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from instaqnas.config.reading import from_plain, to_plain
from instaqnas.data.shapes import generate_shapes
from instaqnas.experiment.run_dir import RunDir
from instaqnas.experiment.stage import FINETUNE
from instaqnas.policy.network import PolicyNet
from instaqnas.quant.batch_norm import PerChoiceBatchNorm
from instaqnas.quant.switchable import calibrate
from instaqnas.training.detector_training import DetectorTraining
from instaqnas.training.stages import Experiment

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Makes a folder with `shapes`, `tiny.yaml` and `runs/tiny`.

    The function takes the settings of the config except the data; `arrange` may change the policy.
    """

    def make(settings: dict, *, test_images: int = 1, arrange: Callable[[PolicyNet], None] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("run")
        generate_shapes(folder / "shapes", {"train": 6, "test": test_images}, image_size=64)
        settings = {"data": {"roots": [str(folder / "shapes")], "workers": 0}, "device": "cpu", **settings}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
        config = from_plain(settings)
        experiment = Experiment(config)
        calibrated, policy = experiment.quantized_detector(), experiment.policy()
        images = next(iter(experiment.eval_loader("train", config.data.roots))).images
        for module in (*calibrated.modules(), *policy.modules()):
            if isinstance(module, PerChoiceBatchNorm):
                module.momentum = 1.0  # take the statistics of these images
        numbers = torch.arange(len(images))[:, None] + torch.arange(len(calibrated.positions))
        choices = numbers % len(calibrated.choice_names)  # [B, L], all choices at every position
        calibrate(calibrated, lambda: calibrated(images, choices))
        detector = experiment.adaptive_detector()
        detector.load_state_dict(calibrated.state_dict())
        observed = detector.observe(images).input
        calibrate(policy, lambda: policy(observed))
        if arrange is not None:
            arrange(policy)
        run_dir = RunDir(folder / "runs" / "tiny", FINETUNE, to_plain(config), experiment.class_names)
        state = DetectorTraining.begin(experiment, run_dir, detector, config.finetune).state
        state.networks["policy"], state.epoch = policy, config.finetune.epochs
        run_dir.save(state.state_dict(), best=False)
        return folder

    return make


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture) -> Callable[[Callable[[list[str]], None], list[str]], str]:
    """Runs the `main` of a tool on words that it refuses, and returns its error line."""

    def run(main: Callable[[list[str]], None], words: list[str]) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        return errors[0]

    return run
