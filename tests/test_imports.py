"""Imports inside the package point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "instaqnas"
COMMON = {"checkpoint", "cpus", "errors", "pixels", "ranks", "seeds"}
ALLOWED = {
    "errors": set(),
    "checkpoint": {"errors"},
    "cpus": set(),
    "pixels": set(),
    "ranks": set(),
    "seeds": set(),
    "config": {"errors"},
    "data": {"data", *COMMON},
    "quant": {"quant", *COMMON},
    "metrics": {"metrics", *COMMON},
    "detector": {"detector", "quant", *COMMON},
    "policy": {"policy", "quant", *COMMON},
    "deploy": {"deploy", "config", "detector", "policy", "quant", *COMMON},
    "training": {"training", "config", "data", "quant", "metrics", "detector", "policy", *COMMON},
    "tools": {"tools", "deploy", "training", "config", "data", "quant", "metrics", "detector", "policy", *COMMON},
}
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_its_part_may(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) <= ALLOWED[part]


@pytest.mark.parametrize("script", ["pretrain", "search", "finetune", "eval"])
def test_entry_scripts_import_training_config_and_errors_only(script: str) -> None:
    assert imported(PACKAGE.parent / f"{script}.py") <= {"training", "config", "errors"}


def test_reading_a_config_does_not_import_torch() -> None:
    for name in ("config.py", "errors.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {module for module in modules if module and module.split(".")[0] == "torch"}
