"""Reads settings from YAML, plain dictionaries and command-line options."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from instaqnas.bits import BitChoice, Samples, parse_choice
from instaqnas.config.ranges import BoxSizes, Budgets, as_json
from instaqnas.config.settings import Config
from instaqnas.errors import InputError

# --- Plain dictionaries -----------------------------------------------------------------------------------------------


def to_plain(config: Config) -> dict[str, Any]:
    """Returns the config as nested dictionaries, lists, numbers and strings, for YAML and checkpoints."""
    return _plain(asdict(config))


def from_plain(plain: dict[str, Any]) -> Config:
    """Returns the config from nested dictionaries, the inverse of `to_plain`; missing keys get their defaults.

    Raises:
        InputError: an unknown key, a value of the wrong type or outside its range; the message names the dotted key.
    """
    parser = SettingParser()
    return parser.build(parser.read(plain))


def completed(plain: dict[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Returns sections of a plain config, with defaults for settings that did not exist when it was written.

    The other sections are ignored; they may come from a version with other settings.

    Raises:
        KeyError: a section is missing.
        InputError: as `from_plain`.
    """
    wanted = list(sections)
    parts = {section: plain[section] for section in [*wanted, "data"]}  # `data` has settings without a default
    whole = to_plain(from_plain(parts))
    return {section: whole[section] for section in wanted}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line such as `search.epochs: 8 -> 10` for each setting in which two plain configs differ."""
    before, after = dict(flatten(old)), dict(flatten(new))
    lines = []
    for key in before | after:
        if key not in before or key not in after or before[key] != after[key]:
            lines.append(f"{key}: {_shown(before, key)} -> {_shown(after, key)}")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each setting of nested dictionaries."""
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(values: dict[str, Any], key: str) -> str:
    return as_json(values[key]) if key in values else "(absent)"


# --- YAML -------------------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice; PyYAML alone would silently keep the last value."""

    # Checked while composing: by the time of constructing, `<<` may have merged keys that are allowed to repeat.
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in first_line:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value} is written twice, first on line {first_line[key.value]}",
                    problem_mark=key.start_mark,
                )
            first_line[str(key.value)] = key.start_mark.line + 1
        return node


# `off` and `on` are strings, as in YAML 1.2: PyYAML would read them as booleans.
_BOOLEAN = "tag:yaml.org,2002:bool"
_UniqueKeyLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the nested dictionaries of a YAML file; keys and types are not checked yet.

    Raises:
        InputError: a file that cannot be read, is not valid YAML or has no sections; the message names file and line.
    """
    try:
        content = yaml.load(path.read_bytes(), _UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {_one_line(error.problem or error.context)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2012-31-31
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected sections such as `data:`, got {_one_line(content)}")
    return content


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# --- Settings by their dotted keys ------------------------------------------------------------------------------------


# The types of settings, as messages name them after "expected".
_TYPE_TEXTS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts, such as [a, b]",
    Samples: "a whole number, or all",
    Budgets | None: "[lowest, highest] in GBitOps",
    list[BoxSizes] | None: "a list of [smaller, larger]",
    BitChoice: "[weight bits, activation bits]",
    list[BitChoice]: "a list of [weight bits, activation bits]",
    list[list[BitChoice]] | None: "a list of [weight bits, activation bits] for each level, or a JSON file",
}


@dataclass(frozen=True)
class _Setting:
    """One setting, from a field of a config dataclass.

    type: annotation of the field.
    default: default value; None if the setting is required.
    text: description for `--help`, from the docstring of the dataclass.
    """

    type: Any
    default: Any
    text: str

    @property
    def type_text(self) -> str:
        if get_origin(self.type) is Literal:
            return f"one of {', '.join(get_args(self.type))}"
        return _TYPE_TEXTS[self.type]


def in_home(path: Any) -> Any:
    """A text that begins with ~ as a path in the home folder; anything else as it is.

    Raises:
        InputError: ~NAME for a user that does not exist.
    """
    if not isinstance(path, str) or not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise InputError(f"{path}: no such home folder") from None


def read_levels(path: Path) -> list[list[BitChoice]]:
    """Returns `bits.levels` from a JSON file of instaqnas.tools.levels.

    Raises:
        InputError: a file that cannot be read, or that holds no levels.
    """
    try:
        content = json.loads(path.read_text())
        return [[parse_choice(name) for name in level["bits"]] for level in content["levels"]]
    except OSError as error:
        raise InputError(f"bits.levels: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"bits.levels: {path}: not a file of instaqnas.tools.levels ({error})") from None


_PATHS = ("data.roots", "data.test_roots", "pretrain_fp32.pretrained", "bits.levels")  # a leading ~ is the home folder
_FROM_FILE = {"bits.levels": read_levels}  # settings that may also name a file, by the function that reads it


def _settings(section: type = Config, prefix: str = "") -> dict[str, _Setting]:
    """Returns all settings by their dotted keys, in the order of the dataclasses."""
    types, texts = get_type_hints(section), _texts(section)
    found: dict[str, _Setting] = {}
    for item in fields(section):
        key = prefix + item.name
        if is_dataclass(types[item.name]):
            found |= _settings(types[item.name], f"{key}.")
            continue
        default = None
        if item.default is not MISSING:
            default = item.default
        elif item.default_factory is not MISSING:
            default = item.default_factory()
        found[key] = _Setting(types[item.name], default, texts[item.name])
    return found


def _texts(section: type) -> dict[str, str]:
    """Returns the texts below `Args:` in the docstrings of a dataclass and its bases, by field, each as one line."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        texts = re.findall(r"^    (\w+): (.+(?:\n {8,}.+)*)$", inspect.getdoc(cls) or "", flags=re.MULTILINE)
        found |= {name: _one_line(text) for name, text in texts}
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` did you mean NAME?` with the nearest known name, or nothing if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" did you mean {nearest[0]}?" if nearest else ""


class SettingParser(jsonargparse.ArgumentParser):
    """Parser of all settings, from YAML (`read`) and from options such as `--search.epochs 3` (`parse_args`).

    `build` then makes the `Config`. jsonargparse's `add_class_arguments` is not used because it is too permissive: it
    accepts a file for a section (`--search FILE`), dotted keys in YAML, a scalar for a section, and None for any type.
    """

    def __init__(self) -> None:
        super().__init__(usage=argparse.SUPPRESS, add_help=False)
        self.settings = _settings()
        titles = {"general": "", **_texts(Config)}
        groups: dict[str, Any] = {}
        for key, setting in self.settings.items():
            section = key.rpartition(".")[0] or "general"
            if section not in groups:
                groups[section] = self.add_argument_group(section, titles[section])
            accepted = setting.type | str if key in _FROM_FILE else setting.type
            groups[section].add_argument(f"--{key}", type=accepted, default=setting.default, help=setting.text)

    def read(self, plain: dict[str, Any]) -> jsonargparse.Namespace:
        """Returns the settings in nested dictionaries, converted to their types; missing settings get their defaults.

        Raises:
            InputError: an unknown key or a value of the wrong type; the message names the dotted key.
        """
        return self.parse_object(self._by_dotted_key(plain, Config))

    def build(self, values: jsonargparse.Namespace) -> Config:
        """Returns the config.

        Raises:
            InputError: a setting without a value, a value outside its range, or a file that cannot be read; the message
                names the dotted key or the file.
        """
        for key, setting in self.settings.items():
            if values[key] == "null" and setting.type is str:  # of the command line, where all values are texts
                values[key] = None
            if values[key] is None and setting.default == "":
                values[key] = ""
            if key in _PATHS and values[key]:
                paths = values[key]
                values[key] = [in_home(path) for path in paths] if isinstance(paths, list) else in_home(paths)
        for key, read in _FROM_FILE.items():
            if isinstance(values[key], str):
                if not values[key].endswith(".json"):
                    raise InputError(f"{key}: expected {self.settings[key].type_text}, got {values[key]}")
                values[key] = read(Path(values[key]))
        for key, setting in self.settings.items():
            # jsonargparse takes None for any type.
            if values[key] is None and type(None) not in get_args(setting.type):
                raise InputError(f"{key}: no value given, expected {setting.type_text}")
        return _build(Config, values.as_dict())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        wrong_type = re.search(r'key "([\w.]+)".*value: (.*)', message, flags=re.DOTALL)
        if wrong_type and wrong_type[1] in self.settings:
            key, value = wrong_type.groups()
            message = f"{key}: expected {self.settings[key].type_text}, got {value}"
        raise InputError(_one_line(message)) from ex

    def _by_dotted_key(self, values: dict[str, Any], section: type, prefix: str = "") -> dict[str, Any]:
        """Returns the values by dotted key; checks the keys, not the types of the values."""
        types = get_type_hints(section)
        found: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if name not in types:
                advice = did_you_mean(key, [*self.settings, *get_type_hints(Config)])
                if "." in str(name):
                    advice = " YAML sections are indented, not dotted;"
                raise InputError(f"unknown key {key};{advice} known: {', '.join(types)}")
            if not is_dataclass(types[name]):
                found[key] = value
            elif isinstance(value, dict):
                found |= self._by_dotted_key(value, types[name], f"{key}.")
            elif value is not None:  # None: the name of a section with nothing below it
                raise InputError(f"{key}: expected a section of settings, got {_one_line(value)}")
        return found


def _build(section: type, values: dict[str, Any]) -> Any:
    """Returns the dataclass `section` of nested dictionaries that hold all its fields."""
    types = get_type_hints(section)
    arguments = {}
    for name, value in values.items():
        arguments[name] = _build(types[name], value) if is_dataclass(types[name]) else value
    return section(**arguments)
