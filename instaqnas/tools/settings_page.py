"""Prints docs/settings.md, the page of all settings, from their dataclasses.

python -m instaqnas.tools.settings_page > docs/settings.md
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import yaml

from instaqnas.config.reading import SettingParser
from instaqnas.config.settings import Config

HEAD = """# Settings

Each is a key of the YAML and an option of the stages, such as `--search.epochs 20`. This page is printed by
`.venv/bin/python -m instaqnas.tools.settings_page`.
"""


def settings_page() -> str:
    """The page, as Markdown: a table for each section of the config, with default, type or range, and meaning."""
    settings = SettingParser().settings
    types = get_type_hints(Config)
    parts = [HEAD]
    for item in fields(Config):
        if is_dataclass(types[item.name]):
            text = (inspect.getdoc(types[item.name]) or "").partition("\n\nArgs:")[0]
            parts += [f"\n## {item.name}\n", f"{text}\n", *_table(settings, f"{item.name}.", types[item.name])]
    parts += ["\n## General\n", *_table(settings, "", Config)]
    return "\n".join(parts) + "\n"


def _table(settings: dict[str, Any], prefix: str, section: type) -> list[str]:
    lines = ["| setting | default | expected | meaning |", "|---|---|---|---|"]
    for item in fields(section):
        setting = settings.get(f"{prefix}{item.name}")
        if setting is None:  # a section
            continue
        allowed = item.metadata.get("range")
        expected = setting.type_text if allowed is None else allowed.text
        cells = [f"`{item.name}`", _default(setting.default), expected, setting.text]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return lines


def _default(value: Any) -> str:
    """The default as it stands in YAML; empty for a setting without one."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        value = [list(pair) if isinstance(pair, tuple) else pair for pair in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


def main() -> None:
    """Prints the page."""
    print(settings_page(), end="")


if __name__ == "__main__":
    main()
