"""Folders written by the commit before the house was rebuilt: tests/data/before.tar.xz.

A domain of 60 users, SASRec of width 6, a LoRA teacher of two layers, students of one layer: one
finished, one killed after its first checkpoint. Everything was computed with one thread.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

import distill
import finetune
import train_sr_trad
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
LORA = {"train_strategy": "lora", "lora_r": 2, "lora_target_modules": ["gate_proj"]}
SHORT = {"max_steps": 8, "batch_size": 16, "eval_batch_size": 64, "eval_steps": 4}
SHORT |= {"save_steps": 4, "log_steps": 2}
STUDENT = SHORT | LORA | {"llama_decoder_nums_student": 1, "distill_block": 1}


@pytest.fixture
def old(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests/data/before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "module, name", [(train_sr_trad, "sasrec"), (finetune, "teacher"), (distill, "student")]
)
def test_an_old_run_evaluates_as_it_did(old, module, name):
    before = json.loads(Path(f"output/demo/{name}/results.json").read_text())
    after = module.main(eval_only=True)
    for split in ("valid", "test"):
        for protocol, metrics in before[split].items():
            assert after[split][protocol] == pytest.approx(metrics, abs=1e-6)
    assert after["weights_sha256"] == before["weights_sha256"]


def test_an_old_teacher_teaches(old):
    results = distill.main(**STUDENT | {"seed": 3}, output_dir="mine")
    assert results["steps"] == 8
    shutil.rmtree("output/demo/teacher_states")
    distill.main(**STUDENT | {"seed": 3}, teacher_cache="off", output_dir="live")
