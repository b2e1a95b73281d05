"""Habits of this repository that a program can check: see CONTRIBUTING.md."""

import ast
import subprocess

import pytest

from tests.conftest import ROOT

LISTED = subprocess.run(
    ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
)
FILES = [name for name in LISTED.stdout.split() if (ROOT / name).exists()]
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONGEST = 60  # lines of a function
LONG = ("main", "fit")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", FILES)
def test_one_thought_per_line(name):
    """No lambda bound to a name, no comprehension over more than two lines of code, no conditional
    expression inside an index."""
    source = (ROOT / name).read_text()
    assert "fmt: " + "skip" not in source and "fmt: " + "off" not in source
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            found.append(f"{node.lineno}: a lambda is bound to a name")
        if isinstance(node, LOOPS) and body_lines(node) > 2:
            found.append(f"{node.lineno}: a comprehension of {body_lines(node)} lines")
        if isinstance(node, ast.Subscript):
            inside = [part for part in ast.walk(node.slice) if isinstance(part, ast.IfExp)]
            found += [f"{part.lineno}: a conditional expression inside an index" for part in inside]
    assert not found, f"{name}: {found}"


def body_lines(node: ast.AST) -> int:
    """Lines of a comprehension between its brackets."""
    parts = [node.generators[-1], getattr(node, "elt", None), getattr(node, "key", None)]
    starts = [part.lineno for part in parts if hasattr(part, "lineno")]
    ends = [part.end_lineno for loop in node.generators for part in (loop.iter, *loop.ifs)]
    return max(ends) - min(starts) + 1


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("tests/")])
def test_functions_are_short(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG:
            assert lines(node) <= LONGEST, f"{name}: {node.name} has {lines(node)} lines"
