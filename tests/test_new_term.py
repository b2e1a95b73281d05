"""A new loss term is a function, and in the script its weight and two lines: here a toy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHORT

FIELD = """    toy_lambda: NonNegativeFloat = weight(0.0, "weight of the toy term", "toy")


def loss_parts("""
FUNCTION = '''def toy(teacher: Tensor, student: Tensor) -> Tensor:
    """A toy term."""
    return (teacher - student).abs().mean()


def block_cosine('''
LINE = """    if t is not None and loss.toy_lambda:
        parts["toy"] = loss.toy_lambda, losses.toy(t.states, s.states)
    if v is not None:"""
FLAGS = ["--distill_lambda=0", "--norm_lambda=0", "--cls_multiple_lambda=0", "--toy_lambda=0.5"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources with the three edits."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in listed.split():
        if name.endswith((".py", ".json", ".csv")) and not name.startswith(("tests/", "docs/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    edit(tmp_path / "distill.py", "\n\ndef loss_parts(", FIELD)
    edit(tmp_path / "models/losses.py", "def block_cosine(", FUNCTION)
    edit(tmp_path / "distill.py", "    if v is not None:", LINE)
    return tmp_path


def test_a_toy_term_takes_three_edits(tree, inside):
    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=inside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    short = [f"--{name}={value}" for name, value in SHORT.items()]
    words = [sys.executable, tree / "distill.py", *short, "--toy_lambda=0.5"]
    done = subprocess.run(words, cwd=inside, capture_output=True, text=True)
    assert "with other flags: --toy_lambda=0.5 (the run has 0.0)" in done.stderr
    (inside / "output/demo/teacher_states").rename(inside / "kept_states")
    printed = run(tree / "distill.py", *short, *FLAGS, "--output_dir=toy_run/toy")
    assert "teacher states: none in" in printed  # the teacher was loaded
    line = json.loads((inside / "toy_run/toy/metrics.jsonl").read_text().splitlines()[0])
    assert set(line) >= {"ce", "toy", "teacher_ce", "total"} and "align_cos" not in line
    assert line["total"] == pytest.approx(line["ce"] + 0.5 * line["toy"])
    config = json.loads((inside / "toy_run/toy/config.json").read_text())
    assert config["flags"]["toy_lambda"] == 0.5
    assert "--toy_lambda" in run(tree / "distill.py", "--help")
    code = "from experiments import report; report.main(runs='toy_run', resamples=10)"
    run("-c", f"import sys; sys.path.insert(0, {str(tree)!r}); {code}")
    page = (inside / "toy_run/report.md").read_text()
    assert "| 4 <- 8: toy, from the teacher's adapter and head |" in page
