"""SASRec as a teacher: the KL of its catalogue softmax, its cached answers, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import distill
import extract_emb
import train_sr_trad
from datasets.domain import Domain
from datasets.item_table import read_table
from datasets.sequences import prepare
from models.llm4rec import LLM4Rec
from models.losses import Scores, recommendation_loss
from models.sasrec import SASRec
from tests.conftest import SHORT, assert_resumes, hashes, histories, small_model, trained_lines
from utils.errors import UsageError
from utils.flags import Data, DistillationLoss, Evaluation, Sequence
from utils.run import Run
from utils.training import _batches

OFF = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
ALONE = OFF | {"sasrec_lambda": 3.0, "sasrec_temperature": 2.0}


@pytest.mark.parametrize("width", [None, 9])
def test_the_kl_is_that_of_both_softmaxes_and_teaches_the_student_alone(width):
    torch.manual_seed(0)
    student = small_model(layers=2, exit_heads=False).train()
    user = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    batch, target = histories([3, 8, 1, 5]), torch.tensor([1, 2, 3, 4])
    out, table = student(batch), student.item_table
    if width is not None:  # SASRec has a table of its own
        user = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
    theirs = table if width is None else torch.randn(len(table), width, dtype=torch.float64)
    parts = recommendation_loss(
        out, None, table, target, DistillationLoss(**ALONE), sasrec=Scores(user, theirs)
    )
    p, q = (F.softmax(u @ t.T / 2, dim=-1) for u, t in ((user, theirs), (out.user, table)))
    plain = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(parts["sasrec_kl"], plain, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(parts["total"], parts["ce"] + 3 * parts["sasrec_kl"])
    plain_slope = torch.autograd.grad(plain, out.user, retain_graph=True)[0]
    slope = torch.autograd.grad(parts["sasrec_kl"], out.user, retain_graph=True)[0]
    torch.testing.assert_close(slope, plain_slope, atol=1e-13, rtol=1e-11)
    parts["total"].backward()
    assert user.grad is None
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.slow
def test_the_loaded_sasrec_scores_as_the_trained_one(inside):
    data, _ = Domain.of(Data()).read()
    run = Run.read("sasrec", Path("output/demo/sasrec"), "--sasrec")
    table = read_table("output/demo/sasrec_item.pkl", data.item_ids)
    sasrec = SASRec.load(run, table)
    assert (
        torch.equal(sasrec.item_table, table)
        and not sasrec.encoder()(torch.tensor([[0, 1, 2]])).states.numel()
    )
    evaluated = train_sr_trad.main(eval_only=True)
    trained = json.loads(Path("output/demo/sasrec/results.json").read_text())
    assert evaluated["test"] == trained["test"]


@pytest.mark.slow
def test_its_answers_are_cached_and_no_llm_teacher_is_needed(inside, capsys):
    shutil.rmtree("output/demo/teacher")
    shutil.rmtree("output/demo/teacher_states")
    short = SHORT | ALONE | {"base_model": "tiny", "log_steps": 1}
    distill.main(**short, output_dir="first")
    said = capsys.readouterr().out
    assert "teacher states: 120 samples x 0 blocks x 0" in said
    distill.main(**short, output_dir="second")
    assert "teacher states: read from" in capsys.readouterr().out
    distill.main(**short, output_dir="live", teacher_cache="off")
    assert hashes(Path("first/best")) == hashes(Path("second/best"))
    cached, live = trained_lines("first"), trained_lines("live")
    assert len(live) == 3 and set(live[0]) >= {"ce", "sasrec_kl", "total"}
    for one, other in zip(cached, live):
        # a small difference of large float32 numbers, and batches of other sizes
        assert one.pop("sasrec_kl") == pytest.approx(other.pop("sasrec_kl"), abs=1e-5)
        assert one.pop("event") == other.pop("event")
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, {"distill_mode": "online"}])
def test_beside_an_llm_teacher_it_resumes_bit_for_bit(inside, monkeypatch, mode):
    short = SHORT | mode | {"sasrec_lambda": 1.0, "save_steps": 1, "log_steps": 1}
    assert_resumes(monkeypatch, distill.main, **short)
    assert {"align_cos", "sasrec_kl"} <= set(trained_lines("whole")[0])


@pytest.mark.slow
def test_a_foreign_sasrec_is_refused(inside):
    train_sr_trad.main(**SHORT, seed=7, output_dir="other")
    with pytest.raises(
        UsageError,
        match="--sasrec=other: its item embeddings are not the item table;"
        " name the run that the table is from",
    ):
        distill.main(**SHORT, sasrec_lambda=1.0, sasrec="other", output_dir="s")
    with pytest.raises(UsageError, match="--sasrec=output/demo/teacher holds a teacher run"):
        distill.main(**SHORT, sasrec_lambda=1.0, sasrec="output/demo/teacher", output_dir="s")
    with pytest.raises(
        UsageError, match="--sasrec=missing: no sasrec run there; train_sr_trad.py makes one"
    ):
        distill.main(**SHORT, sasrec_lambda=1.0, sasrec="missing", output_dir="s")
    assert not Path("s").exists()
    # What the message advises works.
    extract_emb.main(sasrec="other", item_table="other.pkl")
    flags = SHORT | OFF | {"sasrec_lambda": 1.0, "sasrec": "other", "item_table": "other.pkl"}
    distill.main(**flags, output_dir="s")
    with pytest.raises(UsageError, match="holds a finished run from another file"):
        distill.main(**flags | {"sasrec": None, "item_table": None}, output_dir="s")


@pytest.mark.slow
def test_several_teach_by_the_mean_of_their_scores(inside):
    train_sr_trad.main(**SHORT, seed=7, emb_dim=24, output_dir="other")
    short = SHORT | ALONE | {"base_model": "tiny", "log_steps": 1, "learning_rate": 1e-12}
    both = {"sasrec": "output/demo/sasrec,other"}
    distill.main(**short, **both, output_dir="two")
    distill.main(**short, **both, output_dir="live", teacher_cache="off")
    data, _ = Domain.of(Data()).read()
    samples, _ = prepare(data, "last", Sequence(), Evaluation())
    table = read_table("output/demo/sasrec_item.pkl", data.item_ids)
    trained = Run.read("student", Path("two"), "--output_dir")
    first = next(_batches(len(samples), SHORT["batch_size"], 1, trained.seed))
    logits = 0.0
    for folder in both["sasrec"].split(","):
        run = Run.read("sasrec", Path(folder), "--sasrec")
        longer = dataclasses.replace(samples, max_seq_length=run.flags["max_seq_length"])
        sasrec = SASRec.load(run).eval()
        logits = logits + (sasrec(longer.histories(first)) @ sasrec.item_table.T) / 2
    student = LLM4Rec.load(trained, table, bf16=False).eval()
    own = student(samples.histories(first)).user @ table.T
    p, q = (F.log_softmax(values / 2, dim=-1) for values in (logits, own))
    plain = 4 * (p.exp() * (p - q)).sum(-1).mean()
    for name in ("two", "live"):
        logged = trained_lines(name)[0]["sasrec_kl"]
        assert logged == pytest.approx(float(plain.detach()), abs=2e-5)


def test_flags_without_effect_are_named():
    loss = DistillationLoss(sasrec_temperature=2.0, given=frozenset({"sasrec_temperature"}))
    assert loss.unused() == ["--sasrec_temperature=2.0 (needs --sasrec_lambda above 0)"]
