"""Imports point downwards: the step folders never import one another, nor the top floor; the ground floor imports none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ("prune", "heal", "eval", "depth", "route")
ALLOWED = {"model": {"model"}, **{step: {"model", step} for step in STEPS}}


def imported(path: Path) -> set[str]:
    """The names after `layerprune.` that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "layerprune" else [str(node.module)]
        found |= {name.split(".")[1] for name in names if name.startswith("layerprune.")}
    return found


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_point_downwards(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert len(files) >= 3
    for path in files:
        wrong = imported(path) - ALLOWED[floor]
        assert not wrong, f"{path} imports {wrong}"


def test_the_direction_test_sees_a_wrong_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from layerprune.heal.train import heal_checkpoint\n    from layerprune import pipeline\n")
    assert imported(bad) - ALLOWED["prune"] == {"heal", "pipeline"}


@pytest.mark.parametrize("step", [*STEPS, "model"])
def test_a_bare_name_is_refused(step: str) -> None:
    found = subprocess.run([sys.executable, "-c", f"import {step}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert f"layerprune.{step}" in found.stderr


def test_public_functions_are_there() -> None:
    import layerprune

    for name in layerprune._PUBLIC:
        assert callable(getattr(layerprune, name)), name
