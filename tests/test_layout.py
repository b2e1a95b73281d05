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


ABOVE = ("serving", "experiments", "benchmarks", *STEPS)


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("engine", ("models", "datasets", "utils", *ABOVE)),
        ("models", ("datasets", *ABOVE)),
        ("datasets", ("models", *ABOVE)),
        ("utils", ("models", "datasets", *ABOVE)),
        ("serving", ("experiments", "benchmarks", *STEPS)),
        (".", ABOVE),
    ],
)
def test_arrows_go_one_way(package, forbidden):
    for path in CODE:
        if path.parent == (ROOT / package):
            assert not {name for name in imports(path) if name.split(".")[0] in forbidden}, path


def test_no_two_files_import_each_other():
    """Within a package too, under TYPE_CHECKING and inside functions included."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CODE}
    needs = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        needs[name] = found & modules.keys()
    done: set[str] = set()
    while len(done) < len(modules):
        free = {name for name in modules if name not in done and needs[name] <= done}
        assert free, f"a circle among {sorted(set(modules) - done)}"
        done |= free


def test_the_engine_knows_no_stage_and_no_metric():
    text = "".join(path.read_text() for path in (ROOT / "engine").glob("*.py"))
    for word in ("sasrec", "student", "train_sr_trad", "distill.py", "HR@", "NDCG"):
        assert word not in text.lower().replace("hr@", "HR@").replace("ndcg", "NDCG"), word


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


def test_a_model_trained_in_full_does_without_peft():
    code = "import sys, models.teachers; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_list_of_sasrec_does_without_transformers():
    code = "import sys, serving.recommender; print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_but_tensors_is_ever_unpickled():
    for path in CODE:
        text = path.read_text()
        assert "pickle.load" not in text and "trust_remote_code=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
