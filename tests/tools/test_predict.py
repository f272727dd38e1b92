"""Prediction on image files, with an untrained detector and a policy of known choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from instaqnas.checkpoint import load_checkpoint
from instaqnas.config.reading import from_plain
from instaqnas.data.images import read_image
from instaqnas.data.voc_xml import KnownClasses, parse_annotation
from instaqnas.deploy import load, predictor
from instaqnas.detector.ssd import DetectorBits, detector_layers
from instaqnas.errors import InputError
from instaqnas.evaluation.inference import detect
from instaqnas.policy.network import PolicyNet
from instaqnas.tools import pack
from instaqnas.tools.predict import main
from instaqnas.training.stages import Experiment

CHOSEN = [1, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0]  # the policy's choice at each position, for every image
CLASSES = {"disc", "ring", "triangle", "brick", "hexagon", "star", "cross", "crescent"}
BITS = {"choices": [[2, 2], [4, 3]], "stem": [8, 8], "depthwise": [8, 8], "extras": [4, 4], "heads": [8, 8]}

Predict = Callable[..., list[dict]]


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path]) -> Path:
    """Has `tiny.yaml` and `runs/tiny`, a finished run of untrained networks."""

    @torch.no_grad()
    def choose(policy: PolicyNet) -> None:
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(CHOSEN), 2).flatten())

    settings = {"detector": {"image_size": 64, "width": 0.25}, "bits": BITS, "policy": {"pool": 4, "width": 4}}
    return make_run(settings, arrange=choose)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The run as a packed file."""
    path = folder / "packed.pt"
    named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
    pack.main([*named, "--out", str(path)])
    return path


@pytest.fixture
def predict(folder: Path, capsys: pytest.CaptureFixture) -> Predict:
    def run(*words: str | Path) -> list[dict]:
        named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
        main([*named, *(str(word) for word in words)])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def write_grey(path: Path, width: int, height: int) -> Path:
    cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
    return path


def write_photo(path: Path, orientation: int) -> Path:
    """A 60 x 40 JPEG, different in every corner, with an EXIF orientation."""
    y, x = np.mgrid[:40, :60]
    photo = Image.fromarray(np.stack([4 * x, 6 * y, 2 * (x + y)], axis=2).astype(np.uint8))
    exif = photo.getexif()
    exif[0x0112] = orientation
    photo.save(path, exif=exif)
    return path


def refusal(predict: Predict, *words: str | Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        predict(*words)
    assert exit_.value.code == 2


def test_bits_are_the_policys_and_gbitops_the_sum_over_layers(predict: Predict, folder: Path, tmp_path: Path) -> None:
    [found] = predict(write_grey(tmp_path / "a.png", 64, 64))
    assert found["bits"] == [["w2a2", "w4a3"][choice] for choice in CHOSEN]
    config = from_plain(yaml.safe_load((folder / "tiny.yaml").read_text()))
    layers = detector_layers(Experiment(config).detector(DetectorBits.full_precision()))
    bitops = 0
    for layer in layers:
        part = layer.name.rpartition(".")[2]
        if part == "pointwise":
            bitops += layer.macs * [2 * 2, 4 * 3][CHOSEN[int(layer.name.split(".")[2])]]
        else:
            bitops += layer.macs * (4 * 4 if part in ("reduce", "down") else 8 * 8)
    assert found["gbitops"]["detector"] == pytest.approx(bitops / 1e9, rel=1e-12)
    assert 0 < found["gbitops"]["policy"] < 0.1


def test_image_of_the_data_gets_the_detections_of_the_evaluation(predict: Predict, folder: Path) -> None:
    config = from_plain(yaml.safe_load((folder / "tiny.yaml").read_text()))
    experiment = Experiment(config)
    detector = experiment.quantized_detector().eval()
    detector.load_state_dict(load_checkpoint(folder / "runs" / "tiny" / "finetune" / "last.pt")["networks"]["detector"])
    batch = next(iter(experiment.test_loader()))
    expected = detect(detector, batch.images, torch.tensor([CHOSEN]), replace(config.eval, score_threshold=0.1))
    [found] = predict(folder / "shapes" / "JPEGImages" / f"{batch.image_ids[0]}.jpg", "--score", "0.1")
    assert expected.scores.shape[1] > 1
    assert [d["score"] for d in found["detections"]] == pytest.approx(expected.scores[0].tolist(), abs=1e-4)
    boxes = [value for d in found["detections"] for value in d["box_xyxy"]]
    assert boxes == pytest.approx(expected.boxes_xyxy[0].flatten().tolist(), abs=0.01)


def test_colours_are_red_green_blue(predict: Predict, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (200, 100, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "upright")[0, 0].tolist() == [200, 100, 0]
    predict(tmp_path / "a.png", "--score", "1", "--out", tmp_path)
    assert Image.open(tmp_path / "a_detections.png").getpixel((5, 5)) == (200, 100, 0)


def test_detections_name_classes_and_come_best_first(predict: Predict, tmp_path: Path) -> None:
    [found] = predict(write_photo(tmp_path / "a.jpg", 1), "--score", "0.1")
    scores = [detection["score"] for detection in found["detections"]]
    assert scores
    assert min(scores) >= 0.1
    assert scores == sorted(scores, reverse=True)
    assert {detection["label"] for detection in found["detections"]} <= CLASSES


def test_no_detection_reaches_score_1(predict: Predict, tmp_path: Path) -> None:
    [found] = predict(write_photo(tmp_path / "a.jpg", 1), "--score", "1")
    assert found["detections"] == []


def test_boxes_are_in_the_pixels_of_each_image(predict: Predict, tmp_path: Path) -> None:
    # Resizing a plain grey image does not change it, so boxes cover the same share of it at any size.
    sizes = [(64, 64), (640, 64), (50, 333), (1, 1)]
    paths = [write_grey(tmp_path / f"{width}x{height}.png", width, height) for width, height in sizes]
    square, *others = predict(*paths, "--score", "0.1")
    assert len(square["detections"]) > 1
    for (width, height), other in zip(sizes[1:], others, strict=True):
        for a, b in zip(square["detections"], other["detections"], strict=True):
            expected = np.array(a["box_xyxy"]) / 64 * [width, height, width, height]
            assert b["box_xyxy"] == pytest.approx(expected, abs=0.005 * (1 + max(width, height) / 64))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_photo_is_turned_upright(predict: Predict, tmp_path: Path, orientation: int) -> None:
    photo = write_photo(tmp_path / "photo.jpg", orientation)
    upright = ImageOps.exif_transpose(Image.open(photo))
    upright.save(tmp_path / "upright.png")
    # One by one: at another place of a batch, rounding could turn the order of nearly equal scores.
    words = ("--score", "0.1", "--batch", "1", "--out", tmp_path)
    as_taken, expected = predict(photo, tmp_path / "upright.png", *words)
    assert expected["detections"]
    assert as_taken["detections"] == expected["detections"]
    drawn = cv2.imread(str(tmp_path / "photo_detections.png"))
    factor = drawn.shape[1] // upright.width
    assert drawn.shape[1] == factor * upright.width >= 300
    strip = drawn.shape[0] - factor * upright.height
    assert 30 < strip < 100  # the bits of the layers and the cost, below the picture


def test_grey_and_transparent_images_are_taken(predict: Predict, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((30, 40), 90, np.uint8))
    cv2.imwrite(str(tmp_path / "transparent.png"), np.full((30, 40, 4), 90, np.uint8))
    a, b, c = predict(
        tmp_path / "grey.png", tmp_path / "transparent.png", write_grey(tmp_path / "rgb.png", 40, 30), "--score", "0.1"
    )
    assert a["detections"] == b["detections"] == c["detections"] != []


def test_out_gets_the_drawn_image_and_leaves_the_image_alone(predict: Predict, tmp_path: Path) -> None:
    path = write_grey(tmp_path / "a.png", 80, 50)
    before = path.read_bytes()
    predict(path, "--score", "0.1", "--out", tmp_path)
    assert path.read_bytes() == before
    drawn = cv2.imread(str(tmp_path / "a_detections.png"))
    assert drawn.shape[1] == 480  # enlarged
    picture, strip = drawn[:300], drawn[300:]
    assert (picture != 90).any()
    assert (picture == 90).mean() > 0.2
    assert len(np.unique(strip.reshape(-1, 3), axis=0)) > 3  # shades of the bits


def test_an_unreadable_image_is_named_and_counted_and_the_others_are_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good, broken = write_grey(tmp_path / "good.png", 40, 40), tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a JPEG")
    named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
    with pytest.raises(SystemExit) as exit_:
        main([*named, str(good), str(broken), str(good)])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert [json.loads(line)["file"] for line in captured.out.splitlines()] == [str(good), str(good)]
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {broken}: not a readable image", "error: 1 of 3 inputs could not be read"]


def write_video(path: Path, frames: int, size: tuple[int, int] = (96, 64)) -> Path:
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, size)
    random = np.random.default_rng(0)
    for _ in range(frames):
        video.write(random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8))
    video.release()
    return path


def test_every_frame_of_a_video_has_a_line_and_a_drawn_frame(predict: Predict, tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", 7)
    found = predict(video, "--score", "0.1", "--batch", "3", "--out", tmp_path / "drawn", "--coco", tmp_path / "x.json")
    assert [(line["file"], line["frame"], line["seconds"]) for line in found] == [
        (str(video), number, number / 10) for number in range(7)
    ]
    drawn = cv2.VideoCapture(str(tmp_path / "drawn" / "clip_detections.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (7, 10)
    assert drawn.get(cv2.CAP_PROP_FRAME_WIDTH) == 480  # 96, enlarged
    assert drawn.get(cv2.CAP_PROP_FRAME_HEIGHT) > 320  # with the bits below
    images = json.loads((tmp_path / "x.json").read_text())["images"]
    assert [image["frame"] for image in images] == list(range(7))


def test_a_video_that_cannot_be_opened_is_named(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    refusal(predict, tmp_path / "broken.mp4")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors[0] == f"error: {tmp_path / 'broken.mp4'}: cannot be opened as a video"


def test_annotations_come_back_as_the_detections(predict: Predict, tmp_path: Path) -> None:
    path = write_photo(tmp_path / "a.jpg", 6)
    words = ("--score", "0.1", "--voc", tmp_path / "voc", "--coco", tmp_path / "found.json")
    [found] = predict(path, *words)
    with Image.open(path) as image:
        height, width = image.size  # turned
    names = tuple(sorted(CLASSES))
    read = parse_annotation(
        tmp_path / "voc" / "a.xml",
        KnownClasses({name: label for label, name in enumerate(names, start=1)}, "here"),
        lambda: (width, height),
    )
    assert (read.width, read.height) == (width, height)
    assert len(read.objects) == len(found["detections"]) > 1
    for item, expected in zip(read.objects, found["detections"], strict=True):
        assert names[item.label - 1] == expected["label"]
        assert item.box_xyxy == pytest.approx(expected["box_xyxy"], abs=0.02)
    dataset = COCO(str(tmp_path / "found.json"))
    boxes = dataset.loadAnns(dataset.getAnnIds(imgIds=[1]))
    assert [dataset.cats[box["category_id"]]["name"] for box in boxes] == [d["label"] for d in found["detections"]]
    assert [box["score"] for box in boxes] == pytest.approx([d["score"] for d in found["detections"]], abs=1e-4)
    for box, expected in zip(boxes, found["detections"], strict=True):
        x, y, box_width, box_height = box["bbox"]
        assert [x, y, x + box_width, y + box_height] == pytest.approx(expected["box_xyxy"], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected either inputs or --camera"),
        (["a.png", "--camera", "0"], "expected either inputs or --camera"),
        (["a.mp4", "--voc", "annotations"], "--voc: for images only"),
        (["a.png", "--batch", "0"], "--batch: expected at least 1, got 0"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(
    predict: Predict, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    refusal(predict, *words)
    assert message in capsys.readouterr().err


def test_folders_and_patterns_stand_for_their_images(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("b.png", "a.JPG", "c.bmp"):
        write_grey(tmp_path / name, 20, 30)
    (tmp_path / "notes.txt").write_text("no image")
    files = [found["file"] for found in predict(tmp_path, str(tmp_path / "?.png"), "--batch", "2")]
    assert files == [str(tmp_path / name) for name in ("a.JPG", "b.png", "c.bmp", "b.png")]
    refusal(predict, str(tmp_path / "*.tif"))
    assert "*.tif: no images there (.jpg, " in capsys.readouterr().err


def test_images_of_a_batch_do_not_change_each_other(predict: Predict, tmp_path: Path) -> None:
    images = [write_photo(tmp_path / f"{orientation}.jpg", orientation) for orientation in (1, 3, 6)]
    one_by_one, together = (predict(*images, "--score", "0.1", "--batch", batch) for batch in ("1", "3"))
    for alone, beside in zip(one_by_one, together, strict=True):
        assert alone["bits"] == beside["bits"]
        assert [d["label"] for d in alone["detections"]] == [d["label"] for d in beside["detections"]]


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.mkdir(), lambda path: None])
def test_empty_file_folder_and_missing_file_are_refused_by_name(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "x.png")
    refusal(predict, tmp_path / "x.png")
    assert f"error: {tmp_path / 'x.png'}: " in capsys.readouterr().err


def test_two_images_of_one_name_are_not_drawn_over_each_other(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refusal(predict, "one/a.png", "two/a.jpg", "--out", tmp_path)
    assert "would be written for one/a.png and again for two/a.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png", "--score", "nan"], "--score: expected a number from 0 to 1"),
        (["a.png", "--device", "cpu"], "unknown option --device; settings are overridden with an equals sign"),
        (["a.png", "--devise=cpu"], "unknown option --devise"),
        (["a.png", "--bits=fp32"], "--bits fp32: here the policy chooses the bits"),
    ],
)
def test_wrong_options_are_refused(
    predict: Predict, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    refusal(predict, *words)
    assert message in capsys.readouterr().err


def test_untrained_run_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(folder / "tiny.yaml"), "--run", str(tmp_path / "none"), "a.png"])
    assert exit_.value.code == 2
    assert "none/search: no checkpoint; run search.py first" in capsys.readouterr().err


def test_searched_run_is_taken_where_finetuning_has_not_begun(folder: Path, tmp_path: Path, predict: Predict) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "search").symlink_to(folder / "runs" / "tiny" / "finetune")
    path = write_grey(tmp_path / "a.png", 40, 40)
    assert predict(path, "--run", tmp_path / "run") == predict(path)


# --- Packed files -----------------------------------------------------------------------------------------------------


def test_a_packed_file_alone_predicts_the_same_as_the_run(
    predict: Predict, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [write_photo(tmp_path / "a.jpg", 6), write_grey(tmp_path / "b.png", 640, 64)]
    expected = predict(*images, "--score", "0.1", "--out", tmp_path / "run")
    assert all(len(found["detections"]) > 1 for found in expected)
    monkeypatch.setattr(predictor, "Experiment", None)  # `Experiment` would read config, data and checkpoints
    main(
        [
            "--packed",
            str(packed),
            *(str(image) for image in images),
            "--score",
            "0.1",
            "--out",
            str(tmp_path / "packed"),
        ]
    )
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
    for name in ("a_detections.png", "b_detections.png"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_packed_file_keeps_the_settings_of_its_config(
    predict: Predict, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image, path = write_photo(tmp_path / "a.jpg", 1), tmp_path / "packed.pt"
    usual = predict(image, "--score", "0.1")
    settings = ["--eval.nms_iou=0.2", "--eval.candidates_per_class=6", "--eval.max_detections=4"]
    expected = predict(image, "--score", "0.1", *settings)
    assert len(expected[0]["detections"]) == 4 < len(usual[0]["detections"])
    named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
    pack.main([*named, "--out", str(path), *settings])
    capsys.readouterr()
    main(["--packed", str(path), str(image), "--score", "0.1"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def packed_refusal(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    "words", [["--run", "runs/tiny"], ["--init", "last.pt"], ["--device=cpu"], ["--detector.width=0.5"]]
)
def test_a_packed_file_takes_no_settings(packed: Path, capsys: pytest.CaptureFixture, words: list[str]) -> None:
    message = packed_refusal(capsys, "--packed", packed, "a.png", *words)
    assert message == f"error: {words[0]}: not together with --packed, which needs no config\n"


def test_either_a_config_or_a_packed_file_is_needed(packed: Path, capsys: pytest.CaptureFixture) -> None:
    assert "one of the arguments --config --packed is required" in packed_refusal(capsys, "a.png")
    both = packed_refusal(capsys, "a.png", "--packed", packed, "--config", "some.yaml")
    assert "--config: not allowed with argument --packed" in both


def test_a_training_checkpoint_is_no_packed_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = folder / "runs" / "tiny" / "finetune" / "last.pt"
    message = packed_refusal(capsys, "--packed", checkpoint, write_grey(tmp_path / "a.png", 64, 64))
    assert message.startswith(f"error: {checkpoint}: not a packed file of version 2; instaqnas.tools.pack writes them")


def test_a_policy_on_the_stem_predicts_from_its_run_and_from_a_packed_file(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"detector": {"image_size": 64, "width": 0.25}, "bits": BITS}
    folder = make_run({**settings, "policy": {"input": "stem", "pool": 8, "width": 4}})
    named = ["--config", str(folder / "tiny.yaml"), "--run", str(folder / "runs" / "tiny")]
    pack.main([*named, "--out", str(tmp_path / "packed.pt")])
    images = [str(write_photo(tmp_path / "a.jpg", 1)), str(write_grey(tmp_path / "b.png", 640, 64))]
    capsys.readouterr()
    main([*named, *images, "--score", "0.1"])
    of_run = capsys.readouterr().out.splitlines()
    main(["--packed", str(tmp_path / "packed.pt"), *images, "--score", "0.1"])
    assert capsys.readouterr().out.splitlines() == of_run
    assert all(json.loads(line)["detections"] for line in of_run)


# --- From Python ------------------------------------------------------------------------------------------------------


def test_python_gets_what_the_command_prints(folder: Path, packed: Path, predict: Predict, tmp_path: Path) -> None:
    images = [write_photo(tmp_path / "a.jpg", 6), write_grey(tmp_path / "b.png", 50, 90)]
    printed = predict(*images, "--score", "0.1")
    run = folder / "runs" / "tiny"
    for source in (run, run / "finetune" / "last.pt", packed):
        detector = load(source, device="cpu")
        results = detector(images, score_threshold=0.1)
        assert [result.bits for result in results] == [found["bits"] for found in printed]
        for result, found in zip(results, printed, strict=True):
            assert result.names == [d["label"] for d in found["detections"]]
            assert result.plain()["gbitops"] == found["gbitops"]
            boxes = torch.tensor([d["box_xyxy"] for d in found["detections"]]).view(-1, 4)
            torch.testing.assert_close(result.boxes_xyxy, boxes, rtol=0, atol=0.02)


def test_files_arrays_and_tensors_are_the_same_image(packed: Path, tmp_path: Path) -> None:
    path, detector = write_photo(tmp_path / "a.jpg", 1), load(packed)
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    single = detector(path, 0.1)
    for image in (str(path), pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        found = detector(image, 0.1)
        assert torch.equal(found.scores, single.scores)
        assert torch.equal(found.boxes_xyxy, single.boxes_xyxy)
    assert len(single.scores) > 0
    assert detector([]) == []


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4), np.uint8), r"image 1: expected uint8 \[H, W, 3\], got uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"image 1: expected uint8 \[H, W, 3\], got float32 \[4, 4, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"image 1: expected uint8 \[3, H, W\], got torch.uint8 \[4, 4, 3\]"),
        ("missing.jpg", "missing.jpg: cannot be read"),
    ],
)
def test_other_images_are_refused_by_their_number(packed: Path, image: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(packed)([np.zeros((8, 8, 3), np.uint8), image])


def test_a_folder_without_a_policy_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint with a policy; run search.py first"):
        load(tmp_path)
    with pytest.raises(InputError, match="no prices for other budgets"):
        load(folder / "runs" / "tiny", budget=0.1)
