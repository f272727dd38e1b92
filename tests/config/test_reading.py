"""YAML and plain dictionaries: accepted keys and values, and the one-line message for all others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from instaqnas.config.command import Command
from instaqnas.config.reading import completed, differences, from_plain, to_plain
from instaqnas.config.settings import BitsConfig, Config, DataConfig, SearchConfig
from instaqnas.errors import InputError

BOX_SIZES = [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]
MINIMAL = "data: {roots: [voc]}\n"

Parse = Callable[..., Command]


# --- YAML -------------------------------------------------------------------------------------------------------------


def test_yaml_without_a_setting_gives_its_default(parse: Parse) -> None:
    assert parse(MINIMAL).config == Config(data=DataConfig(roots=["voc"]))


def test_yaml_values_arrive_in_the_types_of_the_fields(parse: Parse) -> None:
    sections = "bits: {choices: [[2, 2], [32, 32]], stem: [4, 4]}\nsearch: {lr: 1e-2, warmup_epochs: 1}\nseed: 7\n"
    config = parse(MINIMAL + sections).config
    assert config.bits == BitsConfig(choices=[(2, 2), (32, 32)], stem=(4, 4))
    assert config.search == SearchConfig(lr=0.01, warmup_epochs=1.0)
    assert isinstance(config.search.warmup_epochs, float)
    assert config.seed == 7


def test_section_with_nothing_below_keeps_its_defaults(parse: Parse) -> None:
    assert parse(MINIMAL + "search:\n").config.search == SearchConfig()


def test_merged_yaml_sections_may_override_merged_keys(parse: Parse) -> None:
    text = MINIMAL + "pretrain_fp32: &all {epochs: 3, lr: 0.1}\nfinetune: {<<: *all, lr: 0.2}\n"
    finetune = parse(text).config.finetune
    assert (finetune.epochs, finetune.lr) == (3, 0.2)


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
            "search: {configurations: sandwich}",
            "some.yaml: unknown key search.configurations; did you mean ",
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


def test_setting_without_default_must_be_given(refusal: Callable[..., str]) -> None:
    assert refusal("seed: 1\n") == "data.roots: no value given, expected a list of texts, such as [a, b]"


def test_key_without_value_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal(MINIMAL + "search: {epochs: }\n") == "search.epochs: no value given, expected a whole number"


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


def test_a_config_from_before_a_setting_existed_is_completed_with_its_default() -> None:
    now, old = (to_plain(Config(data=DataConfig(roots=["voc"]))) for _ in range(2))
    added = {
        "ema_decay",
        "distill_weight",
        "batch_norm_batches",
        "batch_renorm",
        "configurations",
        "explore",
        "budgets",
        "pretrained",
    }
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
