"""The settings: what is accepted, and the one line that refuses the rest."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from instaqnas.config import (
    BitsConfig,
    Command,
    Config,
    DataConfig,
    DetectorConfig,
    PretrainQuantConfig,
    SearchConfig,
    completed,
    differences,
    from_plain,
    parse_command,
    to_plain,
)
from instaqnas.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain", "search", "finetune", "eval")
BOX_SIZES = [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]
MINIMAL = "data: {roots: [voc]}\n"

Parse = Callable[..., Command]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """Parses `options` with a YAML file of the given text."""

    def run(text: str, *options: str, stage: str = "search") -> Command:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return parse_command(stage, ["--config", str(path), *options])

    return run


@pytest.fixture
def refusal(parse: Parse, tmp_path: Path) -> Callable[..., str]:
    """Returns the line that refuses, the file's folder left out."""

    def run(text: str, *options: str, stage: str = "search") -> str:
        with pytest.raises(InputError) as caught:
            parse(text, *options, stage=stage)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return run


def run_script(stage: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{stage}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# --- What is accepted -------------------------------------------------------------------------------------------------


def test_yaml_without_a_setting_gives_its_default(parse: Parse) -> None:
    assert parse(MINIMAL).config == Config(data=DataConfig(roots=["voc"]))


def test_yaml_values_arrive_in_the_types_of_the_fields(parse: Parse) -> None:
    sections = "bits: {choices: [[2, 2], [32, 32]], stem: [4, 4]}\nsearch: {lr: 1e-2, warmup_epochs: 1}\nseed: 7\n"
    config = parse(MINIMAL + sections).config
    assert config.bits == BitsConfig(choices=[(2, 2), (32, 32)], stem=(4, 4))
    assert config.search == SearchConfig(lr=0.01, warmup_epochs=1.0)
    assert isinstance(config.search.warmup_epochs, float)
    assert config.seed == 7


def test_command_line_overrides_yaml_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(MINIMAL + "search: {epochs: 5, batch_size: 8}\n")
    argv = ["--search.epochs", "3", "--config", str(path), "--data.roots", "[a, b]", "--reward.negative=-2"]
    config = parse_command("search", argv).config
    assert (config.search.epochs, config.search.batch_size) == (3, 8)
    assert config.data.roots == ["a", "b"]
    assert config.reward.negative == -2.0


def test_command_line_can_give_what_yaml_lacks(parse: Parse) -> None:
    assert parse("seed: 1\n", "--data.roots=[a]").config.data.roots == ["a"]


def test_option_values_take_the_type_of_the_setting(parse: Parse) -> None:
    options = ("--detector.box_sizes=null", "--data.val_split", "2007", "--data.vertical_flip", "true")
    config = parse(MINIMAL + f"detector: {{box_sizes: {BOX_SIZES}}}\n", *options).config
    assert config.detector.box_sizes is None
    assert config.data.val_split == "2007"
    assert config.data.vertical_flip is True


def test_quantized_stages_have_settings_of_their_own(parse: Parse) -> None:
    text = MINIMAL + "pretrain_quant: {sandwich: true, distill_weight: 2, ema_decay: 0.9}\n"
    config = parse(text, "--search.batch_norm_batches=4", "--finetune.distill_weight=0.5").config
    assert config.pretrain_quant == PretrainQuantConfig(sandwich=True, distill_weight=2.0, ema_decay=0.9)
    assert config.search == SearchConfig(batch_norm_batches=4)
    assert (config.finetune.distill_weight, config.finetune.batch_norm_batches) == (0.5, 0)


def test_section_with_nothing_below_keeps_its_defaults(parse: Parse) -> None:
    assert parse(MINIMAL + "search:\n").config.search == SearchConfig()


def test_merged_yaml_sections_may_override_what_they_merge(parse: Parse) -> None:
    text = MINIMAL + "pretrain_fp32: &all {epochs: 3, lr: 0.1}\nfinetune: {<<: *all, lr: 0.2}\n"
    finetune = parse(text).config.finetune
    assert (finetune.epochs, finetune.lr) == (3, 0.2)


def test_run_folder_is_named_after_the_yaml_file(parse: Parse) -> None:
    assert parse(MINIMAL).run == Path("runs/some")
    assert parse(MINIMAL, "--run", "elsewhere/x").run == Path("elsewhere/x")


@pytest.mark.parametrize("stage", ["pretrain", "search", "finetune"])
def test_training_stages_can_restart_and_start_from_a_checkpoint(parse: Parse, tmp_path: Path, stage: str) -> None:
    checkpoint = tmp_path / "x.pt"
    checkpoint.touch()
    plain = parse(MINIMAL, stage=stage)
    assert (plain.restart, plain.init) == (False, None)
    command = parse(MINIMAL, "--restart", "--init", str(checkpoint), stage=stage)
    assert (command.restart, command.init) == (True, checkpoint)


@pytest.mark.parametrize("bits", ["policy", "static", "modal", "uniform:w2a3"])
def test_finetune_takes_what_the_detector_is_trained_under(parse: Parse, bits: str) -> None:
    assert parse(MINIMAL, "--bits.choices=[[2, 3]]", "--bits", bits, stage="finetune").bits == bits
    assert parse(MINIMAL, stage="finetune").bits == "policy"


@pytest.mark.parametrize(
    "bits", ["policy", "fp32", "random", "shuffled", "frequencies", "modal", "static", "basic", "all", "uniform:w2a3"]
)
def test_eval_takes_bits_beside_the_settings_of_that_name(parse: Parse, bits: str) -> None:
    options = ("--bits.choices", "[[2, 3], [4, 4]]", "--bits", bits, "--bits.stem=[6, 6]")
    command = parse(MINIMAL, *options, stage="eval")
    assert command.bits == bits
    assert command.config.bits == BitsConfig(choices=[(2, 3), (4, 4)], stem=(6, 6))
    assert parse(MINIMAL, stage="eval").bits == "policy"


# --- What is refused: files and keys ----------------------------------------------------------------------------------


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^\S*/nowhere\.yaml: No such file or directory$"):
        parse_command("search", ["--config", str(tmp_path / "nowhere.yaml")])


def test_config_option_is_required() -> None:
    with pytest.raises(InputError, match="^--config FILE is missing"):
        parse_command("search", [])


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (MINIMAL + "search: {epochs: 3\n", "some.yaml, line 3: "),
        (MINIMAL + "search:\n\tepochs: 3\n", "some.yaml, line 3: "),
        (MINIMAL + "search: epochs: 3\n", "some.yaml, line 2: "),
        (MINIMAL + "seed: !!python/object:os.system x\n", "some.yaml, line 2: "),
        (MINIMAL + "seed: 2012-31-31\n", "some.yaml: not valid YAML: "),
        ("data: \0\n", "some.yaml: not valid YAML: "),
        ("[" * 3000, "some.yaml: not valid YAML: "),
        ("data", "some.yaml: expected sections such as `data:`, got data"),
        ("- data", "some.yaml: expected sections such as `data:`, got "),
    ],
)
def test_invalid_yaml_names_file_and_line(refusal: Callable[..., str], text: str, beginning: str) -> None:
    assert refusal(text).startswith(beginning)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "search: {epochs: 3}\nseed: 1\nsearch: {lr: 0.1}\n",
            "some.yaml, line 4: key search is written twice, first on line 2",
        ),
        (
            MINIMAL + "search:\n  epochs: 3\n  lr: 0.1\n  epochs: 4\n",
            "some.yaml, line 5: key epochs is written twice, first on line 3",
        ),
        ("data: {roots: [a], roots: [b]}\n", "some.yaml, line 1: key roots is written twice, first on line 1"),
    ],
)
def test_key_written_twice_is_refused(refusal: Callable[..., str], text: str, expected: str) -> None:
    assert refusal(text) == expected


@pytest.mark.parametrize(
    ("text", "beginning", "ending"),
    [
        (
            "reward: {pos_weigth: 3}",
            "some.yaml: unknown key reward.pos_weigth; did you mean reward.positive? known: name, quality, ",
            ", multiplier_gain",
        ),
        ("serach: {epochs: 3}", "some.yaml: unknown key serach; did you mean search? known: data, ", ", seed, device"),
        ("epochs: 3", "some.yaml: unknown key epochs; did you mean search.epochs? known: data, ", ", device"),
        (
            "search.epochs: 3",
            "some.yaml: unknown key search.epochs; YAML sections are indented, not dotted; ",
            "device",
        ),
        (
            "pretrain_fp32: {distill_weight: 1}",
            "some.yaml: unknown key pretrain_fp32.distill_weight; did you mean ",
            ", pretrained",
        ),
        (
            "search: {sandwich: true}",
            "some.yaml: unknown key search.sandwich; did you mean ",
            ", normalize_advantage",
        ),
        ("zzz: 3", "some.yaml: unknown key zzz; known: data, ", ", device"),
        ("1: 3", "some.yaml: unknown key 1; known: data, ", ", device"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_and_the_known(
    refusal: Callable[..., str], text: str, beginning: str, ending: str
) -> None:
    message = refusal(MINIMAL + text)
    assert message.startswith(beginning)
    assert message.endswith(ending)


@pytest.mark.parametrize(
    ("options", "stage", "expected"),
    [
        (["--search.epoch", "3"], "search", "unknown option --search.epoch; did you mean --search.epochs?"),
        (["--epochs=3"], "search", "unknown option --epochs; did you mean --search.epochs?"),
        (["--rest"], "search", "unknown option --rest; did you mean --restart?"),
        (["--zzz"], "search", "unknown option --zzz; --help lists all"),
        (
            ["--search.start=sensitivity", "--policy.effort=true", "--reward.name=budget", "--reward.target_gbitops=9"],
            "search",
            'reward.quality: expected loss for search.start = sensitivity, got "f1"',
        ),
        (["--restart"], "eval", "unknown option --restart; did you mean --search.start?"),
        (["--bits", "random"], "search", "unknown option --bits; did you mean --bits.stem?"),
        (["--search", "x.yaml"], "search", "unknown option --search; did you mean --search.lr?"),
        (["--search.epochs"], "search", "argument --search.epochs: expected one argument"),
        (["--init", "nowhere.pt"], "search", "--init nowhere.pt: no such file"),
        (
            ["--bits", "uniform:w9a9"],
            "eval",
            "--bits: expected one of policy, fp32, random, shuffled, frequencies, modal, static, basic, all, "
            "uniform:w3a4, uniform:w4a4, uniform:w5a4, got uniform:w9a9",
        ),
        (
            ["--bits", "random"],
            "finetune",
            "--bits: expected one of policy, static, modal, uniform:w3a4, uniform:w4a4, uniform:w5a4, got random",
        ),
    ],
)
def test_wrong_option_is_refused(refusal: Callable[..., str], options: list[str], stage: str, expected: str) -> None:
    assert refusal(MINIMAL, *options, stage=stage) == expected


def test_word_that_belongs_to_no_option_is_named(refusal: Callable[..., str]) -> None:
    assert refusal(MINIMAL, "stray").lower() == "unrecognized arguments: stray"


# --- What is refused: values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("search: {epochs: many}", "search.epochs: expected a whole number, got many"),
        ("search: {epochs: 2.5}", "search.epochs: expected a whole number, got 2.5"),
        ("search: {epochs: true}", "search.epochs: expected a whole number, got True"),
        ("finetune: {lr: [1]}", "finetune.lr: expected a number, got [1]"),
        ("detector: {extras_batch_norm: 2}", "detector.extras_batch_norm: expected true or false, got 2"),
        ("bits: {stem: 8}", "bits.stem: expected [weight bits, activation bits], got 8"),
        ("bits: {stem: [8, 8, 8]}", "bits.stem: expected [weight bits, activation bits], got [8, 8, 8]"),
        ("bits: {choices: [[2, 2], 3]}", "bits.choices: expected a list of [weight bits, activation bits], got 3"),
        ("detector: {box_sizes: 3}", "detector.box_sizes: expected a list of [smaller, larger], got 3"),
        ("finetune: {optimizer: adam}", "finetune.optimizer: expected one of adamw, sgd, got adam"),
        ("search: 3", "search: expected a section of settings, got 3"),
    ],
)
def test_value_of_the_wrong_type_in_yaml_names_file_key_value_and_expectation(
    refusal: Callable[..., str], text: str, expected: str
) -> None:
    assert refusal(MINIMAL + text) == f"some.yaml: {expected}"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--search.epochs=many", "search.epochs: expected a whole number, got many"),
        ("--search.epochs=null", "search.epochs: expected a whole number, got None"),
        ("--data.roots=voc", "data.roots: expected a list of texts, such as [a, b], got voc"),
        ("--device=gpu", "device: expected one of auto, cpu, cuda, got gpu"),
    ],
)
def test_value_of_the_wrong_type_in_an_option_is_refused(
    refusal: Callable[..., str], option: str, expected: str
) -> None:
    assert refusal(MINIMAL, option) == expected


def test_setting_without_default_must_be_given(refusal: Callable[..., str]) -> None:
    assert refusal("seed: 1\n") == "data.roots: no value given, expected a list of texts, such as [a, b]"


def test_key_without_value_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal(MINIMAL + "search: {epochs: }\n") == "search.epochs: no value given, expected a whole number"


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
        ("--search.samples=0", "at least 1, got 0"),
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
def test_rewards_that_take_quality_for_a_share_refuse_the_negative_loss(
    refusal: Callable[..., str], parse: Parse, name: str
) -> None:
    message = refusal(MINIMAL, f"--reward.name={name}", "--reward.quality=loss")
    assert message == f'reward.quality: expected precision, recall, f1 or ap for reward.name = {name}, got "loss"'
    for other in ("quality", "budget"):
        options = (f"--reward.name={other}", "--reward.quality=loss", "--reward.target_gbitops=5")
        assert parse(MINIMAL, *options).config.reward.quality == "loss"


def test_a_detector_that_the_search_leaves_alone_has_no_average(refusal: Callable[..., str], parse: Parse) -> None:
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
    for positions in ("backbone", "all"):
        message = refusal(MINIMAL, "--bits.choices=[[2, 2], [2, 1]]", f"--bits.positions={positions}")
        assert message == (
            f"bits.choices: expected at least 2 bits for activations with bits.positions = {positions}: "
            "the image is not behind a ReLU, got [[2, 2], [2, 1]]"
        )


@pytest.mark.parametrize("positions", ["backbone", "backbone+extras", "all"])
def test_a_policy_cannot_look_at_a_stem_whose_bits_it_chooses(
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


def test_ranges_hold_for_configs_made_in_code() -> None:
    config = Config(data=DataConfig(roots=["voc"]))
    with pytest.raises(InputError, match=r"^detector\.image_size: expected at least 64, got 32$"):
        replace(config, detector=DetectorConfig(image_size=32))


# --- Plain dictionaries -----------------------------------------------------------------------------------------------


def test_plain_config_survives_yaml(parse: Parse) -> None:
    config = parse(MINIMAL, "--bits.choices=[[2, 2], [8, 32]]", f"--detector.box_sizes={BOX_SIZES}").config
    plain = to_plain(config)
    assert plain["bits"]["choices"] == [[2, 2], [8, 32]]
    assert plain["bits"]["stem"] == [8, 8]
    assert from_plain(yaml.safe_load(yaml.safe_dump(plain))) == config


def test_plain_config_shares_nothing_with_the_config() -> None:
    config = Config(data=DataConfig(roots=["voc"]))
    to_plain(config)["data"]["roots"].append("other")
    assert config.data.roots == ["voc"]


def test_from_plain_fills_in_defaults_and_refuses_unknown_keys() -> None:
    assert from_plain({"data": {"roots": ["voc"]}}) == Config(data=DataConfig(roots=["voc"]))
    with pytest.raises(InputError, match=r"^unknown key data\.rots; did you mean data\.roots\?"):
        from_plain({"data": {"rots": ["voc"]}})


@pytest.mark.parametrize("quantizer", ["pact", "dorefa"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights", "nested", 'bits.weights: expected shared or separate for bits.quantizer = {}, got "nested"'),
        ("per_channel", True, "bits.per_channel: expected false for bits.quantizer = {}, got true"),
    ],
)
def test_what_only_lsq_has_is_refused_for_other_quantizers(
    quantizer: str, name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError) as error:
        from_plain({"data": {"roots": ["voc"]}, "bits": {"quantizer": quantizer, name: value}})
    assert str(error.value) == message.format(quantizer)
    for lsq in ("lsq", "lsq_plus"):
        config = from_plain({"data": {"roots": ["voc"]}, "bits": {"quantizer": lsq, name: value}})
        assert getattr(config.bits, name) == value


def test_a_config_from_before_a_setting_existed_is_completed_with_its_default() -> None:
    now, old = (to_plain(Config(data=DataConfig(roots=["voc"]))) for _ in range(2))
    added = {"ema_decay", "distill_weight", "batch_norm_batches", "batch_renorm", "sandwich", "pretrained"}
    for section in ("pretrain_fp32", "pretrain_quant", "search", "finetune"):
        for name in added & old[section].keys():
            del old[section][name]
    assert old["pretrain_quant"].keys() == old["pretrain_fp32"].keys()
    assert completed(old, now) == now
    old["search"]["of_another_version"] = 1
    assert completed(old, ["bits", "finetune"]) == {"bits": now["bits"], "finetune": now["finetune"]}
    with pytest.raises(InputError, match=r"search\.of_another_version"):
        completed(old, ["bits", "search"])
    assert now["search"]["batch_norm_batches"] == 0


def test_differences_name_each_changed_setting() -> None:
    old = {"search": {"epochs": 8, "lr": 0.1}, "bits": {"stem": [8, 8]}, "device": "cpu", "gone": 1}
    new = {"search": {"epochs": 10, "lr": 0.1}, "bits": {"stem": [4, 8]}, "device": "cuda", "added": None}
    assert differences(old, new) == [
        "search.epochs: 8 -> 10",
        "bits.stem: [8, 8] -> [4, 8]",
        'device: "cpu" -> "cuda"',
        "gone: 1 -> (absent)",
        "added: (absent) -> null",
    ]
    assert differences(old, old) == []


# --- The entry scripts ------------------------------------------------------------------------------------------------


def test_help_shows_every_setting_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_command("eval", ["--help"])
    assert exited.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--config FILE YAML file of the experiment (required)",
        "--bits BITS policy, fp32, random, shuffled, frequencies, modal, static, basic, all or uniform:w3a4",
        "--search.epochs EPOCHS passes over the training split.",
        "--search.policy_lr POLICY_LR learning rate of the policy (Adam, constant).",
        "--seed SEED seed of everything random.",
        "pretrain_quant: second training of pretrain.py",
    ):
        assert part in text
    plain = to_plain(Config(data=DataConfig(roots=["voc"])))
    for section, values in plain.items():
        for name in values if isinstance(values, dict) else [""]:
            assert f"--{section}.{name}".rstrip(".") in text


def test_help_shows_texts_of_several_lines_to_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command("search", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "reward `budget` and `reward.quality` `loss`)." in shown
    assert "learning rate and losses of the detector are then of no account." in shown


@pytest.mark.parametrize("stage", STAGES)
def test_script_prints_help(stage: str) -> None:
    done = run_script(stage, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python {stage}.py --config FILE")
    assert done.stderr == ""


@pytest.mark.parametrize("stage", STAGES)
def test_script_refuses_with_one_line_and_status_2(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(MINIMAL + "search: {epochs: 0}\n")
    done = run_script(stage, "--config", str(path))
    assert done.returncode == 2
    assert done.stderr == "error: search.epochs: expected at least 1, got 0\n"
    assert done.stdout == ""


@pytest.fixture
def run_with_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an entry script in this process with another function in the place of its stage."""

    def run(stage: str, function: Callable[[Command], None]) -> None:
        path = tmp_path / "some.yaml"
        path.write_text(MINIMAL)
        stages = types.ModuleType("stages")
        setattr(stages, f"run_{stage}", function)
        monkeypatch.setitem(sys.modules, "instaqnas.training.stages", stages)
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", "--config", str(path)])
        runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_script_hands_the_command_to_its_stage(run_with_stage: Callable[..., None], stage: str) -> None:
    commands: list[Command] = []
    run_with_stage(stage, commands.append)
    assert commands == [Command(config=Config(data=DataConfig(roots=["voc"])), run=Path("runs/some"))]


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_script_says_how_to_go_on(
    run_with_stage: Callable[..., None], capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    def interrupt(command: Command) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exited:
        run_with_stage(stage, interrupt)
    assert exited.value.code == 130
    message = capsys.readouterr().err
    assert message.startswith("interrupted; ")
    assert message.count("\n") == 1


def test_parsing_does_not_import_torch(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(MINIMAL)
    code = (
        "import sys; import pretrain, search, finetune, eval; from instaqnas.config import parse_command; "
        f"parse_command('search', ['--config', {str(path)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
