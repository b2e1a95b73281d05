"""SASRec as a teacher: the KL of its catalogue softmax, its cached answers, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets.domain import Domain
from datasets.item_table import read_table
from datasets.sequences import training_samples
from engine.errors import UsageError
from engine.run import Run
from models.llm4rec import LLM4Rec
from models.sasrec import SASRec
from tests.conftest import OFF, SHORT, assert_resumes, hashes, refused, trained_lines
from utils.flags import STUDENT_STREAM, Data
from utils.training import _batches

ALONE = OFF | {"sasrec_lambda": 3.0, "sasrec_temperature": 2.0}


def test_the_loaded_sasrec_scores_as_the_trained_one(inside):
    data, _ = Domain.of(Data()).read()
    run = Run.read("sasrec", Path("output/demo/sasrec"), "--sasrec")
    table = read_table("output/demo/sasrec_item.pkl", data.item_ids)
    assert torch.equal(SASRec.load(run).item_table, table)
    evaluated = train_sr_trad.main(eval_only=True)
    trained = json.loads(Path("output/demo/sasrec/results.json").read_text())
    assert evaluated["test"] == trained["test"]


@pytest.mark.parametrize("bf16", [False, True])
def test_its_answers_are_cached_and_no_llm_teacher_is_needed(inside, capsys, bf16):
    """In its own precision, from disk and live, whatever the student's."""
    shutil.rmtree("output/demo/teacher")
    shutil.rmtree("output/demo/teacher_states")
    short = SHORT | ALONE | {"base_model": "tiny", "log_steps": 1, "bf16": bf16}
    distill.main(**short, output_dir="first")
    said = capsys.readouterr().out
    assert "teacher states: 120 samples, 0.00 GiB" in said
    distill.main(**short, output_dir="second")
    assert "teacher states: read from" in capsys.readouterr().out
    distill.main(**short, output_dir="live", teacher_cache="off")
    assert hashes(Path("first/best")) == hashes(Path("second/best"))
    cached, live = trained_lines("first"), trained_lines("live")
    assert len(live) == 3 and set(live[0]) >= {"ce", "sasrec_kl", "total"}
    # a factor of a bfloat16 product rounds to its other neighbour now and then, 2^-8 away
    near, norm = (1e-4, 2**-9) if bf16 else (1e-5, 1e-5)
    for one, other in zip(cached, live):
        # a small difference of large float32 numbers, and batches of other sizes
        assert one.pop("sasrec_kl") == pytest.approx(other.pop("sasrec_kl"), abs=1e-5)
        assert one.pop("event") == other.pop("event")
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=norm)
        assert one == pytest.approx(other, rel=near)


@pytest.mark.parametrize("mode", [{}, {"distill_mode": "online"}])
def test_beside_an_llm_teacher_it_resumes_bit_for_bit(inside, monkeypatch, mode):
    short = SHORT | mode | {"sasrec_lambda": 1.0, "save_steps": 1, "log_steps": 1}
    assert_resumes(monkeypatch, distill.main, **short)
    assert {"align_cos", "sasrec_kl"} <= set(trained_lines("whole")[0])


def test_a_foreign_sasrec_is_refused(inside):
    train_sr_trad.main(**SHORT, seed=7, output_dir="other")
    with refused("--sasrec=other: their item embeddings are not the item table; name the run or"):
        distill.main(**SHORT, sasrec_lambda=1.0, sasrec="other", output_dir="s")
    with refused("--sasrec=output/demo/teacher holds a teacher run"):
        distill.main(**SHORT, sasrec_lambda=1.0, sasrec="output/demo/teacher", output_dir="s")
    assert not Path("s").exists()
    # What the message advises works.
    extract_emb.main(sasrec="other", item_table="other.pkl")
    flags = SHORT | OFF | {"sasrec_lambda": 1.0, "sasrec": "other", "item_table": "other.pkl"}
    distill.main(**flags, output_dir="s")
    with pytest.raises(UsageError, match="holds a finished run from something else"):
        distill.main(**flags | {"sasrec": None, "item_table": None}, output_dir="s")


def test_several_teach_by_the_mean_of_their_scores_over_tables_side_by_side(inside):
    """Each half of the table, and so each model's scores, at the models' mean standard deviation;
    a student's first KL is that of the mean, computed plainly. The shorter one reads the end of the
    histories that the longer one reads.
    """
    train_sr_trad.main(**SHORT, seed=7, emb_dim=24, max_seq_length=7, output_dir="other")
    both = "output/demo/sasrec,other"
    about = extract_emb.main(sasrec=both, item_table="wide.pkl")
    data, _ = Domain.of(Data()).read()
    table = read_table("wide.pkl", data.item_ids)
    runs = [Run.read("sasrec", Path(name), "--sasrec") for name in both.split(",")]
    sasrecs = [SASRec.load(run) for run in runs]
    samples = training_samples(data, "last", 30)
    every = samples.histories(np.arange(len(samples)))
    scores = []
    for sasrec in sasrecs:
        history = every[:, -sasrec.max_seq_length :]
        scores.append(sasrec.user_encoder()(history) @ sasrec.item_table.detach().T)
    loud = [float(each.std(dim=1).mean()) for each in scores]
    # the mean of both, each at their mean standard deviation
    parts = [each / own * (sum(loud) / 2) / 2 for each, own in zip(scores, loud)]
    assert about["scales"] == pytest.approx([own / (sum(loud) / 2) for own in loud], rel=1e-5)
    rows = [s.item_table.detach() / scale for s, scale in zip(sasrecs, about["scales"])]
    torch.testing.assert_close(table, torch.cat(rows, dim=1))
    short = SHORT | ALONE | {"base_model": "tiny", "log_steps": 1, "learning_rate": 1e-12}
    wide = {"sasrec": both, "item_table": "wide.pkl"}
    distill.main(**short, **wide, output_dir="two")
    distill.main(**short, **wide, output_dir="live", teacher_cache="off")
    run = Run.read("student", Path("two"), "--model")
    student = LLM4Rec.load(run, table, bf16=False).eval()
    first = next(_batches(len(samples), 32, run.flags["seed"] + STUDENT_STREAM))
    own = student(samples.histories(first)).user @ table.T
    logits = sum(part[first] for part in parts)
    p, q = (F.log_softmax(values / 2, dim=-1) for values in (logits, own))
    plain = float(4 * (p.exp() * (p - q)).sum(-1).mean())
    for name in ("two", "live"):
        line = trained_lines(name)[0]
        assert line["sasrec_kl"] == pytest.approx(plain, abs=2e-5)
        assert line["total"] == pytest.approx(line["ce"] + 3 * line["sasrec_kl"], rel=1e-6)
    with pytest.raises(UsageError, match="name the run or the runs that the table is from"):
        distill.main(**short, sasrec="other", item_table="wide.pkl", output_dir="wrong")
    finetune.main(**SHORT, **wide, sasrec_lambda=3.0, output_dir="t")  # and a teacher
    assert "sasrec_kl" in trained_lines("t")[0]
