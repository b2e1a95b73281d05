"""The four scripts on a shrunken demo."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import item_table
from datasets.interactions import read_histories
from engine import checkpoint
from engine.errors import UsageError
from tests.conftest import (
    OFF,
    SHORT,
    files,
    hashes,
    log_of,
    refused,
    trained_lines,
    write_sequences,
)

pytestmark = pytest.mark.slow
CHECKPOINT = ("weights.safetensors", "state.safetensors", "meta.json", "manifest.json")
METRICS = "HR@1 HR@5 HR@10 HR@20 NDCG@5 NDCG@10 NDCG@20 MRR"
RUN = {"config.json", "metrics.jsonl", "results.json", "ranks.npz"}
RUN |= {f"{kind}/{name}" for kind in ("best", "last") for name in CHECKPOINT}
BASE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_exactly_these_files_are_written(house):
    folder, _ = house
    expected = {"data/demo.csv", "output/demo/sasrec_item.pkl", "output/demo/sasrec_item.json"}
    for step in ("sasrec", "teacher", "student"):
        expected |= {f"output/demo/{step}/{name}" for name in RUN}
    expected |= {f"output/base/tiny/{name}" for name in BASE}
    (states,) = (folder / "output/demo/teacher_states").glob("[!.]*")
    cached = ("user.bin", "states.bin", "exits.bin", "meta.json")
    expected |= {f"output/demo/teacher_states/{states.name}/{name}" for name in cached}
    assert files(folder) == expected


def test_results_and_logs_say_what_a_reader_needs(house):
    folder, printed = house
    for step in ("sasrec", "teacher", "student"):
        results = json.loads((folder / f"output/demo/{step}/results.json").read_text())
        assert results["steps"] == 3 and results["users"] == 120
        assert results["parameters"] >= results["trainable_parameters"] > 0
        assert set(results["test"]) == set(results["valid"]) == {"sampled", "full", "full_all"}
        assert set(results["test"]["full"]) == {*METRICS.split()}
        assert results["candidates"]["fewest"] < results["candidates"]["asked"] == 999
        assert "all of them are used" in printed[step]
        assert f"test sampled  HR@1 {results['test']['sampled']['HR@1']:.4f}" in printed[step]
        assert results["random_base"] == (step != "sasrec")
    lines = [json.loads(line) for line in open(folder / "output/demo/student/metrics.jsonl")]
    parts = next(line for line in lines if line["event"] == "train")
    assert all(parts[part] > 0 for part in ("exits", "align_cos", "align_norm", "teacher_ce"))
    total = parts["ce"] + parts["exits"] + parts["align_cos"] + 0.1 * parts["align_norm"]
    assert parts["total"] == pytest.approx(total, rel=1e-6)
    said = "inherited from the teacher run in output/demo/teacher: max_seq_length 30, "
    assert said in printed["student"]


def test_eval_only_repeats_the_metrics_and_trains_nothing(inside):
    for step, module in (("sasrec", train_sr_trad), ("teacher", finetune), ("student", distill)):
        run = inside / f"output/demo/{step}"
        before = json.loads((run / "results.json").read_text())
        kept = hashes(run / "best") | hashes(run / "last")
        after = module.main(eval_only=True)
        assert hashes(run / "best") | hashes(run / "last") == kept
        for name in before.keys() - {"inference_seconds", "inference_users_per_second"}:
            assert after[name] == before[name], (step, name)


def test_a_second_run_reads_the_first_and_overwrite_gives_the_same_bits(inside, capsys):
    kept = hashes(inside / "output/demo/teacher")
    results = finetune.main(**SHORT)
    printed = capsys.readouterr().out
    assert "output/demo/teacher holds this command's finished run" in printed
    assert f"test sampled  HR@1 {results['test']['sampled']['HR@1']:.4f}" in printed
    assert hashes(inside / "output/demo/teacher") == kept
    (inside / "output/demo/teacher/notes.txt").write_text("mine")
    before = hashes(inside / "output/demo/teacher/best")["weights.safetensors"]
    finetune.main(**SHORT, overwrite=True)
    assert hashes(inside / "output/demo/teacher/best")["weights.safetensors"] == before
    assert (inside / "output/demo/teacher/notes.txt").exists()


def test_the_offline_teacher_is_frozen_and_in_evaluation_mode(inside, monkeypatch):
    from models import llm4rec, losses

    finetune.main(**SHORT, train_strategy="lora", lora_dropout=0.5, output_dir="lora")
    seen, encoders = [], []
    real_loss, real_encoder = losses.block_cosine, llm4rec.LLM4Rec.encoder

    def encoder(self, *values):
        encoders.append(self)
        return real_encoder(self, *values)

    def spy(theirs, own, how):
        guide = encoders[0]
        learns = any(p.requires_grad for p in guide.parameters())
        seen.append((theirs.requires_grad, guide.training, learns))
        assert own.requires_grad
        return real_loss(theirs, own, how)

    monkeypatch.setattr(llm4rec.LLM4Rec, "encoder", encoder)
    monkeypatch.setattr(losses, "block_cosine", spy)
    distill.main(**SHORT, teacher="lora", teacher_cache="off", output_dir="s")
    assert encoders[0].decoder.n_layers == 8
    assert seen == [(False,) * 3] * 3


def test_without_alignment_no_teacher_is_needed(inside):
    shutil.rmtree(inside / "output/demo/teacher")
    assert distill.main(**SHORT, **OFF, output_dir="ce")["steps"] == 3
    parts = {"exits", "align_cos", "align_norm", "teacher_ce"}
    assert parts.isdisjoint(json.loads(open("ce/metrics.jsonl").readline()))
    distill.main(**SHORT, **OFF, llama_decoder_nums_student=3, output_dir="three")
    distill.main(**SHORT | OFF | {"cls_multiple_lambda": 1.0}, output_dir="exits")
    assert "exits" in json.loads(open("exits/metrics.jsonl").readline())
    with pytest.raises(UsageError, match="output/demo/teacher: no teacher run there; finetune.py"):
        distill.main(**SHORT, output_dir="x")


def test_online_trains_both_and_saves_the_student(inside):
    shutil.rmtree(inside / "output/demo/teacher")
    flags = SHORT | {"distill_mode": "online", "llama_decoder_nums_teacher": 8, "logit_lambda": 0.5}
    results = distill.main(**flags, output_dir="online")
    parts = json.loads(open("online/metrics.jsonl").readline())
    total = sum(parts[name] for name in ("ce", "exits", "align_cos", "teacher_ce", "teacher_exits"))
    total += 0.1 * parts["align_norm"] + 0.5 * parts["logit_kl"]
    assert parts["total"] == pytest.approx(total, rel=1e-6)
    tensors, _ = checkpoint.load("online/best")
    assert {name.split(".")[0] for name in tensors} == {"student", "teacher"}
    again = distill.main(distill_mode="online", eval_only=True, output_dir="online")
    assert again["test"] == results["test"]
    assert distill.main(eval_only=True, output_dir="online")["test"] == results["test"]


def test_a_teacher_with_exits_allows_logit_kl_at_every_block(inside):
    finetune.main(**SHORT, cls_multiple_lambda=0.5, distill_block=2, output_dir="guide")
    assert "exits" in json.loads(open("guide/metrics.jsonl").readline())
    common = {"teacher": "guide", "logit_lambda": 1.0, "cls_multiple_lambda": 0.0}
    distill.main(**SHORT, **common, distill_block=2, output_dir="both")
    distill.main(**SHORT, **common, distill_block=4, output_dir="final")
    both, final = (checkpoint.load(f"{run}/best")[0] for run in ("both", "final"))
    assert {name for name in both if "exit" in name} == {"exit_heads.0.weight"}
    assert not {name for name in final if "exit" in name}


def test_ids_without_measure_are_refused_by_the_table_too(inside, monkeypatch):
    monkeypatch.setattr(item_table, "LARGEST_GIB", 1e-6)
    with refused("ids reach 160 for 160 items, an item table of 0.0 GiB; number the items from 0"):
        extract_emb.main()


def test_sampled_loss_trains_sasrec_and_the_same_seed_gives_the_same_bits(inside):
    weights = []
    last, more_negatives = {"train_targets": "last"}, {"num_negatives": 21}
    for run, more in (("one", {}), ("two", {}), ("three", last), ("four", more_negatives)):
        flags = SHORT | {"loss": "sampled", "num_negatives": 20} | more
        train_sr_trad.main(**flags, output_dir=run)
        weights.append(hashes(Path(run) / "best")["weights.safetensors"])
    assert weights[0] == weights[1] and len(set(weights)) == 3


def test_a_gap_in_the_ids_changes_no_metric(inside):
    """The same sequences with every id i replaced by 3 i + 7."""
    lists = [ids for _, ids, _ in read_histories(Path("data/demo.csv"))]
    write_sequences(Path("data/plain.csv"), lists)
    write_sequences(Path("data/gappy.csv"), [[3 * i + 7 for i in ids] for ids in lists])
    names = ("plain", "gappy")
    results = [train_sr_trad.main(**SHORT, domain_type=name) for name in names]
    assert results[0]["test"] == results[1]["test"] and results[0]["valid"] == results[1]["valid"]
    logs = [log_of(f"output/{name}/sasrec") for name in names]
    assert logs[0] == logs[1]
    teacher = []
    for name in names:
        extract_emb.main(domain_type=name)
        teacher.append(finetune.main(**SHORT, domain_type=name, llama_decoder_nums=2))
    assert teacher[0]["test"] == teacher[1]["test"]


def test_a_student_does_not_share_its_teachers_draws(inside):
    """At equal seeds: other new weights, another order of samples; the same seed gives the same."""
    still = SHORT | {"learning_rate": 1e-12, "llama_decoder_nums": 4, "log_steps": 1}
    finetune.main(**still, output_dir="t")
    del still["llama_decoder_nums"]
    for name in ("s", "again"):
        distill.main(**still, **OFF, output_dir=name)
    weights = {name: checkpoint.load(f"{name}/best")[0] for name in ("t", "s", "again")}
    for name in ("adapter.weight", "head.weight"):
        assert not torch.allclose(weights["t"][name], weights["s"][name], atol=1e-3)
        assert torch.equal(weights["s"][name], weights["again"][name])
    name = "decoder.llama.layers.0.mlp.up_proj.weight"  # the base's, for both
    assert torch.allclose(weights["t"][name], weights["s"][name], atol=1e-6)
    losses = [[line["ce"] for line in trained_lines(name)] for name in ("t", "s", "again")]
    assert losses[1] == losses[2] != losses[0]


def test_what_is_not_read_without_a_teacher_is_said(inside, capsys):
    unread = {"teacher": "t", "teacher_cache": "c", "distill_mode": "online", "distill_block": 2}
    distill.main(**SHORT, **OFF, **unread, llama_decoder_nums_teacher=4, output_dir="ce")
    printed = capsys.readouterr().out
    assert "base tiny, without a trained LLM teacher" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("without effect: ")]
    for name in unread | {"llama_decoder_nums_teacher": 4}:
        assert f"--{name}=" in line


def test_lora_on_a_base_that_is_trained_in_full_is_said(inside, capsys):
    flags = {"bf16": True, "gradient_checkpointing": True, "micro_batch_size": 8}
    flags |= {"llama_decoder_nums": 2, "lora_r": 4, "lora_dropout": 0.0, "tensorboard": True}
    finetune.main(**SHORT, **flags, output_dir="t")
    assert any(path.name.startswith("events") for path in Path("t/tensorboard").iterdir())
    said = "without effect: --lora_dropout, --lora_r (this base is trained in full)"
    assert said in capsys.readouterr().out
