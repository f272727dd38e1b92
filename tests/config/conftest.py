"""Parsing a YAML text with options, as the entry scripts do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from instaqnas.config.command import Command, parse_command
from instaqnas.errors import InputError

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
    """Returns the one-line message of the error, without the folder of the file."""

    def run(text: str, *options: str, stage: str = "search") -> str:
        with pytest.raises(InputError) as caught:
            parse(text, *options, stage=stage)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return run
