"""The four stages end to end on a tiny data set: what they leave behind, and that they continue and refuse rightly."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import instaqnas.evaluation.comparison as comparison
import instaqnas.training.detector_step as detector_step
import instaqnas.training.detector_training as detector_training
import instaqnas.training.policy_training as policy_training
import instaqnas.training.stages as stages
from instaqnas.checkpoint import load_checkpoint, save_checkpoint
from instaqnas.config.command import parse_command
from instaqnas.config.reading import from_plain
from instaqnas.config.settings import Config
from instaqnas.detector.distillation import distillation_loss
from instaqnas.detector.ssd import SSDOutput, SwitchableSSD
from instaqnas.errors import InputError, TrainingError
from instaqnas.evaluation.measure import evaluate
from instaqnas.experiment.handover import Checkpoint, best_checkpoint
from instaqnas.experiment.run_dir import RunDir
from instaqnas.experiment.stage import PRETRAIN_QUANT, SEARCH
from instaqnas.quant.batch_norm import PerChoiceBatchNorm

GPU_SUMS = "a GPU adds in no fixed order: weights of two runs agree closely, not bit for bit"
STAGES = ("pretrain_fp32", "pretrain_quant", "search", "finetune")
BITS = (
    "fp32", "uniform:w2a2", "uniform:w3a3", "uniform:w4a4", "random", "shuffled", "frequencies", "modal",
    "static", "policy",
)  # fmt: skip
ROW_KEYS = {
    "bits", "map_11pt", "map_all_point", "coco_ap", "gbitops_detector", "gbitops_policy", "gbitops_total",
    "distinct_configs", "images", "finetuned",
}  # fmt: skip


def read_report(run: Path) -> dict:
    return json.loads((run / "eval" / "report.json").read_text())


def read_images(run: Path) -> list[dict[str, str]]:
    with (run / "eval" / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def copy_stages(run: Path, to: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(run / name, to / name)
    return to


def test_every_stage_leaves_a_finished_checkpoint_and_its_config(finished_run: Path) -> None:
    for stage, epochs in zip(STAGES, (2, 2, 2, 1), strict=True):
        state = load_checkpoint(finished_run / stage / "last.pt")
        assert (state["stage"], state["epoch"]) == (stage, epochs)
        record = yaml.safe_load((finished_run / stage / "config.yaml").read_text())
        assert from_plain(record["config"]).detector.image_size == 64
        assert record["versions"]["torch"] == str(torch.__version__)
        lines = [json.loads(line) for line in (finished_run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
        assert all(math.isfinite(line["train/loss"]) for line in lines)


def test_best_checkpoint_is_the_epoch_with_the_highest_val_map(finished_run: Path) -> None:
    lines = (finished_run / "pretrain_fp32" / "metrics.jsonl").read_text().splitlines()
    maps = [json.loads(line)["eval/map"] for line in lines]
    best = load_checkpoint(finished_run / "pretrain_fp32" / "best.pt")
    assert best["epoch"] == maps.index(max(maps)) + 1


def test_a_search_keeps_its_last_epoch_and_finetuning_starts_from_it(
    finished_run: Path, make_command, tmp_path: Path, watch: Watch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    assert best_checkpoint(run, SEARCH) == run / "search" / "last.pt"  # the best mAP is an early, expensive policy's
    stages.run_finetune(make_command("finetune", run))
    assert_same(load_checkpoint(run / "search" / "last.pt")["networks"]["detector"], watch.trained[0])


def test_report_has_a_row_for_every_way_to_choose_bits(finished_run: Path) -> None:
    report = read_report(finished_run)
    assert tuple(row["bits"] for row in report["rows"]) == BITS
    assert set(report) == {"rows", "config", "versions", "seed"}
    for row in report["rows"]:
        assert set(row) >= ROW_KEYS
        assert row["images"] == 6
        assert row["gbitops_total"] == row["gbitops_detector"] + row["gbitops_policy"]
        assert (row["gbitops_policy"] > 0) == (row["bits"] == "policy")
    assert (finished_run / "eval" / "pareto.png").stat().st_size > 1000


def test_costs_and_configurations_of_the_report_follow_from_the_table_of_images(finished_run: Path) -> None:
    rows, images = {row["bits"]: row for row in read_report(finished_run)["rows"]}, read_images(finished_run)
    assert Counter(image["bits"] for image in images) == dict.fromkeys(BITS, 6)
    uniform = {bits: rows[bits]["gbitops_detector"] for bits in BITS if bits.startswith("uniform")}
    assert uniform["uniform:w2a2"] < uniform["uniform:w3a3"] < uniform["uniform:w4a4"]
    for bits in BITS[1:]:
        own = [image for image in images if image["bits"] == bits]
        configs = {tuple(image[f"position_{position:02d}"] for position in range(13)) for image in own}
        assert rows[bits]["distinct_configs"] == len(configs)
        mean = sum(float(image["gbitops"]) for image in own) / len(own)
        assert rows[bits]["gbitops_detector"] == pytest.approx(mean, abs=1e-6)
        if bits.startswith("uniform"):
            assert configs == {(bits.removeprefix("uniform:"),) * 13}
    assert uniform["uniform:w2a2"] < rows["random"]["gbitops_detector"] < uniform["uniform:w4a4"]


def test_tensorboard_shows_losses_rewards_choices_and_pictures(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "search" / "tensorboard")).Reload().Tags()
    wanted = {"reward/sampled", "reward/greedy", "policy/entropy", "cost/gbitops_greedy", "eval/map", "train/loss"}
    figures = ("entropy", "mutual_information", "distinct_configs", "rank_correlation_difficulty")
    wanted |= {f"diagnostics/{name}" for name in figures}
    wanted |= {f"{name}/position_{place:02d}" for name in ("entropy", "mutual_information") for place in range(13)}
    assert wanted <= set(events["scalars"])
    assert {f"bits/position_{position:02d}" for position in range(13)} <= set(events["histograms"])
    assert {"detections/0", "detections/3"} <= set(events["images"])


def test_search_changes_the_policy_and_finetuning_does_not(finished_run: Path, make_command) -> None:
    fresh = stages.Experiment(make_command("search", finished_run).config).policy().cpu().state_dict()
    searched = load_checkpoint(finished_run / "search" / "last.pt")["networks"]["policy"]
    best = load_checkpoint(best_checkpoint(finished_run, SEARCH))["networks"]["policy"]
    finetuned = load_checkpoint(finished_run / "finetune" / "last.pt")["networks"]["policy"]
    assert not torch.equal(fresh["head.weight"], searched["head.weight"])
    assert all(torch.equal(best[name], value) for name, value in finetuned.items())


def test_batch_norm_has_the_statistics_of_what_the_finished_policy_chooses(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "pretrain_quant")
    order = []
    meet, reestimate = stages.PolicyTraining.meet_budget, detector_training.reestimate_batch_norm
    monkeypatch.setattr(stages.PolicyTraining, "meet_budget", lambda self: order.append("policy") or meet(self))
    monkeypatch.setattr(
        detector_training, "reestimate_batch_norm", lambda *args: order.append("statistics") or reestimate(*args)
    )
    stages.run_search(make_command("search", run, "--search.batch_norm_batches=1"))
    assert order == ["policy", "statistics"]


@pytest.mark.parametrize("on", [False, True])
def test_batch_renorm_is_that_of_the_stage(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "pretrain_quant", "search")
    seen = set()
    step = detector_training.detector_step

    def watched(network: torch.nn.Module, *args: object, **settings: object) -> detector_step.StepResult:
        seen.update(m.renormalize for m in network.modules() if isinstance(m, PerChoiceBatchNorm))
        return step(network, *args, **settings)

    monkeypatch.setattr(detector_training, "detector_step", watched)
    stages.run_finetune(make_command("finetune", run, f"--finetune.batch_renorm={str(on).lower()}"))
    assert seen == {on}


def test_search_can_leave_the_detector_as_it_was_pretrained(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")  # no teacher: there is nothing to distill into
    options = ("--search.train_detector=false", "--search.distill_weight=1")
    stages.run_search(make_command("search", run, *options))
    pretrained = load_checkpoint(best_checkpoint(run, PRETRAIN_QUANT))["networks"]["detector"]
    searched = load_checkpoint(run / "search" / "last.pt")
    assert all(torch.equal(pretrained[name], value) for name, value in searched["networks"]["detector"].items())
    fresh = stages.Experiment(make_command("search", run).config).policy().cpu().state_dict()
    assert not torch.equal(fresh["head.weight"], searched["networks"]["policy"]["head.weight"])
    lines = [json.loads(line) for line in (run / "search" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert "reward/sampled" in lines[-1]
    assert not any(name.startswith("train/") for line in lines for name in line)
    with pytest.raises(InputError, match=r"^search\.train_detector: false in the search of .*, here true"):
        stages.run_finetune(make_command("finetune", run))
    stages.run_finetune(make_command("finetune", run, *options))
    with pytest.raises(InputError, match=r"^search\.train_detector: false in the search of .*, here true"):
        stages.run_finetune(make_command("finetune", run, "--bits", "static"))
    assert Checkpoint.read(run / "search" / "last.pt").further_epochs == 0
    assert Checkpoint.read(run / "finetune" / "last.pt").further_epochs == 1


def test_a_search_that_leaves_the_detector_alone_can_renew_its_batch_norm(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")
    stages.run_search(make_command("search", run, "--search.train_detector=false", "--search.batch_norm_batches=1"))
    before, after = (
        load_checkpoint(path)["networks"]["detector"]
        for path in (best_checkpoint(run, PRETRAIN_QUANT), run / "search" / "last.pt")
    )
    changed = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"running_mean", "running_var"}


@pytest.mark.slow
def test_a_search_that_leaves_the_detector_alone_continues_within_an_epoch(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = (copy_stages(finished_run, tmp_path / name, "pretrain_quant") for name in ("whole", "run"))
    options = ("--search.train_detector=false", "--search.save_minutes=1e-9")
    stages.run_search(make_command("search", whole, *options))
    saves, save = [], RunDir.save

    def interrupted(self: RunDir, *args: object, **settings: object) -> None:
        save(self, *args, **settings)
        saves.append(1)
        if len(saves) == 4:  # two steps an epoch, each saved, and the epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.run_search(make_command("search", run, *options))
    state = load_checkpoint(run / "search" / "last.pt")
    assert (state["epoch"], list(state["running"])) == (1, ["policy"])
    stages.run_search(make_command("search", run, *options))
    expected, found = (load_checkpoint(r / "search" / "last.pt")["networks"] for r in (whole, run))
    for network, weights in expected.items():
        assert all(torch.equal(found[network][name], value) for name, value in weights.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason=GPU_SUMS)
def test_same_seed_gives_the_same_weights(finished_run: Path, make_command, tmp_path: Path) -> None:
    stages.run_pretrain(make_command("pretrain", tmp_path / "again"))
    for stage in ("pretrain_fp32", "pretrain_quant"):
        first = load_checkpoint(finished_run / stage / "last.pt")["networks"]["detector"]
        second = load_checkpoint(tmp_path / "again" / stage / "last.pt")["networks"]["detector"]
        assert all(torch.equal(second[name], value) for name, value in first.items())


LOW_BIT_SETTINGS = ("--search.ema_decay=0.5", "--search.distill_weight=0.5", "--search.batch_norm_batches=1")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), LOW_BIT_SETTINGS], ids=["defaults", "average and distillation"])
def test_interrupted_search_continues_to_the_weights_of_an_uninterrupted_one(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    whole_run, run = (
        copy_stages(finished_run, tmp_path / name, "pretrain_fp32", "pretrain_quant") for name in ("whole", "run")
    )
    stages.run_search(make_command("search", whole_run, *options))
    epochs = []

    def interrupted(*args, **kwargs):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    train = detector_training.DetectorTraining.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(detector_training.DetectorTraining, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages.run_search(make_command("search", run, *options))
    assert load_checkpoint(run / "search" / "last.pt")["epoch"] == 1
    stages.run_search(make_command("search", run, *options))
    whole, continued = (load_checkpoint(r / "search" / "last.pt") for r in (whole_run, run))
    assert set(whole["networks"]) == {"detector", "policy"} | ({"trained_detector"} if options else set())
    for name, network in whole["networks"].items():
        for key, value in network.items():
            assert torch.equal(continued["networks"][name][key], value), key
    assert whole["metrics"] == continued["metrics"]


def test_finished_stage_is_not_trained_again(finished_run: Path, make_command) -> None:
    before = (finished_run / "finetune" / "last.pt").read_bytes()
    stages.run_finetune(make_command("finetune", finished_run))
    assert (finished_run / "finetune" / "last.pt").read_bytes() == before


def test_restart_keeps_the_old_stage_beside_the_new(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search", "finetune")
    old = (run / "finetune" / "last.pt").read_bytes()
    stages.run_finetune(make_command("finetune", run, "--restart", "--finetune.lr=0.001"))
    assert (run / "finetune.old-1" / "last.pt").read_bytes() == old
    assert (run / "finetune" / "last.pt").read_bytes() != old


def test_another_config_in_the_same_run_is_refused_and_nothing_is_lost(finished_run: Path, make_command) -> None:
    before = (finished_run / "search" / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"search\.policy_lr: 0\.01 -> 0\.5.*--restart"):
        stages.run_search(make_command("search", finished_run, "--search.policy_lr=0.5"))
    assert (finished_run / "search" / "last.pt").read_bytes() == before


def test_stage_without_its_predecessor_names_what_to_run(make_command, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pretrain_quant: no checkpoint; run pretrain\.py first"):
        stages.run_search(make_command("search", tmp_path / "empty"))
    with pytest.raises(InputError, match=r"search: no checkpoint; run search\.py first"):
        stages.run_eval(make_command("eval", tmp_path / "empty"))


def test_stage_after_an_unfinished_one_names_what_to_repeat(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    with pytest.raises(InputError, match=r"search: at epoch 2 of 5; repeat search\.py"):
        stages.run_finetune(make_command("finetune", run, "--search.epochs=5"))


def test_init_takes_another_checkpoint(finished_run: Path, make_command, tmp_path: Path) -> None:
    init = str(finished_run / "search" / "last.pt")
    stages.run_finetune(make_command("finetune", tmp_path / "other", "--init", init))
    assert load_checkpoint(tmp_path / "other" / "finetune" / "last.pt")["epoch"] == 1


def test_checkpoint_of_the_wrong_stage_is_refused(finished_run: Path, make_command, tmp_path: Path) -> None:
    init = str(finished_run / "pretrain_fp32" / "last.pt")
    with pytest.raises(InputError, match="of stage pretrain_fp32; needed here: search or finetune"):
        stages.run_finetune(make_command("finetune", tmp_path / "other", "--init", init))


def test_checkpoint_of_other_choices_is_refused(finished_run: Path, make_command, tmp_path: Path) -> None:
    init = str(finished_run / "pretrain_quant" / "last.pt")
    command = make_command("search", tmp_path / "other", "--init", init, "--bits.choices=[[2, 2], [8, 8]]")
    with pytest.raises(InputError, match=r"other settings: bits\.choices"):
        stages.run_search(command)


def test_truncated_checkpoint_is_refused(finished_run: Path, make_command, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes((finished_run / "search" / "last.pt").read_bytes()[:-500])
    with pytest.raises(InputError, match=r"broken\.pt: not a readable checkpoint"):
        stages.run_finetune(make_command("finetune", tmp_path / "other", "--init", str(broken)))


def test_a_checkpoint_of_something_else_is_refused_in_one_line(make_command, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.pt", {"stage": "search", "weights": torch.ones(3)})
    with pytest.raises(InputError, match=r"other\.pt"):
        stages.run_finetune(make_command("finetune", tmp_path / "run", "--init", str(tmp_path / "other.pt")))


def test_one_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"stage": "search", "weights": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    content[content.find(torch.ones(8).numpy().tobytes()) + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged checkpoint"):
        load_checkpoint(path)


def test_infinite_loss_stops_naming_step_and_images_and_keeps_the_checkpoint(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    monkeypatch.setattr(
        detector_step,
        "multibox_loss",
        lambda offsets, *_, **__: {"box": math.inf + offsets.sum(), "class": torch.ones(())},
    )
    with pytest.raises(
        TrainingError, match=r"step 0: the loss is inf; .*images of the batch: train_00000\d, train_00000\d"
    ):
        stages.run_finetune(make_command("finetune", run))
    assert load_checkpoint(run / "search" / "last.pt")["epoch"] == 2


def test_single_evaluation_does_not_touch_the_comparison(finished_run: Path, make_command) -> None:
    before = (finished_run / "eval" / "report.json").read_bytes()
    stages.run_eval(make_command("eval", finished_run, "--bits", "uniform:w3a3"))
    assert (finished_run / "eval" / "report.json").read_bytes() == before
    single = json.loads((finished_run / "eval" / "uniform_w3a3" / "report.json").read_text())["rows"]
    (compared,) = [row for row in read_report(finished_run)["rows"] if row["bits"] == "uniform:w3a3"]
    del compared["policy_minus_this"]  # needs the row of the policy
    assert single == [compared]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("configs").glob("*.yaml")))
def test_shipped_config_is_valid(name: str) -> None:
    assert parse_command("pretrain", ["--config", f"configs/{name}.yaml"]).run == Path("runs") / name


def test_restarted_pretraining_sets_both_of_its_stages_aside_at_once(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "pretrain_quant")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(detector_training, "detector_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stages.run_pretrain(make_command("pretrain", run, "--restart"))
    assert not (run / "pretrain_quant").exists()
    for stage in ("pretrain_fp32", "pretrain_quant"):
        assert (run / f"{stage}.old-1" / "last.pt").is_file()


def test_a_stage_does_not_go_on_after_its_source_has_changed(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "pretrain_quant", "search")
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(run / "pretrain_quant" / name)
        state["metrics"] = {"train/loss": 1.0}
        save_checkpoint(run / "pretrain_quant" / name, state)
    with pytest.raises(
        InputError, match=r"search: was begun otherwise \(from other weights than \S+/best\.pt\).*--restart"
    ):
        stages.run_search(make_command("search", run))


def test_training_in_bfloat16_is_close_to_that_in_float32(finished_run: Path, make_command, tmp_path: Path) -> None:
    stages.run_pretrain(make_command("pretrain", tmp_path, "--runtime.amp=bf16", "--pretrain_quant.epochs=1"))
    for stage in ("pretrain_fp32", "pretrain_quant"):
        lines = [(run / stage / "metrics.jsonl").read_text().splitlines() for run in (finished_run, tmp_path)]
        exact, found = (json.loads(line[0])["train/loss"] for line in lines)
        assert found != exact
        assert found == pytest.approx(exact, rel=0.05)
        networks = load_checkpoint(tmp_path / stage / "last.pt")["networks"]["detector"]
        assert all(value.isfinite().all() for value in networks.values())


def test_a_stage_does_not_go_on_with_other_training_images(
    finished_run: Path, make_command, config_file: Path, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search", "finetune")
    shutil.copytree(config_file.parent / "shapes", tmp_path / "shapes")
    split = tmp_path / "shapes" / "ImageSets" / "Main" / "train.txt"
    ids = split.read_text().split()
    for changed in (ids[1:], ids[::-1]):
        split.write_text("\n".join(changed) + "\n")
        message = f"with other training images: 8 then, {len(changed)} now; take another --run, or --restart"
        with pytest.raises(InputError, match=message.replace("; ", r"\); ")):
            stages.run_finetune(make_command("finetune", run, f"--data.roots=[{tmp_path / 'shapes'}]"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": ["a", "b"]}, "classes: "),
        ({"config": {}}, "of another version of this program"),
        ({"config": None}, "of another version of this program"),
        ({"networks": {}}, "of another version of this program"),
        ({"stage": "finetune"}, 'stage: "finetune" -> "search"'),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    finished_run: Path, make_command, tmp_path: Path, change: dict, message: str
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant", "search")
    save_checkpoint(run / "search" / "last.pt", load_checkpoint(run / "search" / "last.pt") | change)
    with pytest.raises(InputError, match=message) as caught:
        stages.run_search(make_command("search", run))
    assert "\n" not in str(caught.value)


def test_a_budget_that_no_configuration_can_meet_is_refused(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")
    unreachable = ("--reward.name=budget", "--reward.target_gbitops=1000")
    with pytest.raises(InputError, match=r"reward\.target_gbitops: expected .* got 1000"):
        stages.run_search(make_command("search", run, *unreachable))
    assert not (run / "search").exists()
    with pytest.raises(InputError, match=r"reward\.target_gbitops: expected .* got 1000"):
        stages.run_pretrain(make_command("pretrain", tmp_path / "new", *unreachable))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_all_positions_can_be_searched_and_compared(make_command, tmp_path: Path) -> None:
    options = ("--bits.positions=all", "--pretrain_fp32.epochs=1", "--pretrain_quant.epochs=1", "--search.epochs=1")
    run = tmp_path / "run"
    for stage, run_stage in (("pretrain", stages.run_pretrain), ("search", stages.run_search)):
        run_stage(make_command(stage, run, *options))
    stages.run_eval(make_command("eval", run, "--bits", "all", *options))
    images = read_images(run)
    assert all(None not in row and None not in row.values() for row in images)  # every line as long as the header
    policy = [row for row in images if row["bits"] == "policy"]
    assert all(row[f"position_{position:02d}"].startswith("w") for row in policy for position in range(47))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, make_command) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        stages.run_pretrain(make_command("pretrain", tmp_path / "file" / "run"))


# --- Settings that help low bits --------------------------------------------------------------------------------------

State = dict[str, torch.Tensor]


def copied(network: torch.nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


class Watch:
    """What `stages` hands to its collaborators, recorded on the way.

    trained: the trained detector before the first step and after each.
    measured: the detector at each validation.
    judging: the detector that judges the policy, at the beginning of each epoch.
    choices: bit configurations that the detector was trained under.
    teacher: of the last step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[State] = []
        self.measured: list[State] = []
        self.judging: list[State] = []
        self.choices: list[torch.Tensor] = []
        self.teacher: detector_step.Teacher | None = None
        step, judge = detector_training.detector_step, policy_training.PolicyTraining.judge
        evaluations = {module: module.evaluate for module in (detector_training, comparison)}

        def watched_step(detector, batch, choose_bits, *args, teacher, **settings):
            def watched_choose(*images) -> torch.Tensor:
                self.choices.append(choose_bits(*images))
                return self.choices[-1]

            if not self.trained:
                self.trained.append(copied(detector))
            self.teacher = teacher
            result = step(detector, batch, watched_choose, *args, teacher=teacher, **settings)
            self.trained.append(copied(detector))
            return result

        def watched_evaluate(evaluate):
            def watched(experiment, detector, *args):
                self.measured.append(copied(detector))
                return evaluate(experiment, detector, *args)

            return watched

        def watched_judge(learning, progress):
            self.judging.append(copied(learning.training.result))
            return judge(learning, progress)

        monkeypatch.setattr(detector_training, "detector_step", watched_step)
        for module, evaluation in evaluations.items():
            monkeypatch.setattr(module, "evaluate", watched_evaluate(evaluation))
        monkeypatch.setattr(policy_training.PolicyTraining, "judge", watched_judge)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name].cpu(), value.cpu(), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_the_average_of_all_steps_is_judged_validated_saved_and_handed_on(
    finished_run: Path, make_command, tmp_path: Path, watch: Watch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")
    stages.run_search(make_command("search", run, "--search.ema_decay=0.75"))
    assert len(watch.trained) == 5  # two epochs of two steps
    averages = watch.trained[:1]
    for state in watch.trained[1:]:
        averages.append({name: 0.75 * averages[-1][name] + 0.25 * value for name, value in state.items()})
    networks = load_checkpoint(run / "search" / "last.pt")["networks"]
    assert_same(networks["detector"], averages[-1])
    assert_same(networks["trained_detector"], watch.trained[-1])
    assert not torch.equal(networks["detector"]["extras.0.down.weight"], watch.trained[-1]["extras.0.down.weight"])
    assert len(watch.judging) == 2
    assert_same(watch.judging[1], averages[2])
    assert len(watch.measured) == 1
    assert_same(watch.measured[0], averages[-1])

    watch.trained.clear()
    stages.run_finetune(make_command("finetune", run, "--search.ema_decay=0.75"))
    assert_same(watch.trained[0], networks["detector"])


def test_distillation_and_sandwich_in_quantized_pretraining(
    finished_run: Path, make_command, tmp_path: Path, watch: Watch
) -> None:
    teacher = finished_run / "pretrain_fp32" / "last.pt"
    options = (
        "--pretrain_quant.epochs=1",
        "--pretrain_quant.distill_weight=0.5",
        "--pretrain_quant.configurations=sandwich",
    )
    command = make_command("pretrain", tmp_path / "run", "--init", str(teacher), *options)
    stages.run_pretrain(command)

    assert [batch.shape for batch in watch.choices] == [(4, 13)] * 2
    for batch in watch.choices:
        assert batch[[0, 1, 3]].tolist() == [[0] * 13, [2] * 13, [0] * 13]
        assert len(batch[2].unique()) > 1
    losses = json.loads((tmp_path / "run" / "pretrain_quant" / "metrics.jsonl").read_text())
    parts = [losses[f"train/loss_{name}"] for name in ("box", "class", "distill")]
    assert min(parts) > 0
    assert losses["train/loss"] == pytest.approx(sum(parts), rel=1e-5)

    experiment = stages.Experiment(command.config)
    network = experiment.detector(stages.DetectorBits.full_precision()).eval()
    network.load_state_dict(load_checkpoint(teacher)["networks"]["detector"])
    images = experiment.picture_batch().images
    with torch.no_grad():
        wanted = network(images, torch.zeros(len(images), 13, dtype=torch.int64))
    output = SSDOutput(torch.zeros_like(wanted.box_offsets), torch.zeros_like(wanted.class_logits))
    expected = 0.5 * distillation_loss(output, wanted)
    assert expected > 0
    torch.testing.assert_close(watch.teacher.losses([images])[0](output), expected)


def test_distillation_without_a_full_precision_network_names_what_is_missing(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant", "search")
    for stage, run_stage in (("search", stages.run_search), ("finetune", stages.run_finetune)):
        with pytest.raises(InputError, match=rf"^{stage}\.distill_weight: .*/run/pretrain_fp32/last\.pt is missing$"):
            run_stage(make_command(stage, run, f"--{stage}.distill_weight=1"))
    assert not (run / "finetune").exists()


@pytest.mark.slow
def test_a_stage_does_not_go_on_after_its_teacher_has_changed(finished_run: Path, make_command, tmp_path: Path) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "search")
    command = make_command("finetune", run, "--finetune.distill_weight=1")
    stages.run_finetune(command)
    stages.run_finetune(command)  # as it was: already complete
    state = load_checkpoint(run / "pretrain_fp32" / "best.pt")
    save_checkpoint(run / "pretrain_fp32" / "best.pt", state | {"metrics": {"train/loss": 1.0}})
    with pytest.raises(InputError, match=r"from other weights than \S+/search/last\.pt, \S+/pretrain_fp32/best\.pt"):
        stages.run_finetune(command)


def assert_stem_has_the_statistics_of_the_train_split(state: State, config: Config) -> None:
    """Those of the stem do not depend on how images come in batches."""
    experiment = stages.Experiment(config)
    detector = experiment.quantized_detector().eval()
    detector.load_state_dict(state)
    inputs = []

    def record(norm: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0] * args[1].view(1, -1, 1, 1))

    detector.backbone.stem.norm.register_forward_pre_hook(record)
    with torch.no_grad():
        loader = experiment.train_loader(config.finetune.batch_size, "finetune")
        loader.set_epoch(config.finetune.epochs)
        for batch in loader:
            detector(batch.images, torch.zeros(len(batch.images), 13, dtype=torch.int64, device=experiment.device))
    together = torch.cat(inputs).cpu()
    assert len(together) == 8
    torch.testing.assert_close(state["backbone.stem.norm.running_mean"][0], together.mean((0, 2, 3)))
    torch.testing.assert_close(state["backbone.stem.norm.running_var"][0], together.var((0, 2, 3)))


@pytest.mark.skipif(torch.cuda.is_available(), reason=GPU_SUMS)
def test_batch_norm_ends_with_the_statistics_of_augmented_training_images(
    finished_run: Path, make_command, tmp_path: Path, watch: Watch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    command = make_command("finetune", run, "--finetune.batch_norm_batches=5")  # there are two
    stages.run_finetune(command)
    state = load_checkpoint(run / "finetune" / "last.pt")["networks"]["detector"]
    usual = load_checkpoint(finished_run / "finetune" / "last.pt")["networks"]["detector"]
    changed = {name for name, value in state.items() if not torch.equal(value, usual[name])}
    assert changed
    assert all("running" in name for name in changed)
    assert_same(watch.measured[0], state)
    assert_stem_has_the_statistics_of_the_train_split(state, command.config)


@pytest.mark.slow
def test_a_best_epoch_before_the_last_has_these_statistics_and_training_goes_on_as_without(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, falling = detector_training.evaluate, iter([0.5, 0.4] * 2)
    monkeypatch.setattr(
        detector_training, "evaluate", lambda *arguments: replace(evaluate(*arguments), map_11pt=next(falling))
    )
    last = {}
    for batches in (0, 5):
        run = copy_stages(finished_run, tmp_path / str(batches), "search")
        options = (f"--finetune.batch_norm_batches={batches}", "--finetune.epochs=2", "--finetune.eval_every=1")
        command = make_command("finetune", run, *options)
        stages.run_finetune(command)
        last[batches] = load_checkpoint(run / "finetune" / "last.pt")
    best = load_checkpoint(run / "finetune" / "best.pt")
    assert (best["epoch"], last[5]["epoch"]) == (1, 2)
    assert_stem_has_the_statistics_of_the_train_split(best["networks"]["detector"], command.config)
    assert_stem_has_the_statistics_of_the_train_split(last[5]["networks"]["detector"], command.config)
    usual, again = (last[batches]["networks"]["detector"] for batches in (0, 5))
    changed = {name for name, value in again.items() if not torch.equal(value, usual[name])}
    assert changed
    assert all("running" in name for name in changed)


def test_the_average_gets_the_last_statistics_of_batch_norm(
    finished_run: Path, make_command, tmp_path: Path, watch: Watch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    options = ("--finetune.ema_decay=0.75", "--finetune.batch_norm_batches=2")
    command = make_command("finetune", run, *options)
    stages.run_finetune(command)
    networks = load_checkpoint(run / "finetune" / "last.pt")["networks"]
    assert_same(networks["trained_detector"], watch.trained[-1])
    assert_same(watch.measured[0], networks["detector"])
    assert_stem_has_the_statistics_of_the_train_split(networks["detector"], command.config)


# --- The search -------------------------------------------------------------------------------------------------------


def naive_rank_correlation(x: list[float], y: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [sum(other < value for other in values) + values.count(value) / 2 for value in values]

    a, b = (torch.tensor(ranks(values)).double() for values in (x, y))
    return torch.stack([a, b]).corrcoef()[0, 1].item()


def test_the_report_diagnoses_the_policy_and_the_table_of_images_says_what_makes_them_hard(
    finished_run: Path, config_file: Path
) -> None:
    rows = {row["bits"]: row for row in read_report(finished_run)["rows"]}
    assert [bits for bits, row in rows.items() if "diagnostics" in row] == ["policy"]
    found, images = rows["policy"]["diagnostics"], read_images(finished_run)
    last = json.loads((finished_run / "search" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward/sampled", "reward/greedy"} <= set(found["search"])
    assert found["search"].items() <= last.items()
    own = [image for image in images if image["bits"] == "policy"]
    with (config_file.parent / "shapes" / "difficulty.csv").open(newline="") as file:
        difficulty = {row["image_id"]: row["difficulty"] for row in csv.DictReader(file)}
    for image in images:
        assert image["difficulty"] == difficulty[image["image_id"]]
        assert 0 < float(image["smallest_side"]) < 64
        assert int(image["objects"]) >= 1
    configs = Counter(tuple(image[f"position_{place:02d}"] for place in range(13)) for image in own)
    assert found["distinct_configs"] == len(configs) == rows["policy"]["distinct_configs"]
    assert configs[tuple(found["modal_configuration"])] == max(configs.values())
    assert found["gbitops_total"] == pytest.approx(rows["policy"]["gbitops_total"])
    assert [len(found[name]) for name in ("entropy", "mutual_information", "choice_frequencies")] == [13] * 3
    assert found["entropy_mean"] == pytest.approx(sum(found["entropy"]) / 13)
    for place in range(13):
        shares = [sum(image[f"position_{place:02d}"] == name for image in own) / 6 for name in ("w2a2", "w3a3", "w4a4")]
        assert found["choice_frequencies"][place] == pytest.approx(shares)
    gbitops = [float(image["gbitops"]) for image in own]
    for name, sign in (("difficulty", 1), ("objects", 1), ("smallest_side", -1)):
        correlation = found["rank_correlation"][name]
        if len(set(gbitops)) == 1:
            assert correlation is None
        else:
            assert correlation == pytest.approx(naive_rank_correlation(gbitops, [sign * float(i[name]) for i in own]))
    assert (found["target_gbitops"], found["cost_to_target"]) == (None, None)  # the reward is `ratio`


BUDGET = ("--reward.name=budget", "--reward.target_gbitops=0.115")


def test_a_policy_from_elsewhere_is_not_reported_with_the_rewards_of_the_run_s_own_search(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "search")
    checkpoint = finished_run / "finetune" / "last.pt"
    stages.run_eval(make_command("eval", run, "--bits=policy", f"--init={checkpoint}"))
    [row] = json.loads((run / "eval" / "policy" / "report.json").read_text())["rows"]
    assert row["checkpoint"] == str(checkpoint)
    assert row["diagnostics"]["search"] == {}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--search.baseline=rloo", "--search.samples=3", "--reward.quality=loss", "--search.entropy_start=0.5"),
        ("--policy.input=stem",),
    ],
    ids=["greedy", "rloo", "stem"],
)
def test_a_search_ends_at_its_budget(
    finished_run: Path,
    make_command,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    options: tuple[str, ...],
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")
    options = (*BUDGET, *options)
    with caplog.at_level("INFO"):
        stages.run_search(make_command("search", run, *options))
    lines = [json.loads(line) for line in (run / "search" / "metrics.jsonl").read_text().splitlines()]
    assert ["diagnostics/gbitops" in line for line in lines] == [False, True]  # eval_every is 5, and the last
    assert lines[-1]["diagnostics/cost_to_target"] == pytest.approx(1, abs=0.02)
    assert lines[-1]["policy/multiplier"] >= 0
    assert lines[0]["cost/greedy_to_target"] == pytest.approx(lines[0]["cost/gbitops_greedy"] / 0.115)
    assert ("reward/greedy" in lines[0]) == ("--search.baseline=rloo" not in options)  # else when it is diagnosed
    assert sum("training images cost" in record.getMessage() for record in caplog.records) == 1
    # What the checkpoint holds costs what was logged.
    experiment = stages.Experiment(make_command("search", run, *options).config)
    state = load_checkpoint(run / "search" / "last.pt")
    detector, policy = experiment.adaptive_detector().eval(), experiment.policy().eval()
    detector.load_state_dict(state["networks"]["detector"])
    policy.load_state_dict(state["networks"]["policy"])
    loader = experiment.eval_loader("train", experiment.config.data.roots)
    report = evaluate(experiment, detector, loader, stages.greedy_by(policy), stages.policy_gbitops(policy, 64))
    assert report.gbitops_total == pytest.approx(lines[-1]["diagnostics/gbitops"])
    if "--search.baseline=rloo" in options:
        quality = sum(image.quality for image in report.per_image) / len(report.per_image)
        assert lines[-1]["quality/greedy"] == pytest.approx(quality, rel=1e-4)
        price = lines[-1]["policy/multiplier"] * (report.gbitops_total / 0.115 - 1)
        assert lines[-1]["reward/greedy"] == pytest.approx(quality - price, rel=1e-4)


def test_the_negative_loss_is_a_quality_from_one_run_of_the_detector(
    finished_run: Path, make_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, forward = [], SwitchableSSD.forward

    def counted(detector: SwitchableSSD, images: torch.Tensor, *args: object) -> SSDOutput:
        if len(images) > 1 or images.any():  # not to measure its cost
            runs.append(len(images))
        return forward(detector, images, *args)

    monkeypatch.setattr(SwitchableSSD, "forward", counted)
    options = ("--bits", "uniform:w3a3", "--reward.name=quality", "--reward.quality=loss")
    command = make_command("eval", finished_run, *options)
    stages.run_eval(command)
    assert runs == [4, 2]
    with (finished_run / "eval" / "uniform_w3a3" / "per_image.csv").open(newline="") as file:
        qualities = [float(row["quality"]) for row in csv.DictReader(file)]
    experiment = stages.Experiment(command.config)
    detector = experiment.quantized_detector().eval()
    source = best_checkpoint(finished_run, PRETRAIN_QUANT)
    detector.load_state_dict(load_checkpoint(source)["networks"]["detector"])
    expected = []
    for batch in experiment.test_loader():
        for image in range(len(batch.images)):
            one = slice(image, image + 1)
            with torch.no_grad():
                output = detector(batch.images[one], torch.ones(1, 13, dtype=torch.int64, device=experiment.device))
                mean = sum(detector.loss(output, batch.boxes_xyxy[one], batch.labels[one]).values()).item()
                expected.append(-mean * detector.targets(batch.boxes_xyxy[one], batch.labels[one]).positives.item())
    assert max(expected) < 0
    assert qualities == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_policy_on_the_stem_keeps_the_stem_of_pretraining_and_shares_it(
    finished_run: Path, make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_quant")
    options = ("--policy.input=stem", "--finetune.batch_norm_batches=2", "--search.ema_decay=0.5")
    stages.run_search(make_command("search", run, *options))
    stages.run_finetune(make_command("finetune", run, *options))
    before = load_checkpoint(best_checkpoint(run, PRETRAIN_QUANT))["networks"]["detector"]
    for stage in ("search", "finetune"):
        after = load_checkpoint(run / stage / "last.pt")["networks"]["detector"]
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert len(changed) > 100
        assert not [name for name in changed if name.startswith("backbone.stem.")]

    handed_on, forward = [], SwitchableSSD.forward

    def watched(detector: SwitchableSSD, images: torch.Tensor, choices: torch.Tensor, stem=None) -> SSDOutput:
        handed_on.append(stem is not None)
        return forward(detector, images, choices, stem)

    command = make_command("eval", run, "--bits", "policy", *options)
    monkeypatch.setattr(SwitchableSSD, "forward", watched)
    stages.run_eval(command)
    assert handed_on.count(True) == 2  # two batches; the others measure costs
    report = json.loads((run / "eval" / "policy" / "report.json").read_text())["rows"][0]
    assert 0 < report["gbitops_policy"] < 0.1 * report["gbitops_detector"]


@pytest.mark.slow
def test_the_policys_images_are_kept_from_the_detector_in_all_stages(
    make_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = tmp_path / "run", ("--data.policy_share=0.5", "--data.cache=ram")
    trained, learned = set(), set()

    def watch(step, seen: set[str]):
        def watched(network, batch, *args, **settings):
            seen.update(batch.image_ids)
            return step(network, batch, *args, **settings)

        return watched

    monkeypatch.setattr(detector_training, "detector_step", watch(detector_training.detector_step, trained))
    monkeypatch.setattr(policy_training, "policy_step", watch(policy_training.policy_step, learned))
    for stage in ("pretrain", "search", "finetune"):
        getattr(stages, f"run_{stage}")(make_command(stage, run, *options))
    assert len(trained) == len(learned) == 4
    assert not trained & learned


def test_a_detector_that_has_seen_the_policys_images_is_refused(
    finished_run: Path, make_command, tmp_path: Path
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "pretrain_fp32", "pretrain_quant")
    message = r"may have been trained on images that are held out here \(data\.policy_share: 0\.0 -> 0\.5\)"
    with pytest.raises(InputError, match=message):
        stages.run_search(make_command("search", run, "--data.policy_share=0.5"))
    init = str(run / "pretrain_fp32" / "last.pt")
    with pytest.raises(InputError, match=message):
        stages.run_pretrain(make_command("pretrain", tmp_path / "other", "--init", init, "--data.policy_share=0.5"))


def test_a_collapsed_policy_is_reported_in_one_line(
    finished_run: Path, make_command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_stages(finished_run, tmp_path / "run", "finetune")
    state = load_checkpoint(run / "finetune" / "last.pt")
    state["networks"]["policy"]["head.weight"].zero_()
    save_checkpoint(run / "finetune" / "collapsed.pt", state)
    with caplog.at_level("INFO"):
        stages.run_eval(make_command("eval", run, "--init", str(run / "finetune" / "collapsed.pt")))
    lines = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert "collapsed policy: one configuration for all 6 images of the test split" in lines


@pytest.mark.slow
def test_a_policy_may_choose_one_level_for_all_layers(make_command, tmp_path: Path) -> None:
    run = tmp_path / "levels"
    options = (
        "--bits.positions=network", "--detector.min_negatives=3", "--reward.name=budget", "--reward.quality=loss",
        "--reward.target_gbitops=0.025", "--policy.effort=true", "--search.start=sensitivity",
        "--pretrain_fp32.epochs=1",
    )  # fmt: skip
    for stage in ("pretrain", "search", "finetune"):
        getattr(stages, f"run_{stage}")(make_command(stage, run, *options))
    stages.run_eval(make_command("eval", run, "--bits=all", *options))
    rows = {row["bits"]: row for row in read_report(run)["rows"]}
    levels = [rows[f"uniform:{name}"]["gbitops_detector"] for name in ("w2a2", "w3a3", "w4a4")]
    assert levels == pytest.approx([levels[0], levels[0] * 9 / 4, levels[0] * 4], rel=1e-9)  # no layer has other bits
    chosen = [float(image["gbitops"]) for image in read_images(run) if image["bits"] == "policy"]
    assert chosen
    assert set(chosen) <= {round(level, 6) for level in levels}  # as the table writes them
    columns = {len([key for key in image if key.startswith("position_")]) for image in read_images(run)}
    assert columns == {13}  # of the full-precision network; a level fills the first


@pytest.mark.slow
def test_levels_are_trained_under_a_policy_from_the_start_and_serve_any_budget(make_command, tmp_path: Path) -> None:
    run, names = tmp_path / "levels", ("w2a2", "w3a4", "w6a6")
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"levels": [{"bits": ["w4a4"] + [name] * 46} for name in names]}))
    options = (
        "--bits.positions=network", f"--bits.levels={file}", "--reward.name=budget", "--reward.quality=loss",
        "--reward.target_gbitops=0.03", "--policy.effort=true", "--pretrain_quant.configurations=policy",
        "--search.start=pretrained", "--search.samples=all", "--search.train_detector=false",
        "--finetune.budgets=[0.02,0.05]", "--pretrain_fp32.epochs=1",
    )  # fmt: skip
    for stage in ("pretrain", "search", "finetune"):
        getattr(stages, f"run_{stage}")(make_command(stage, run, *options))
    first, last = (load_checkpoint(run / stage / "last.pt") for stage in ("pretrain_quant", "finetune"))
    assert set(first["networks"]) == {"detector", "policy"}
    assert first["networks"]["detector"]["backbone.blocks.3.pointwise.norm.running_mean"].shape[0] == 3
    costs = {}
    for budget in ("0.02", "0.05"):
        stages.run_eval(make_command("eval", run, f"--budget={budget}", *options))
        report = json.loads((run / "eval" / f"policy_at_{budget}" / "report.json").read_text())
        costs[budget] = report["rows"][0]["gbitops_total"]
    assert costs["0.02"] < costs["0.05"]
    assert last["prices"][0][1] <= 0.02
    with pytest.raises(InputError, match="a budget of 1 GBitOps: expected 0"):
        stages.run_eval(make_command("eval", run, "--budget=1", *options))
    stages.run_eval(make_command("eval", run, "--bits=uniform:level2", *options))
