"""Images shared by two detectors: hand-made detections, and each image run alone on its detector."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.reading import from_plain, to_plain
from instaqnas.data.loader import Batch
from instaqnas.detector.ssd import SwitchableSSD, detector_costs
from instaqnas.evaluation.inference import detect
from instaqnas.evaluation.measure import ImageRow, MeasuredBatch, evaluate
from instaqnas.experiment.parts import Experiment
from instaqnas.experiment.run_dir import RunDir
from instaqnas.experiment.stage import stage_named
from instaqnas.metrics.voc import DetectionRecords, RecordBatch, voc_map
from instaqnas.policy.bit_config import fixed
from instaqnas.seeds import generator
from instaqnas.tools.headroom import main, map_11pt, mixed, orders
from instaqnas.training.detector_training import DetectorTraining

SETTINGS = {
    "detector": {"image_size": 64, "width": 0.125, "extras_batch_norm": True},
    "bits": {"choices": [[4, 4], [2, 2], [3, 3]]},
    "policy": {"pool": 4, "width": 4},
    "eval": {"batch_size": 3},
}
STATIC = ["w4a4", *["w2a2"] * 11, "w3a3"]
STAGES = {"finetune_uniform_w2a2": ["w2a2"] * 13, "finetune_uniform_w4a4": ["w4a4"] * 13, "finetune_static": STATIC}
BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])


def image(index: int, found: int, *, objects: int = 1, loss: float = 0.0, difficulty: float = 0.5) -> MeasuredBatch:
    """A batch of one image with up to 2 `objects` of class 1; the first `found` of them are detected."""
    row = ImageRow(f"{index}", [0], 1.0, -loss, objects, found, 10.0, difficulty)
    labels = torch.ones(1, 2, dtype=torch.int64)
    detections = (BOXES[None, :found], torch.full((1, found), 0.9), labels[:, :found])
    truth = (BOXES[None, :objects], labels[:, :objects], torch.zeros(1, objects, dtype=torch.bool))
    return MeasuredBatch([index], [row], RecordBatch(*detections, *truth))


def batch(*images: MeasuredBatch) -> MeasuredBatch:
    return MeasuredBatch.of([one for measured in images for one in measured.images()])


def test_each_image_counts_with_the_detections_of_its_own_detector() -> None:
    cheap = [batch(image(0, 0), image(1, 1, objects=2)), batch(image(2, 0))]
    expensive = [batch(image(0, 1), image(1, 2, objects=2)), batch(image(2, 1))]
    # 4 objects, all detections right: 11-point AP is the share of the recalls 0, 0.1, ..., 1 that are reached.
    assert map_11pt(cheap, ["disc"]) == pytest.approx(3 / 11)  # recall 1/4
    assert map_11pt(expensive, ["disc"]) == pytest.approx(1)
    assert map_11pt(mixed(cheap, expensive, [2]), ["disc"]) == pytest.approx(6 / 11)  # 2/4
    assert map_11pt(mixed(cheap, expensive, [1, 2]), ["disc"]) == pytest.approx(8 / 11)  # 3/4
    assert map_11pt(mixed(cheap, expensive, []), ["disc"]) == pytest.approx(3 / 11)
    assert [row.detections for part in mixed(cheap, expensive, [0]) for row in part.rows] == [1, 1, 0]


def test_orders_begin_with_the_largest_and_keep_equals_as_they_were() -> None:
    cheap = [batch(image(0, 0, loss=5.0, difficulty=0.1), image(1, 0, objects=2, loss=7.0, difficulty=0.9))]
    cheap += [batch(image(2, 0, loss=6.0, difficulty=0.2))]
    expensive = [batch(image(0, 0, loss=1.0), image(1, 0, objects=2, loss=6.0)), batch(image(2, 0, loss=4.0))]
    assert {name: order.tolist() for name, order in orders(cheap, expensive).items()} == {
        "by objects": [1, 0, 2],
        "by difficulty": [1, 2, 0],
        "by loss at the cheap one": [1, 2, 0],
        "by loss saved": [0, 2, 1],
    }


def test_a_data_set_without_difficulties_has_no_such_order() -> None:
    measured = [batch(image(0, 0, difficulty=float("nan")), image(1, 0))]
    assert list(orders(measured, measured)) == ["by objects", "by loss at the cheap one", "by loss saved"]


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """Has `tiny.yaml` and `runs/tiny`, with a policy, and with other weights for each fixed configuration."""
    folder = make_run(SETTINGS, test_images=8)
    config = from_plain(yaml.safe_load((folder / "tiny.yaml").read_text()))
    experiment, run = Experiment(config), folder / "runs" / "tiny"
    for number, (stage, configuration) in enumerate(STAGES.items()):
        detector = network(folder, experiment, "finetune")
        noise = generator(number)
        for head in detector.class_heads:
            head.weight.data += 0.5 * head.weight.std() * torch.randn(head.weight.shape, generator=noise)
        run_dir = RunDir(run, stage_named(stage), to_plain(config), experiment.class_names, configuration=configuration)
        state = DetectorTraining.begin(experiment, run_dir, detector, config.finetune).state
        state.epoch = config.search.epochs + config.finetune.epochs
        run_dir.save(state.state_dict(), best=False)
    return folder


def network(folder: Path, experiment: Experiment, stage: str) -> SwitchableSSD:
    detector = experiment.quantized_detector()
    state = load_checkpoint(folder / "runs" / "tiny" / stage / "last.pt")
    detector.load_state_dict(state["networks"]["detector"])
    return detector.eval()


@torch.no_grad()
def expected_gbitops(folder: Path, experiment: Experiment, images: list[Batch], table: torch.Tensor) -> list[float]:
    """Expected GBitOps of each image under the policy, by a loop over positions and choices; `table` is [13, 3]."""
    policy = experiment.policy().eval()
    policy.load_state_dict(load_checkpoint(folder / "runs" / "tiny" / "finetune" / "last.pt")["networks"]["policy"])
    expected = []
    for one in images:
        probabilities = policy(one.images)[0].softmax(-1)
        expected.append(sum(probabilities[p, k].item() * table[p, k].item() for p in range(13) for k in range(3)))
    return expected


def words(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny"), *more]


@pytest.mark.slow
def test_figures_equal_each_image_run_alone_on_its_detector(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(words(folder, "--split", "test", "--json"))
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [line for line in captured.err.splitlines() if line.startswith("note")] == [
        "note: do not use the test split both to pick choices or targets and to evaluate them"
    ]
    assert [found[name]["configuration"] for name in ("cheap", "expensive")] == [["w2a2"] * 13, ["w4a4"] * 13]
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    images = [one for batch in experiment.test_loader() for one in batch.split(len(batch.images))]
    stages = [(network(folder, experiment, f"finetune_uniform_{name}"), k) for name, k in (("w2a2", 1), ("w4a4", 0))]

    def expected_map(expensive_images: Sequence[int]) -> float:
        records = DetectionRecords()
        for index, one in enumerate(images):
            detector, choice = stages[index in expensive_images]
            got = detect(detector, one.images, torch.full((1, 13), choice), experiment.config.eval)
            truth = one.boxes_xyxy, one.labels, one.difficult
            records.add(one.image_ids, got.boxes_xyxy, got.scores, got.labels, *truth)
        return voc_map(records, experiment.class_names).map_11pt

    def expected(order: Sequence[int]) -> list[float]:
        return [expected_map(order[:count]) for count in (2, 4, 6)]

    def most(values: list[float]) -> list[int]:
        return sorted(range(8), key=lambda index: -values[index])

    costs = detector_costs(stages[0][0])
    cheap, expensive = (costs.gbitops(torch.full((1, 13), choice)).item() for _, choice in stages)
    assert [found[name]["gbitops"] for name in ("cheap", "expensive")] == pytest.approx([cheap, expensive])
    assert found["gbitops"] == pytest.approx(
        [(3 * cheap + expensive) / 4, (cheap + expensive) / 2, (cheap + 3 * expensive) / 4]
    )
    assert found["cheap"]["map_11pt"] == pytest.approx(expected_map([]))
    assert found["expensive"]["map_11pt"] == pytest.approx(expected_map(range(8)))

    objects = [one.objects.item() for one in images]
    assert len(set(objects)) > 2
    of_policy = expected_gbitops(folder, experiment, images, costs.gbitops_table())
    assert len(set(of_policy)) == 8
    draws = generator(0, "headroom")
    random_maps = [expected(torch.randperm(8, generator=draws).tolist()) for _ in range(5)]
    wanted = {
        "by objects": expected(most(objects)),
        "by difficulty": expected(most([a.difficulty for a in experiment.test_loader().dataset.annotations])),
        "by expected GBitOps": expected(most(of_policy)),
        "at random": [sum(values) / 5 for values in zip(*random_maps, strict=True)],
    }
    assert list(found["map_11pt"]) == [
        "by objects",
        "by difficulty",
        "by loss at the cheap one",
        "by loss saved",
        "by expected GBitOps",
        "at random",
    ]
    for name, values in wanted.items():
        assert found["map_11pt"][name] == pytest.approx(values), name
    assert len({tuple(values) for values in wanted.values()}) > 2


def test_a_checkpoint_runs_under_the_bits_of_its_training(folder: Path, capsys: pytest.CaptureFixture) -> None:
    static = folder / "runs" / "tiny" / "finetune_static" / "last.pt"
    main(words(folder, "--cheap", str(static), "--split", "test", "--json"))
    found = json.loads(capsys.readouterr().out)
    assert (found["cheap"]["configuration"], found["cheap"]["checkpoint"]) == (STATIC, str(static))
    assert found["expensive"]["configuration"] == ["w4a4"] * 13
    experiment = Experiment(from_plain(yaml.safe_load((folder / "tiny.yaml").read_text())))
    detector = network(folder, experiment, "finetune_static")
    report = evaluate(experiment, detector, experiment.test_loader(), fixed([0, *[1] * 11, 2]))
    assert found["cheap"]["map_11pt"] == pytest.approx(report.map_11pt)
    assert found["cheap"]["gbitops"] == pytest.approx(report.gbitops_detector)


@pytest.mark.parametrize(
    ("option", "stage", "message"),
    [
        ("--expensive", "finetune", "last.pt: a checkpoint of stage finetune; needed here: finetune_fixed"),
        ("--cheap", "finetune_modal", "last.pt: no such checkpoint"),
    ],
)
def test_an_unusable_checkpoint_is_named(
    folder: Path, error_of: Callable[..., str], option: str, stage: str, message: str
) -> None:
    assert message in error_of(main, words(folder, option, str(folder / "runs" / "tiny" / stage / "last.pt")))


def test_a_checkpoint_of_other_positions_is_refused(folder: Path, error_of: Callable[..., str]) -> None:
    static = str(folder / "runs" / "tiny" / "finetune_static" / "last.pt")
    error = error_of(main, words(folder, "--cheap", static, "--expensive", static, "--bits.positions=backbone"))
    assert "last.pt: trained with other settings: bits.positions" in error


@pytest.mark.slow
def test_the_expensive_detector_has_to_cost_more(folder: Path, error_of: Callable[..., str]) -> None:
    static = str(folder / "runs" / "tiny" / "finetune_static" / "last.pt")
    assert f"not more than {static} with its" in error_of(main, words(folder, "--cheap", static, "--expensive", static))


@pytest.mark.slow
def test_the_table_has_a_line_for_every_order(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(words(folder))
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith("note: the network was trained on the train split")
    lines = captured.out.splitlines()
    assert lines[0] == "on the train split"
    assert lines[1].startswith("cheap: w2a2, mAP (11 points) ")
    assert lines[4].split()[-3:] == ["25%", "50%", "75%"]
    assert len(lines) == 12
    assert all(len(line.split()) > 4 for line in lines[6:])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "static"], "--bits: this tool has no such option"),
        (["--init", "x.pt"], "--init: this tool has no such option"),
        (["--split", "nowhere"], "no split 'nowhere'"),
        (["--bits.choices=[[4, 4]]"], "bits.choices: expected two or more of different cost"),
        (["--bits.choices=[[4, 4], [2, 2]]"], "trained with other settings: bits.choices"),
        (
            ["--run", "nowhere"],
            "nowhere: no detector trained under uniform:w2a2; run finetune.py --bits uniform:w2a2 first, or name a "
            "checkpoint with --cheap",
        ),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    folder: Path, error_of: Callable[..., str], more: list[str], message: str
) -> None:
    assert message in error_of(main, words(folder, *more))
