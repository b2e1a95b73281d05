"""Every command that a reader is told to type binds against its script."""

import re
import shlex

import pytest

import distill
import extract_emb
import finetune
import train_sr_trad
from benchmarks import efficiency, throughput
from datasets import convert, process
from engine import cli
from experiments import bases, report, titles
from serving import export, recommend
from tests.conftest import ROOT

STEPS = (train_sr_trad, extract_emb, finetune, distill)
MAINS = {f"{module.__name__}.py": module.main for module in STEPS}
MODULES = [convert, process, bases, report, titles]
MODULES += [export, recommend, throughput, efficiency]
MAINS |= {module.__name__: module.main for module in MODULES}
TEXTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
TEXTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
CODE = [name if name.endswith(".py") else f"{name.replace('.', '/')}.py" for name in MAINS]
PAGES = ["README.md", *CODE, "docs/data.md", "docs/speed.md"]


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


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    folders = "engine|models|datasets|utils|serving|templates|experiments|benchmarks|tests|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./]+\.\w+)`", text))
    links = re.findall(r"\]\(((?!http)[\w./-]+)\)", text)
    named |= {str((ROOT / page).parent.joinpath(link).relative_to(ROOT)) for link in links}
    if page == "README.md":
        assert {"docs/flow.svg", "CONTRIBUTING.md"} <= named
    if page != "CHANGELOG.md":
        for name in named:
            assert (ROOT / name).exists(), name


def test_functions_that_the_readme_names_exist():
    """`file` (`function`, ...) in the table of what to edit."""
    readme = (ROOT / "README.md").read_text()
    pairs = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", readme)
    assert len(pairs) >= 5
    for file, name in pairs:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.M), (file, name)
