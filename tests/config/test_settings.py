"""Ranges of the settings, and settings that have to go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from instaqnas.config.command import Command
from instaqnas.config.reading import from_plain, to_plain
from instaqnas.config.settings import Config, DataConfig, DetectorConfig
from instaqnas.errors import InputError

MINIMAL = "data: {roots: [voc]}\n"

Parse = Callable[..., Command]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--data.roots=[]", "at least one folder, such as [VOCdevkit/VOC2007], got []"),
        ("--data.workers=-2", "at least 0, or -1 for one per CPU, got -2"),
        ("--data.test_split=", 'the name of a split, got ""'),
        ("--seed=-1", "0 to 4294967295, got -1"),
        ("--detector.image_size=63", "at least 64, got 63"),
        ("--detector.width=0", "more than 0, got 0.0"),
        ("--detector.box_sizes=[[1, 2]]", "six pairs [smaller, larger] above 0, got [[1, 2]]"),
        (
            "--detector.box_sizes=[[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [7, 7]]",
            "six pairs [smaller, larger] above 0, got [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [7, 7]]",
        ),
        (
            "--detector.box_sizes=[[0, 1], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]",
            "six pairs [smaller, larger] above 0, got [[0, 1], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]",
        ),
        ("--bits.stem=[9, 8]", "bit-widths from 2 to 8, or 32, got [9, 8]"),
        ("--bits.stem=[8, 1]", "bit-widths from 2 to 8, or 32, got [8, 1]"),
        ("--bits.heads=[1, 8]", "bit-widths from 2 to 8, or 32, or 1 for activations, got [1, 8]"),
        ("--bits.depthwise=[8, 0]", "bit-widths from 2 to 8, or 32, or 1 for activations, got [8, 0]"),
        ("--policy.bits=[16, 16]", "bit-widths from 2 to 8, or 32, got [16, 16]"),
        (
            "--bits.choices=[]",
            "one to eight different pairs of bit-widths from 2 to 8, or 32, or 1 for activations, got []",
        ),
        (
            "--bits.choices=[[3, 0]]",
            "one to eight different pairs of bit-widths from 2 to 8, or 32, or 1 for activations, got [[3, 0]]",
        ),
        (
            "--bits.choices=[[3, 4], [3, 4]]",
            "one to eight different pairs of bit-widths from 2 to 8, or 32, or 1 for activations, got [[3, 4], [3, 4]]",
        ),
        ("--policy.pool=301", "at most detector.image_size = 300, got 301"),
        ("--data.policy_share=1", "at least 0 and less than 1, got 1.0"),
        ("--data.policy_share=-0.1", "at least 0 and less than 1, got -0.1"),
        ("--search.samples=0", "at least 1, or all, got 0"),
        ("--search.entropy_start=-1", "at least 0, got -1.0"),
        ("--search.entropy_end=-1", "at least 0, got -1.0"),
        ("--reward.multiplier_gain=-1", "at least 0, got -1.0"),
        ("--search.epochs=0", "at least 1, got 0"),
        ("--search.policy_batch_size=0", "at least 1, got 0"),
        ("--eval.batch_size=0", "at least 1, got 0"),
        ("--finetune.lr=0", "more than 0, got 0.0"),
        ("--finetune.lr=.inf", "a finite number, got Infinity"),
        ("--finetune.warmup_epochs=11", "at most finetune.epochs = 10, got 11.0"),
        ("--pretrain_fp32.ema_decay=1", "at least 0 and less than 1, got 1.0"),
        ("--search.ema_decay=-0.1", "at least 0 and less than 1, got -0.1"),
        ("--finetune.distill_weight=-1", "at least 0, got -1.0"),
        ("--pretrain_quant.batch_norm_batches=-1", "at least 0, got -1"),
        ("--search.epsilon_start=1.5", "a number from 0 to 1, got 1.5"),
        ("--eval.nms_iou=-0.1", "a number from 0 to 1, got -0.1"),
        ("--reward.score_threshold=2", "a number from 0 to 1, got 2.0"),
        ("--reward.negative=10", "at most 0, got 10.0"),
    ],
)
def test_value_outside_its_range_names_key_value_and_expectation(
    refusal: Callable[..., str], option: str, expected: str
) -> None:
    key = option.removeprefix("--").partition("=")[0]
    assert refusal(MINIMAL, option) == f"{key}: expected {expected}"


def test_ranges_hold_for_configs_made_in_code() -> None:
    config = Config(data=DataConfig(roots=["voc"]))
    with pytest.raises(InputError, match=r"^detector\.image_size: expected at least 64, got 32$"):
        replace(config, detector=DetectorConfig(image_size=32))


def test_budget_reward_needs_a_target(refusal: Callable[..., str], parse: Parse) -> None:
    message = refusal(MINIMAL, "--reward.name=budget")
    assert message == "reward.target_gbitops: expected more than 0 for the reward `budget`, got 0.0"
    assert parse(MINIMAL, "--reward.name=budget", "--reward.target_gbitops=5").config.reward.target_gbitops == 5.0


@pytest.mark.parametrize("name", ["window_gate", "window_scaled", "window_signed"])
def test_window_rewards_need_a_window(refusal: Callable[..., str], parse: Parse, name: str) -> None:
    message = refusal(MINIMAL, f"--reward.name={name}", "--reward.window_upper_end=42")
    assert message == "reward.window_upper_end: expected more than reward.window_lower = 42.0, got 42.0"
    parse(MINIMAL, "--reward.name=ratio", "--reward.window_upper_end=42")


@pytest.mark.parametrize("name", ["ratio", "window_gate", "window_scaled", "window_signed"])
def test_rewards_of_a_quality_from_0_to_1_refuse_minus_the_loss(
    refusal: Callable[..., str], parse: Parse, name: str
) -> None:
    message = refusal(MINIMAL, f"--reward.name={name}", "--reward.quality=loss")
    assert message == f'reward.quality: expected precision, recall, f1 or ap for reward.name = {name}, got "loss"'
    for other in ("quality", "budget"):
        options = (f"--reward.name={other}", "--reward.quality=loss", "--reward.target_gbitops=5")
        assert parse(MINIMAL, *options).config.reward.quality == "loss"


def test_a_start_by_sensitivity_needs_effort_and_the_reward_budget_on_losses(
    refusal: Callable[..., str], parse: Parse
) -> None:
    start, effort, loss = "--search.start=sensitivity", "--policy.effort=true", "--reward.quality=loss"
    budget = ("--reward.name=budget", "--reward.target_gbitops=9")
    assert refusal(MINIMAL, start) == "policy.effort: expected true for search.start = sensitivity, got false"
    message = refusal(MINIMAL, start, effort, *budget)
    assert message == 'reward.quality: expected loss for search.start = sensitivity, got "f1"'
    message = refusal(MINIMAL, start, effort, loss, "--reward.name=quality")
    assert message == 'search.start: expected uniform for reward.name = quality, got "sensitivity"'
    assert parse(MINIMAL, start, effort, loss, *budget).config.search.start == "sensitivity"


def test_detector_that_the_search_does_not_train_has_no_average(refusal: Callable[..., str], parse: Parse) -> None:
    message = refusal(MINIMAL, "--search.train_detector=false", "--search.ema_decay=0.5")
    assert message == "search.ema_decay: expected 0 for search.train_detector = false, got 0.5"
    assert parse(MINIMAL, "--search.ema_decay=0.5").config.search.train_detector


def test_leaving_one_out_needs_two_samples(refusal: Callable[..., str], parse: Parse) -> None:
    message = refusal(MINIMAL, "--search.baseline=rloo")
    assert message == "search.samples: expected at least 2 for search.baseline = rloo, got 1"
    assert parse(MINIMAL, "--search.baseline=rloo", "--search.samples=2").config.search.samples == 2
    assert parse(MINIMAL, "--search.samples=1").config.search.baseline == "greedy"


def test_one_bit_is_for_activations_behind_a_relu(parse: Parse, refusal: Callable[..., str]) -> None:
    bits = parse(MINIMAL, "--bits.choices=[[2, 1], [2, 2]]", "--bits.heads=[3, 1]").config.bits
    assert bits.choices == [(2, 1), (2, 2)]
    assert bits.heads == (3, 1)
    message = refusal(MINIMAL, "--bits.stem=[3, 1]")
    assert message == "bits.stem: expected bit-widths from 2 to 8, or 32, got [3, 1]"


@pytest.mark.parametrize("positions", ["backbone", "backbone+extras", "all"])
def test_policy_cannot_observe_a_stem_whose_bits_it_chooses(
    refusal: Callable[..., str], parse: Parse, positions: str
) -> None:
    message = refusal(MINIMAL, "--policy.input=stem", f"--bits.positions={positions}")
    assert message == f'policy.input: expected image for bits.positions = {positions}, got "stem"'
    assert parse(MINIMAL, "--policy.input=stem").config.policy.input == "stem"


def test_features_of_the_stem_are_pooled_to_one_at_most(refusal: Callable[..., str], parse: Parse) -> None:
    options = ("--policy.input=stem", "--detector.image_size=75")
    assert refusal(MINIMAL, *options, "--policy.pool=39") == (
        "policy.pool: expected at most half of detector.image_size = 75, got 39"
    )
    assert parse(MINIMAL, *options, "--policy.pool=38").config.policy.pool == 38


@pytest.mark.parametrize("quantizer", ["pact", "dorefa"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", "nested", 'bits.weights: expected shared or separate for bits.quantizer = {}, got "nested"'),
        ("per_channel", True, "bits.per_channel: expected false for bits.quantizer = {}, got true"),
    ],
)
def test_settings_of_lsq_are_refused_for_other_quantizers(
    quantizer: str, name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as error:
        from_plain({"data": {"roots": ["voc"]}, "bits": {"quantizer": quantizer, name: value}})
    assert str(error.value) == message.format(quantizer)
    for lsq in ("lsq", "lsq_plus"):
        config = from_plain({"data": {"roots": ["voc"]}, "bits": {"quantizer": lsq, name: value}})
        assert getattr(config.bits, name) == value


# --- Levels -----------------------------------------------------------------------------------------------------------


def test_levels_are_lists_of_pairs_or_the_file_that_holds_them(parse: Parse, tmp_path: Path) -> None:
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"levels": [{"bits": ["w3a3", "w2a1"], "gbitops": 1.0}, {"bits": ["w4a4", "w8a4"]}]}))
    levels = [[(3, 3), (2, 1)], [(4, 4), (8, 4)]]
    for given in (f"{file}", "[[[3, 3], [2, 1]], [[4, 4], [8, 4]]]"):
        bits = parse(MINIMAL, "--bits.positions=network", f"--bits.levels={given}").config.bits
        assert bits.levels == levels
        assert bits.names == ["level0", "level1"]
    inside = parse(MINIMAL + f"bits: {{positions: network, levels: {file}}}\n").config
    assert inside.bits.levels == levels
    assert from_plain(to_plain(inside)) == inside  # a checkpoint needs no file


@pytest.mark.parametrize(
    "levels, message",
    [
        ("[]", "bits.levels: expected one to eight lists, equally long"),
        ("[[[3, 3], [2, 2]], [[3, 3]]]", "bits.levels: expected one to eight lists, equally long"),
        ("[[[3, 1], [2, 2]]]", "1 for activations of all layers but the first, got [[[3, 1], [2, 2]]]"),
        ("[[3, 3]]", "bits.levels: expected a list of [weight bits, activation bits] for each level, or a JSON file"),
        ("missing.json", "bits.levels: missing.json: No such file or directory"),
    ],
)
def test_other_levels_are_refused(refusal: Callable[..., str], levels: str, message: str) -> None:
    assert message in refusal(MINIMAL, "--bits.positions=network", f"--bits.levels={levels}")


@pytest.mark.parametrize("content", ["{", "[]", '{"levels": [{"bits": ["w3"]}]}', '{"levels": [{}]}'])
def test_a_file_without_levels_is_refused_by_name(refusal: Callable[..., str], tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    message = refusal(MINIMAL, "--bits.positions=network", f"--bits.levels={tmp_path / 'x.json'}")
    assert message.startswith("bits.levels: x.json: not a file of instaqnas.tools.levels (")


def test_levels_need_one_choice_for_the_whole_network(refusal: Callable[..., str]) -> None:
    message = refusal(MINIMAL, "--bits.levels=[[[3, 3]]]")
    assert message == 'bits.positions: expected network for bits.levels, got "pointwise"'


def test_all_samples_need_one_choice_for_the_whole_network(refusal: Callable[..., str], parse: Parse) -> None:
    message = refusal(MINIMAL, "--search.samples=all")
    assert message == 'search.samples: expected a number for bits.positions = pointwise, got "all"'
    assert refusal(MINIMAL, "--search.samples=0") == "search.samples: expected at least 1, or all, got 0"
    assert refusal(MINIMAL, "--search.samples=some").startswith("search.samples: expected a whole number, or all, got")
    assert parse(MINIMAL, "--search.samples=all", "--bits.positions=network").config.search.samples == "all"


@pytest.mark.parametrize(
    "settings, message",
    [
        (["--reward.name=quality", "--policy.effort=true"], "reward.name: expected budget"),
        (["--reward.name=budget", "--reward.target_gbitops=1"], "policy.effort: expected true"),
    ],
)
def test_a_first_policy_needs_effort_and_a_budget(
    refusal: Callable[..., str], settings: list[str], message: str
) -> None:
    found = refusal(MINIMAL, "--pretrain_quant.configurations=policy", *settings)
    assert found.startswith(f"{message} for pretrain_quant.configurations = policy")


def test_a_search_starts_from_a_pretrained_policy_only_where_there_is_one(refusal: Callable[..., str]) -> None:
    budget = ("--reward.name=budget", "--reward.target_gbitops=1")
    message = refusal(MINIMAL, "--search.start=pretrained", *budget)
    assert message == 'pretrain_quant.configurations: expected policy for search.start = pretrained, got "random"'


def test_budgets_are_the_lower_and_the_higher(refusal: Callable[..., str], parse: Parse) -> None:
    assert parse(MINIMAL, "--finetune.budgets=[0.3, 0.5]").config.finetune.budgets == (0.3, 0.5)
    for wrong in ("[0.5, 0.3]", "[0, 1]", "[1, .inf]"):
        message = refusal(MINIMAL, f"--finetune.budgets={wrong}")
        assert message.startswith("finetune.budgets: expected [lowest, highest], both above 0, got ")
