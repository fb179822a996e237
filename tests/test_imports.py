"""Imports only go down: scripts -> methods -> the top level -> kit."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = ["train", "evaluate"]
METHODS = ["methods"]
TOP_LEVEL = ["clflow", "bank", "synth", "flows"]
ALL = SCRIPTS + METHODS + TOP_LEVEL


def imported(file: Path) -> set[str]:
    """The top-level names of all modules that a file imports, at any place."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    "pattern, forbidden",
    [("kit/*.py", ALL), ("methods/*.py", SCRIPTS)] + [(f"{name}.py", SCRIPTS + METHODS) for name in TOP_LEVEL],
)
def test_no_import_goes_up(pattern, forbidden):
    files = list(ROOT.glob(pattern))
    assert files
    for file in files:
        assert not imported(file) & set(forbidden), file


def test_the_top_level_is_the_method_and_its_scripts():
    assert {file.stem for file in ROOT.glob("*.py")} == {*SCRIPTS, *TOP_LEVEL, "test_clflow"}
