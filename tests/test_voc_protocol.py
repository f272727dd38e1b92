"""The protocol of VOC07+12 in miniature: archives in a folder, download, four stages, evaluation."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.command import Command, parse_command
from instaqnas.detector.ssd import DetectorBits, SwitchableSSD, detector_costs
from instaqnas.errors import InputError
from instaqnas.policy.network import PolicyNet, policy_gbitops
from instaqnas.tools.download_voc import download_voc
from instaqnas.training.stages import run_eval, run_finetune, run_pretrain, run_search
from tests.plain_ssd import PytorchSSD, trained
from tests.voc_archives import write_archives

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune")
WIDTH = 0.25
SMALL = [
    *("--detector.image_size=64", f"--detector.width={WIDTH}", "--data.workers=0", "--runtime.compile=off"),
    *(f"--{stage}.epochs=2" for stage in STAGES),
    *(f"--{stage}.batch_size=4" for stage in STAGES),
    *("--search.policy_batch_size=4", "--eval.batch_size=4", "--device=cpu"),
]


def command(stage: str, *options: str) -> Command:
    return parse_command(stage, ["--config", str(CONFIGS / "voc_paper.yaml"), *SMALL, *options])


@pytest.fixture
def voc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the miniature data set, downloaded from a mirror, and weights to start from."""
    archives = write_archives(tmp_path / "mirror")
    monkeypatch.chdir(tmp_path)
    download_voc(Path("data"), tmp_path / "mirror", archives)
    torch.save(trained(PytorchSSD(21, WIDTH)).state_dict(), command("pretrain").config.pretrain_fp32.pretrained)
    return tmp_path


@pytest.mark.slow
def test_the_paper_config_goes_through_all_stages(voc: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_pretrain(command("pretrain"))
    assert "data/mobilenet-v1-ssd-mp-0_675.pth: MobileNetV1-SSD of pytorch-ssd: 175 keys loaded;" in caplog.text
    run_search(command("search"))
    run_finetune(command("finetune"))
    run_eval(command("eval", "--bits", "basic"))

    run = voc / "runs" / "voc_paper"
    for stage in STAGES:
        state = load_checkpoint(run / stage / "last.pt")
        assert state["epoch"] == 2
        assert len(state["classes"]) == 20
        assert len((run / stage / "metrics.jsonl").read_text().splitlines()) == 2
        assert not (run / stage / "best.pt").exists()  # there is no val split to pick one by
    rows = json.loads((run / "eval" / "report.json").read_text())["rows"]
    uniform = [f"uniform:w{w}a4" for w in (3, 4, 5)]
    assert [row["bits"] for row in rows] == ["fp32", *uniform, "random", "policy"]
    assert {row["images"] for row in rows} == {5}  # VOC2007 test
    assert all(0 <= row["map_11pt"] <= 1 for row in rows)

    weights = command("pretrain").config.pretrain_fp32.pretrained
    torch.save(trained(PytorchSSD(21, WIDTH), seed=1).state_dict(), weights)
    with pytest.raises(InputError, match=rf"pretrain_fp32: was begun otherwise \(from other weights than {weights}\)"):
        run_pretrain(command("pretrain"))


def test_the_paper_config_has_the_published_settings() -> None:
    config = parse_command("search", ["--config", str(CONFIGS / "voc_paper.yaml")]).config
    published = {  # epochs, batch size, SGD's learning rate
        "pretrain_fp32": (300, 64, 5e-4),
        "pretrain_quant": (300, 32, 5e-4),
        "search": (300, 32, 5e-4),
        "finetune": (300, 32, 1e-5),
    }
    for stage, settings in published.items():
        section = getattr(config, stage)
        assert (section.epochs, section.batch_size, section.lr) == settings
        assert (section.optimizer, section.weight_decay, section.warmup_epochs) == ("sgd", 1e-4, 0)
    assert config.bits.choices == [(3, 4), (4, 4), (5, 4)]
    assert (config.bits.stem, config.bits.depthwise, config.bits.extras, config.bits.heads) == (
        (8, 8), (8, 8), (4, 4), (8, 8),
    )  # fmt: skip
    assert (config.policy.pool, config.policy.width) == (2, 16)
    assert (config.search.policy_lr, config.search.policy_batch_size) == (5e-4, 128)
    assert (config.search.entropy_start, config.search.entropy_end) == (0.8, 0.8)
    reward = config.reward
    assert (reward.name, reward.quality) == ("window_signed", "precision")
    assert (reward.positive, reward.negative, reward.quality_threshold) == (30, -10, 0.6)
    policy_cost = 2.34  # at 8 bits; the published window, 42 to 49, is for the detector alone
    window = (reward.window_lower, reward.window_upper_start, reward.window_upper_end)
    assert window == pytest.approx((42 + policy_cost, 49 + policy_cost, 49 + policy_cost))


def sizes_of(config: str) -> list[tuple[int, list[str]]]:
    """(image size, options) of every image size that the header of a config names."""
    text = (CONFIGS / config).read_text()
    lines = re.findall(r"^# +(--detector\.image_size .*)$", text, flags=re.MULTILINE)
    return [(300, []), *((int(line.split()[1]), line.split()) for line in lines)]


@pytest.mark.parametrize("config", ["voc.yaml", "voc_paper.yaml"])
def test_every_image_size_has_its_default_boxes_and_a_reward_that_it_can_reach(config: str) -> None:
    boxes = {300: 3000, 224: 1602, 112: 432}  # 6 for every cell of the six maps
    sizes = sizes_of(config)
    assert [size for size, _ in sizes] == list(boxes)
    for size, options in sizes:
        settings = parse_command("search", ["--config", str(CONFIGS / config), *options]).config
        bits = DetectorBits(settings.bits.choices, (8, 8), (8, 8), (4, 4), (8, 8))
        extras_batch_norm = settings.detector.extras_batch_norm
        detector = SwitchableSSD(21, bits, image_size=size, extras_batch_norm=extras_batch_norm)
        assert len(detector.default_boxes_cxcywh) == boxes[size]
        pool, width, policy_bits = settings.policy.pool, settings.policy.width, settings.policy.bits
        policy = PolicyNet(13, len(settings.bits.choices), pool=pool, width=width, bits=policy_bits)
        policy_cost = policy_gbitops(policy, size)
        costs = [policy_cost + detector_costs(detector).gbitops(torch.full((1, 13), k)).item() for k in range(3)]
        reward = settings.reward
        if reward.name == "budget":
            assert costs[0] < reward.target_gbitops < costs[1]
        else:
            assert reward.window_lower < costs[0] < costs[1] < reward.window_upper_end < costs[2]
