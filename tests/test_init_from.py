"""--init_from: a new run starts from the best weights of another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets.demo import write_demo
from engine import checkpoint
from engine.errors import UsageError
from experiments import bases
from tests.conftest import OFF, SHORT, assert_resumes

MAINS = {"sasrec": train_sr_trad.main, "teacher": finetune.main, "student": distill.main}
STILL = SHORT | {"learning_rate": 1e-12, "warmup_steps": 0}


@pytest.mark.parametrize("step", MAINS)
def test_a_run_starts_from_anothers_best_weights(inside, step):
    MAINS[step](**STILL, seed=9, init_from=f"output/demo/{step}", output_dir="next")
    first, then = checkpoint.load(f"output/demo/{step}/best")[0], checkpoint.load("next/best")[0]
    assert set(first) == set(then)
    for name, tensor in then.items():
        torch.testing.assert_close(tensor, first[name], atol=1e-8, rtol=0)
    config = json.loads(Path("next/config.json").read_text())
    manifest = json.loads(Path(f"output/demo/{step}/best/manifest.json").read_text())
    assert config["init_sha256"] == manifest[checkpoint.WEIGHTS]


def test_an_online_students_weights_are_taken_and_a_run_resumes_bit_for_bit(inside, monkeypatch):
    distill.main(**SHORT, distill_mode="online", output_dir="online")
    distill.main(**STILL, distill_mode="online", init_from="online", seed=9, output_dir="both")
    first, then = (checkpoint.load(f"{name}/best")[0] for name in ("online", "both"))
    for name, tensor in then.items():  # teacher.* and student.*
        torch.testing.assert_close(tensor, first[name], atol=1e-8, rtol=0)
    flags = SHORT | {"init_from": "online", "save_steps": 1}
    assert_resumes(monkeypatch, distill.main, **flags)
    distill.main(**flags, output_dir="whole")  # finished: prints its results
    distill.main(**SHORT, seed=3, output_dir="online", overwrite=True)
    with pytest.raises(UsageError, match="a finished run from something else: init_sha256"):
        distill.main(**flags, output_dir="whole")


def test_what_no_weight_depends_on_may_differ_from_the_start(inside):
    distill.main(**SHORT, cls_multiple_lambda=0, output_dir="blocks")
    start = {"init_from": "blocks", "lora_r": 8, "output_dir": "alone"}  # trained in full
    assert distill.main(**SHORT, **OFF, **start)["steps"] == 3


def test_what_cannot_be_a_start_is_refused(inside):
    Path("none").mkdir()
    shutil.copytree("output/demo/student", "empty")
    shutil.rmtree("empty/best")
    for flags, message in (
        ({"init_from": "none"}, "--init_from=none: no student run there"),
        ({"init_from": "empty"}, "--init_from=empty: has no checkpoint best/"),
        ({"init_from": "output/demo/teacher"}, "holds a teacher run, expected a student run"),
        ({"init_from": "s"}, "--init_from=s is this run's own folder; name --output_dir"),
        (
            {"init_from": "output/demo/student", "llama_decoder_nums_student": 8},
            r"its model has layers \[0, 1, 2, 3\], this one \[0, 1, 2, 3, 4, 5, 6, 7\]",
        ),
        ({"init_from": "output/demo/student", "student_init": "teacher"}, "both say where to"),
    ):
        with pytest.raises(UsageError, match=message):
            distill.main(**SHORT, **flags, output_dir="s")
    assert not Path("s/best").exists()


def test_another_base_or_another_kind_of_blocks_is_no_start(inside):
    made = {"kind": "twin", "base_model": "tiny", "output_dir": "twin", "seed": 1}
    bases.main(**made)
    lora = SHORT | {"train_strategy": "lora"}
    finetune.main(**lora, base_model="twin", output_dir="l")
    with pytest.raises(UsageError, match="--base_model=tiny: .* is another base than the one"):
        finetune.main(**lora, init_from="l", output_dir="next")
    finetune.main(**lora, base_model="twin", init_from="l", lora_dropout=0, output_dir="n")
    finetune.main(**SHORT, base_model="twin", train_strategy="full", output_dir="f")
    config = Path("twin/config.json")
    config.write_text(config.read_text().replace("10000.0", "20000.0"))  # of the positions
    with pytest.raises(UsageError, match="--base_model=twin: twin is another base than the one"):
        finetune.main(eval_only=True, output_dir="f")
    Path("twin/adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="--base_model=twin: has a LoRA adapter .*; merge it"):
        finetune.main(**lora, base_model="twin", output_dir="m")
    short = SHORT | {"init_from": "output/demo/sasrec", "output_dir": "s"}
    with pytest.raises(UsageError, match="its model has norm query, this one post"):
        train_sr_trad.main(**short, norm="post")
    with pytest.raises(UsageError, match="its model has max_seq_length 30, this one 9"):
        train_sr_trad.main(**short | {"max_seq_length": 9})


def test_numbers_of_other_data_are_not_taken_for_items(inside, capsys):
    """Row i of SASRec's weights, or of a table, is another item in another file."""
    write_demo("data/next.csv", n_users=120, n_items=160, seed=1)
    taken = SHORT | {"domain_type": "next", "init_from": "output/demo/sasrec"}
    with pytest.raises(UsageError, match="output/demo/sasrec was made from another file: its data"):
        train_sr_trad.main(**taken)
    with pytest.raises(UsageError, match="sasrec_item.pkl was made from another file: its data"):
        train_sr_trad.main(**SHORT, domain_type="next", init_table="output/demo/sasrec_item.pkl")
    assert not Path("output/next").exists()
    train_sr_trad.main(**SHORT, domain_type="next")
    extract_emb.main(domain_type="next")
    start = {"init_from": "output/demo/teacher", "output_dir": "t"}  # an LLM has no row per item
    assert finetune.main(**SHORT, domain_type="next", **start)["steps"] == 3
    assert "trained with other files: data_sha256, table_sha256" in capsys.readouterr().out
