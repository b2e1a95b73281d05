"""Every command that a reader is told to type binds against its script."""

import re
import shlex

import pytest

import distill
import export
import extract_emb
import finetune
import recommend
import train_sr_trad
from benchmarks import catalogue, efficiency, growth, retrieval, throughput
from datasets import convert, process
from experiments import (
    ablation,
    demo,
    flags_page,
    folded_base,
    motivation,
    random_twin,
    report,
    together,
)
from tests.conftest import ROOT
from utils import cli

MAINS = {
    "train_sr_trad.py": train_sr_trad.main,
    "extract_emb.py": extract_emb.main,
    "finetune.py": finetune.main,
    "distill.py": distill.main,
    "recommend.py": recommend.main,
    "export.py": export.main,
    "datasets.convert": convert.main,
    "datasets.process": process.main,
    "experiments.demo": demo.main,
    "experiments.ablation": ablation.main,
    "experiments.motivation": motivation.main,
    "experiments.report": report.main,
    "experiments.together": together.main,
    "experiments.random_twin": random_twin.main,
    "experiments.folded_base": folded_base.main,
    "experiments.flags_page": flags_page.main,
    "benchmarks.catalogue": catalogue.main,
    "benchmarks.growth": growth.main,
    "benchmarks.retrieval": retrieval.main,
    "benchmarks.throughput": throughput.main,
    "benchmarks.efficiency": efficiency.main,
}
PAGES = [
    "README.md",
    "train_sr_trad.py",
    "extract_emb.py",
    "finetune.py",
    "distill.py",
    "recommend.py",
    "export.py",
    "datasets/convert.py",
    "datasets/process.py",
    "experiments/demo.py",
    "experiments/together.py",
    "experiments/random_twin.py",
    "experiments/folded_base.py",
]
MEASURED = ("throughput", "efficiency", "retrieval", "catalogue", "growth")
PAGES += [f"benchmarks/{name}.py" for name in MEASURED]
PAGES += ["docs/sasrec_teacher.md"]
PAGES += ["docs/data.md", "docs/speed.md", "experiments/flags_page.py"]
TEXTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
TEXTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
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
    found = re.findall(r"^\s*(python (?:-m )?[\w./]+(?: .*)?)$", text, re.M)
    return [line for line in found if "..." not in line]


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


def test_the_page_of_flags_is_fresh():
    page = flags_page.PAGE.read_text()
    assert page == flags_page.with_tables(page), "run python -m experiments.flags_page"
    for name in MAINS.keys() & {f"{script}.py" for script in flags_page.SCRIPTS}:
        for flag in cli.defaults(MAINS[name]):
            assert f"| `{flag}` |" in page, f"{name}: {flag}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    folders = "models|datasets|utils|templates|experiments|benchmarks|tests|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", text))
    links = re.findall(r"\]\(((?!http)[\w./-]+)\)", text)
    named |= {str((ROOT / page).parent.joinpath(link).relative_to(ROOT)) for link in links}
    if page == "README.md":
        assert {"docs/flow.svg", "docs/flags.md", "CONTRIBUTING.md"} <= named
    if page != "CHANGELOG.md":
        for name in named:
            assert (ROOT / name).exists(), name


def test_functions_that_the_readme_names_exist():
    """`file` (`function`, ...) in the table of what to edit."""
    readme = (ROOT / "README.md").read_text()
    pairs = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", readme)
    assert len(pairs) >= 7
    for file, name in pairs:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), (file, name)
