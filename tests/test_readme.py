"""Every command that a reader is told to type binds against its script."""

import re
import shlex

import pytest

import distill
import extract_emb
import finetune
import train_sr_trad
from benchmarks import efficiency, throughput
from datasets import process
from experiments import ablation, demo, motivation, report
from tests.conftest import ROOT
from utils import cli

MAINS = {
    "train_sr_trad.py": train_sr_trad.main,
    "extract_emb.py": extract_emb.main,
    "finetune.py": finetune.main,
    "distill.py": distill.main,
    "datasets.process": process.main,
    "experiments.demo": demo.main,
    "experiments.ablation": ablation.main,
    "experiments.motivation": motivation.main,
    "experiments.report": report.main,
    "benchmarks.throughput": throughput.main,
    "benchmarks.efficiency": efficiency.main,
}
PAGES = [
    "README.md",
    "train_sr_trad.py",
    "extract_emb.py",
    "finetune.py",
    "distill.py",
    "datasets/process.py",
    "experiments/demo.py",
]
PAGES += ["benchmarks/throughput.py", "benchmarks/efficiency.py"]
PAGES += [
    "experiments/ablation.py",
    "experiments/motivation.py",
    "experiments/report.py",
    "docs/results.md",
]


def commands(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    if page.endswith(".py"):
        text = text.split('"""')[1]
    return re.findall(r"^\s*(python (?:-m )?[\w./]+(?: .*)?)$", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_commands_bind(page):
    found = commands(page)
    assert found
    for line in found:
        words = shlex.split(line, comments=True)[1:]
        name = words[1] if words[0] == "-m" else words[0]
        if name == "venv":
            continue
        cli.bind(MAINS[name], words[2:] if words[0] == "-m" else words[1:])


def test_the_readmes_two_commands_are_what_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    targets = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert f"    {command} " in readme
        assert f"\n{command}\n" in ci
        assert f"\n{command.split()[1]}:" in targets


def test_every_flag_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in ("train_sr_trad.py", "extract_emb.py", "finetune.py", "distill.py"):
        for flag in cli.defaults(MAINS[name]):
            assert re.search(rf"`(--)?{flag}\b", readme), f"{name}: {flag}"


def test_files_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text()
    named = set(
        re.findall(
            r"`((?:models|datasets|utils|templates|experiments|benchmarks|tests|docs)/[\w./]+\.\w+)`",
            readme,
        )
    )
    named |= set(re.findall(r"\]\((docs/[\w./]+)\)", readme))
    assert "datasets/process.ipynb" in named and "docs/flow.svg" in named
    for name in named:
        assert (ROOT / name).exists(), name
