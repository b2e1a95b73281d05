"""The rules of the house, and the habits of CONTRIBUTING.md, that a program can hold."""

import ast
import re
import subprocess

import pytest

from tests.conftest import ROOT, script

LISTED = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
FILES = [name for name in LISTED if (ROOT / name).exists()]
CODE = [ROOT / name for name in FILES if not name.startswith("tests/")]
STEPS = ("train_sr_trad", "extract_emb", "finetune", "distill")


def imports(path):
    """Modules and names in them, under TYPE_CHECKING and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
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
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CODE}
    needs = {name: imports(path) & modules.keys() for name, path in modules.items()}
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
        assert not re.search(r"\bTrainer\(|import Trainer|\.cuda\(\)", text), path
        assert "pickle.load" not in text and "trust_remote_code=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path


def test_the_datasets_package_is_ours_and_transformers_does_not_mind():
    code = "import datasets, peft; from transformers import AutoTokenizer, LlamaConfig;"
    code += "print(datasets.__file__)"
    assert script("-c", code).stdout.strip() == str(ROOT / "datasets/__init__.py")


def test_models_name_no_device_read_no_flag_and_print_nothing():
    for path in (ROOT / "models").glob("*.py"):
        assert not re.search(r"\bprint\(", path.read_text()), path
        assert "sys.argv" not in path.read_text() and "cuda" not in path.read_text(), path


@pytest.mark.parametrize(
    "module, library", [("models.teachers", "peft"), ("serving.recommender", "transformers")]
)
def test_what_is_not_needed_is_not_imported(module, library):
    """A model trained in full does without peft, a list of SASRec's without transformers."""
    code = f"import sys, {module}; print({library!r} in sys.modules)"
    assert script("-c", code).stdout.strip() == "False"


LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONGEST = 60  # lines of a function
LONG = ("main", "fit")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_one_thought_per_line(name):
    """No lambda bound to a name, comprehension over three lines, or conditional in an index."""
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
            n = node.end_lineno - node.lineno + 1
            assert n <= LONGEST, f"{name}: {node.name} has {n} lines"
