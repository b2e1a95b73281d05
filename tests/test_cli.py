import ast
import inspect
import json
import re
from pathlib import Path
from typing import Literal

import pytest

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import process
from engine import cli
from engine.cli import UsageError, bind
from models.sasrec import SASRec
from tests.conftest import ROOT, SHORT
from tests.conftest import script as run_script
from utils import flags

SCRIPTS = {f"{m.__name__}.py": m for m in (train_sr_trad, extract_emb, finetune, distill)}


def example(
    *,
    rate: flags.PositiveFloat = 1.0,
    count: flags.PositiveInt | None = None,
    bf16: bool = True,
    names: list[str] = ["x"],  # noqa: B006
    kind: Literal["first", "interval"] = "first",
    folder: str | None = None,
) -> None:
    """A signature with every kind of flag."""


GOOD = [
    ("--rate=1e-3", {"rate": 1e-3}),
    ("--rate 2", {"rate": 2.0}),
    ("--count=5", {"count": 5}),
    ("--count=none", {"count": None}),
    ("--bf16=false", {"bf16": False}),
    ("--bf16 0", {"bf16": False}),
    ("--nobf16", {"bf16": False}),
    ("--bf16", {"bf16": True}),
    ("--bf16 --rate=3", {"bf16": True, "rate": 3.0}),
    ("--names=[gate_proj]", {"names": ["gate_proj"]}),
    ("--names=a,b", {"names": ["a", "b"]}),
    ('--names ["a","b"]', {"names": ["a", "b"]}),
    ("--folder=1e5", {"folder": "1e5"}),
    ("--folder=a,b", {"folder": "a,b"}),
    ("--kind=interval", {"kind": "interval"}),
]


@pytest.mark.parametrize("line, values", GOOD)
def test_what_is_typed_is_what_arrives(line, values):
    assert bind(example, line.split(" ")) == values


BAD = [
    ("--batchsize=4", "unknown flag --batchsize"),
    ("--count=4.5", "--count=4.5: expected a whole number >= 1"),
    ("--count=1,000", "--count=1,000: expected a whole number"),
    ("--count=1_000", "expected a whole number"),
    ("--count=0", "--count=0: expected a whole number >= 1"),
    ("--count=abc", "expected a whole number"),
    ("--count", "--count needs a value"),
    ("--rate=1e", "--rate=1e: expected a number > 0"),
    ("--rate=nan", "expected a number > 0"),
    ("--rate=inf", "expected a number > 0"),
    ("--rate=-1", "expected a number > 0"),
    ("--rate=0", "expected a number > 0"),
    ("--bf16=maybe", "expected true or false"),
    ("--kind=trune", "expected one of first, interval"),
    ("--names=", "expected a list"),
    ("gate_proj", "unexpected word 'gate_proj'"),
    ("--bf16 maybe", "unexpected word 'maybe' after --bf16, which takes true or false"),
    ("--names gate_proj up_proj", "unexpected word 'up_proj'"),
    ("-l 3", "unexpected word '-l'"),
    ("--rate=1 --rate=2", "--rate is given twice"),
    ("--config", "--config needs a value, expected the config.json of a run"),
    ("--config= --rate=1", "--config=: expected the config.json of a run"),
    ("--config=a --config=b", "--config is given twice"),
    ("--names=a --folder=", "--folder=: expected text"),
    ("--nmaes=a", "did you mean --names?"),
]


@pytest.mark.parametrize("line, message", BAD)
def test_a_wrong_line_is_refused(line, message):
    with pytest.raises(UsageError) as caught:
        bind(example, line.split(" "))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(UsageError) as caught:
        bind(example, ["--count=0", "stray", "--bogus=1", "--rate=x"])
    assert str(caught.value).count(";") == 3


def test_calls_in_process_are_checked_too():
    checked = cli.command(example)
    with pytest.raises(UsageError, match="--count=0; *|--count=0"):
        checked(count=0)
    with pytest.raises(UsageError, match="unknown flag --coutn"):
        checked(coutn=1)
    with pytest.raises(UsageError, match="expected true or false"):
        checked(bf16="false")
    with pytest.raises(UsageError, match="--reviews is required; --domain_type is required"):
        process.main()
    checked(rate=1, count=None, names=["a"])


def test_a_tilde_is_the_home_folder_in_every_part_of_a_list(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    @cli.command
    def main(*, model: str):
        return model

    assert main(model="~/a,b,~/c~d") == "/home/me/a,b,/home/me/c~d"


@pytest.mark.parametrize("script", [*SCRIPTS, "-m datasets.process", "-m experiments.report"])
@pytest.mark.parametrize("flag", ["--bogus=7", "--seed=x stray"])
def test_a_wrong_request_is_answered_with_status_2_and_one_line(script, flag, tmp_path):
    done = run_script(*f"{script} {flag}".split(), cwd=tmp_path, status=2, PATH="")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


def test_no_script_imports_torch_before_its_checks(tmp_path):
    for script in SCRIPTS:
        code = f"import sys, {script[:-3]};"
        code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
        assert run_script("-c", code, cwd=tmp_path).stdout.strip() == "[]", script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    text = run_script(script, "--help", PATH="", PAGER="cat").stdout
    assert "--config RUN/config.json" in text
    assert not re.search(r"^ +-\w, |\.\.\.$", text, re.MULTILINE)  # fire's short flags, cut types
    for flag in cli.defaults(SCRIPTS[script].main):
        assert re.search(rf"--{flag}=\w+\n *Type: .*\n( *Default: .*\n)? +\w", text), flag
    if script == "finetune.py":
        assert "one of auto, lora, full" in text and "a whole number >= 1" in text
        text = run_script("-m", "serving.export", "--help", PATH="", PAGER="cat").stdout
        assert "--output_dir=OUTPUT_DIR (required)\n" in text


def test_every_flag_is_read():
    """As an attribute of its group, or with all values of its group at once."""
    read = set()
    places = (ROOT / name for name in ("", "models", "utils", "datasets"))
    for path in (path for place in places for path in place.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
    run = ast.walk(ast.parse((ROOT / "engine/run.py").read_text()))
    read |= {node.value for node in run if isinstance(node, ast.Constant)}  # by name
    read |= set(inspect.signature(SASRec.__init__).parameters)  # SASRec(**sasrec.values())
    spec = (ROOT / "models/llm4rec.py").read_text()
    read |= {name for name in flags.LoRA().values() if f'"{name}"' in spec}  # spec | lora.values()
    for script, module in SCRIPTS.items():
        for flag in cli.defaults(module.main):
            assert flag in read, f"{script}: --{flag} is never read"


def test_a_flag_of_two_scripts_has_one_text_and_its_group_a_kind():
    seen = {}
    for module in SCRIPTS.values():
        for name, flag in cli.flags_of(module.main).items():
            assert flag.group.kind in ("files", "model", "training", "free"), name
            assert seen.setdefault(name, flag.about["help"]) == flag.about["help"]


def test_what_has_no_effect_is_said(capsys):
    @cli.command
    def main(*, loss: distill.StudentLoss, llm: flags.LLM):
        return loss, llm

    loss, llm = main(norm_form="squared_l2", norm_lambda=0.0, interval_nums=3, temperature=2.0)
    assert loss.given == {"norm_form", "norm_lambda", "temperature"}
    assert llm.given == {"interval_nums"}
    printed = capsys.readouterr().out
    said = "norm_form=squared_l2 (needs --norm_lambda above 0)"
    interval = "interval_nums=3 (needs --layer_selection=interval)"
    for text in (said, "temperature=2.0 (needs --logit_lambda above 0)", interval):
        assert f"--{text}" in printed
    main(norm_form="squared_l2", interval_nums=3, layer_selection="interval")
    assert capsys.readouterr().out == ""

    @cli.command
    def made(*, kind: str | None = None, seed: int = cli.flag(1, needs="kind")):
        return seed

    assert made(seed=3) == 3  # a flag of a script's own
    with pytest.raises(UsageError, match="--cls_multiple_lambda=2: one block has no inner exit"):
        main(cls_multiple_lambda=2.0, block_map="4:8")
    assert capsys.readouterr().out == "without effect: --seed=3 (needs --kind)\n"


def test_a_runs_config_repeats_it_and_flags_beside_it_come_first(inside):
    train_sr_trad.main(**SHORT, hid_dim=16, norm="pre", output_dir="one")
    words = ["--config", "one/config.json", "--output_dir", "two"]
    train_sr_trad.main(**cli.bind(train_sr_trad.main, words))
    one, two = (json.loads(Path(name, "results.json").read_text()) for name in ("one", "two"))
    assert one["weights_sha256"] == two["weights_sha256"]
    given = cli.bind(train_sr_trad.main, ["--config=one/config.json", "--seed=7"])
    assert given["seed"] == 7 and given["hid_dim"] == 16 and "output_dir" not in given
    given = cli.bind(train_sr_trad.main, ["--config=one/config.json", "--num_epochs=3"])
    assert given["num_epochs"] == 3 and "max_steps" not in given
    train_sr_trad.main(**SHORT, data_path="data/demo.csv", output_dir="three")
    assert "data_path" not in cli.bind(train_sr_trad.main, ["--config=three", "--domain_type=x"])
    online = ["--config=output/demo/student", "--distill_mode=online"]
    assert not {"student_init", "teacher"} & cli.bind(distill.main, online).keys()
    with pytest.raises(UsageError, match="--config=one/config.json: of another command"):
        cli.bind(distill.main, ["--config", "one/config.json"])
    with pytest.raises(UsageError, match="--config not found: none.json"):
        cli.bind(distill.main, ["--config", "none.json"])
