"""Imports inside the package point one way: each floor imports from the floors below it only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "instaqnas"
FLOORS = (  # from the ground up; parts of one floor do not import each other
    {"errors", "bits", "cpus", "pixels"},
    {"seeds", "files", "distributed"},
    {"checkpoint"},
    {"config", "data", "metrics"},
    {"quant"},
    {"detector", "policy"},
    {"experiment"},
    {"evaluation"},
    {"training", "deploy"},
    {"tools", "entry", "launch"},
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> set[str]:
    """First-level parts of `instaqnas` that a module imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from instaqnas import x` imports a part, `from instaqnas.x import y` names it in the module
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("instaqnas.")}


def parts_below(part: str) -> set[str]:
    """Parts on the floors below."""
    floor = next(number for number, parts in enumerate(FLOORS) if part in parts)
    return set().union(*FLOORS[:floor])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_from_its_own_part_and_the_floors_below(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) <= {part, *parts_below(part)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_no_private_name_of_another(path: Path) -> None:
    private = [
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("instaqnas")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert private == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_settings_are_longer_than_400_lines(path: Path) -> None:
    assert path == PACKAGE / "config" / "settings.py" or len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("script", ["pretrain", "search", "finetune", "eval"])
def test_entry_scripts_import_the_entry_only(script: str) -> None:
    assert imported(PACKAGE.parent / f"{script}.py") == {"entry"}


def test_reading_a_config_does_not_import_torch() -> None:
    paths = [PACKAGE / "errors.py", PACKAGE / "bits.py", *(PACKAGE / "config").glob("*.py")]
    for path in paths:
        tree = ast.parse(path.read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {module for module in modules if module and module.split(".")[0] == "torch"}
        assert imported(path) <= {"config", "bits", "errors"}
