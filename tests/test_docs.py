"""README and docs: links lead somewhere, commands parse, named files exist, and settings.md is up to date."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from instaqnas.config.command import parse_command
from instaqnas.config.reading import SettingParser
from instaqnas.tools.settings_page import settings_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRY_SCRIPTS = ("pretrain.py", "search.py", "finetune.py", "eval.py")
OWN_CONFIG = "mine.yaml"  # stands for a config that the reader writes


def page_id(page: Path) -> str:
    return page.name


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced code blocks of one language."""
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command line with .venv/bin/python in the pages, without comments."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if ".venv/bin/python" in line]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_scripts_configs_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(
        r"\b(?:scripts/\w+\.sh|configs/\w+\.(?:yaml|json)|tests/\w+\.py|instaqnas/[\w/]+\.py)", text
    ):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\binstaqnas(?:\.\w+)+", text):
        assert name.endswith(".NAME") or importlib.util.find_spec(name) is not None, name
    for tool in re.findall(r"`tools\.(\w+)", text):
        assert importlib.util.find_spec(f"instaqnas.tools.{tool}") is not None, tool


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 30
    assert {words.split()[1] for words in commands() if words.startswith(".venv")} >= {"-m", *ENTRY_SCRIPTS}


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_parse_and_their_options_exist(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.*); done", command)
    if loop:
        command = loop[3].replace(f"${loop[1]}", loop[2].split()[0])
    words = shlex.split(command)[1:]
    if words[0] in ENTRY_SCRIPTS:
        parse_command(words[0].removesuffix(".py"), words[1:])
        return
    assert words.pop(0) == "-m"
    module = importlib.import_module(words.pop(0))
    words = words[: words.index("--")] if "--" in words else words  # options after it are of the script launched
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not hasattr(module, "main") or not options:
        return
    before = [words[0]] if words and module.__name__.endswith(".dataset") else []
    with pytest.raises(SystemExit) as exit_status:
        module.main([*before, "--help"])
    logging.disable(logging.NOTSET)  # instaqnas.launch switches it off
    assert exit_status.value.code == 0
    help_text = capsys.readouterr().out
    settings = {f"--{key}" for key in SettingParser().settings}
    for option in options:
        assert option in settings or re.search(rf"{re.escape(option)}\b", help_text), option
    configs = [words[place + 1] for place, word in enumerate(words) if word == "--config"]
    assert all(name == OWN_CONFIG or name == "X.yaml" or (ROOT / name).exists() for name in configs)


def test_the_page_of_settings_is_up_to_date() -> None:
    """Otherwise: .venv/bin/python -m instaqnas.tools.settings_page > docs/settings.md"""
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page()


def test_yaml_in_the_pages_is_a_config(tmp_path: Path) -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for block in found:
        (tmp_path / "x.yaml").write_text(block)
        parse_command("pretrain", ["--config", str(tmp_path / "x.yaml")])


def test_python_in_the_pages_compiles_and_imports_what_exists() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert found
    for block in found:
        compile(block, "page", "exec")
        for module, names in re.findall(r"^from (instaqnas[\w.]*) import (.+)$", block, flags=re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1500
    assert max(map(len, text.splitlines())) <= 120
