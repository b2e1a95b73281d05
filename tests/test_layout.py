"""The house rules that a program can hold."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = sorted(
    path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "tests" not in path.parts
)


STEPS = ("train_sr_trad", "extract_emb", "finetune", "distill")


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("models", ("datasets", "experiments", "benchmarks")),
        ("datasets", ("models", "experiments", "benchmarks")),
        ("utils", ("models", "datasets", "experiments", "benchmarks")),
        (".", ("benchmarks", "experiments", "recommend", "export", *STEPS)),
    ],
)
def test_arrows_go_one_way(package, forbidden):
    for path in CODE:
        if path.parent == (ROOT / package):
            assert not {name for name in imports(path) if name.split(".")[0] in forbidden}, path


def test_no_bare_except_star_import_trainer_or_remote_code():
    for path in CODE:
        text = path.read_text()
        assert not re.search(r"except\s*:", text), path
        assert not re.search(r"^from .* import \*", text, re.M), path
        assert not re.search(
            r"\bTrainer\(|import Trainer|trust_remote_code=True|\.cuda\(\)", text
        ), path


def test_the_datasets_package_is_ours_and_transformers_does_not_mind():
    code = "import datasets, peft; from transformers import AutoTokenizer, LlamaConfig;"
    code += "print(datasets.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(ROOT / "datasets/__init__.py"), done.stderr


def test_models_name_no_device_read_no_flag_and_print_nothing():
    for path in (ROOT / "models").glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        calls = {node.func.id for node in nodes if isinstance(node.func, ast.Name)}
        assert "print" not in calls, path
        assert "sys.argv" not in path.read_text() and "cuda" not in path.read_text(), path
