"""The command line: options, help, and the entry scripts."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from instaqnas.config.command import Command, parse_command
from instaqnas.config.reading import to_plain
from instaqnas.config.settings import BitsConfig, Config, DataConfig, PretrainQuantConfig, SearchConfig
from instaqnas.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "search", "finetune", "eval")
BOX_SIZES = [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]
MINIMAL = "data: {roots: [voc]}\n"

Parse = Callable[..., Command]


# --- Options ----------------------------------------------------------------------------------------------------------


def test_command_line_overrides_yaml_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(MINIMAL + "search: {epochs: 5, batch_size: 8}\n")
    argv = ["--search.epochs", "3", "--config", str(path), "--data.roots", "[a, b]", "--reward.negative=-2"]
    config = parse_command("search", argv).config
    assert (config.search.epochs, config.search.batch_size) == (3, 8)
    assert config.data.roots == ["a", "b"]
    assert config.reward.negative == -2.0


def test_command_line_can_give_a_setting_without_default(parse: Parse) -> None:
    assert parse("seed: 1\n", "--data.roots=[a]").config.data.roots == ["a"]


def test_option_values_take_the_type_of_the_setting(parse: Parse) -> None:
    options = ("--detector.box_sizes=null", "--data.val_split", "2007", "--data.vertical_flip", "true")
    config = parse(MINIMAL + f"detector: {{box_sizes: {BOX_SIZES}}}\n", *options).config
    assert config.detector.box_sizes is None
    assert config.data.val_split == "2007"
    assert config.data.vertical_flip is True


def test_null_on_the_command_line_is_null_as_in_yaml(parse: Parse, refusal: Callable[..., str]) -> None:
    text = MINIMAL.replace("}", ", val_split: val}") + "pretrain_fp32: {pretrained: w.pth}\n"
    config = parse(text, "--data.val_split", "null", "--pretrain_fp32.pretrained=null", "--bits.levels=null").config
    assert (config.data.val_split, config.pretrain_fp32.pretrained, config.bits.levels) == ("", "", None)
    assert parse("data: {roots: [voc], val_split: null}\n").config.data.val_split == ""
    assert refusal(MINIMAL, "--data.test_split=null") == "data.test_split: no value given, expected text"


def test_a_tilde_is_the_home_folder(parse: Parse, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    command = parse("data: {roots: [~/voc, x~y]}\n", "--run=~/runs/a", "--pretrain_fp32.pretrained=~/w.pth")
    assert command.config.data.roots == ["/homes/me/voc", "x~y"]
    assert command.config.pretrain_fp32.pretrained == "/homes/me/w.pth"
    assert command.run == Path("/homes/me/runs/a")
    assert refusal("data: {roots: [~nobody_of_that_name/voc]}\n") == "~nobody_of_that_name/voc: no such home folder"


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1"])
def test_one_gpu_of_several_may_be_named(parse: Parse, name: str) -> None:
    assert parse(MINIMAL, f"--device={name}").config.device == name


def test_quantized_stages_have_settings_of_their_own(parse: Parse) -> None:
    text = MINIMAL + "pretrain_quant: {configurations: sandwich, distill_weight: 2, ema_decay: 0.9}\n"
    config = parse(text, "--search.batch_norm_batches=4", "--finetune.distill_weight=0.5").config
    assert config.pretrain_quant == PretrainQuantConfig(configurations="sandwich", distill_weight=2.0, ema_decay=0.9)
    assert config.search == SearchConfig(batch_norm_batches=4)
    assert (config.finetune.distill_weight, config.finetune.batch_norm_batches) == (0.5, 0)


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
def test_finetune_takes_the_bits_to_train_under(parse: Parse, bits: str) -> None:
    assert parse(MINIMAL, "--bits.choices=[[2, 3]]", "--bits", bits, stage="finetune").bits == bits
    assert parse(MINIMAL, stage="finetune").bits == "policy"


@pytest.mark.parametrize(
    "bits", ["policy", "fp32", "random", "shuffled", "frequencies", "modal", "static", "basic", "all", "uniform:w2a3"]
)
def test_eval_takes_bits_and_the_settings_of_that_name(parse: Parse, bits: str) -> None:
    options = ("--bits.choices", "[[2, 3], [4, 4]]", "--bits", bits, "--bits.stem=[6, 6]")
    command = parse(MINIMAL, *options, stage="eval")
    assert command.bits == bits
    assert command.config.bits == BitsConfig(choices=[(2, 3), (4, 4)], stem=(6, 6))
    assert parse(MINIMAL, stage="eval").bits == "policy"


# --- Wrong options ----------------------------------------------------------------------------------------------------


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^\S*/nowhere\.yaml: No such file or directory$"):
        parse_command("search", ["--config", str(tmp_path / "nowhere.yaml")])


def test_config_option_is_required() -> None:
    with pytest.raises(InputError, match="^--config FILE is missing"):
        parse_command("search", [])


@pytest.mark.parametrize(
    ("options", "stage", "expected"),
    [
        (["--search.epoch", "3"], "search", "unknown option --search.epoch; did you mean --search.epochs?"),
        (["--epochs=3"], "search", "unknown option --epochs; did you mean --search.epochs?"),
        (["--rest"], "search", "unknown option --rest; did you mean --restart?"),
        (["--zzz"], "search", "unknown option --zzz; --help lists all"),
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


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--search.epochs=many", "search.epochs: expected a whole number, got many"),
        ("--search.epochs=null", "search.epochs: expected a whole number, got None"),
        ("--data.roots=voc", "data.roots: expected a list of texts, such as [a, b], got voc"),
        ("--device=gpu", 'device: expected auto, cpu, cuda, or one GPU such as cuda:1, got "gpu"'),
    ],
)
def test_value_of_the_wrong_type_in_an_option_is_refused(
    refusal: Callable[..., str], option: str, expected: str
) -> None:
    assert refusal(MINIMAL, option) == expected


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_setting_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_command("eval", ["--help"])
    assert exited.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--config FILE YAML file of the experiment (required)",
        "--bits BITS how bits are chosen: policy, fp32, random, shuffled, frequencies, modal, static, basic, all or ",
        "--detector.box_sizes BOX_SIZES, --detector.box_sizes+ BOX_SIZES sizes of the default boxes in pixels,",
        "20 % to 110 % of `image_size`, which do.",
        "--search.epochs EPOCHS passes over the training split.",
        "--search.policy_lr POLICY_LR learning rate of the policy (Adam, constant).",
        "--seed SEED seed of all random numbers, 0 to 4294967295.",
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
    assert "`pretrained` needs `pretrain_quant.configurations` `policy`." in shown
    assert "learning rate and losses of the detector are then ignored." in shown


# --- The entry scripts ------------------------------------------------------------------------------------------------


def run_script(stage: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{stage}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


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
    """Runs an entry script in this process, with a function of the test instead of the stage."""

    def run(stage: str, function: Callable[[Command], None]) -> None:
        path = tmp_path / "some.yaml"
        path.write_text(MINIMAL)
        stages = types.ModuleType("stages")
        for name in STAGES:
            setattr(stages, f"run_{name}", function if name == stage else None)
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
        "import sys; import pretrain, search, finetune, eval; from instaqnas.config.command import parse_command; "
        f"parse_command('search', ['--config', {str(path)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
