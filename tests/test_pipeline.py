"""The four scripts on a shrunken demo: as subprocesses for the main road, in process for the side
roads.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import item_table
from datasets.demo import write_demo
from engine import checkpoint
from engine.errors import UsageError
from tests.conftest import SHORT, TARGETS, files, hashes, log_of, small_config, trained_lines

pytestmark = pytest.mark.slow
CHECKPOINT = ("weights.safetensors", "state.safetensors", "meta.json", "manifest.json")
RUN = {"config.json", "metrics.jsonl", "results.json", "ranks.npz"}
RUN |= {f"{kind}/{name}" for kind in ("best", "last") for name in CHECKPOINT}
BASE = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_exactly_these_files_are_written(house):
    folder, _ = house
    expected = {"data/demo.csv", "output/demo/sasrec_item.pkl", "output/demo/sasrec_item.json"}
    expected |= {
        f"output/demo/{step}/{name}" for step in ("sasrec", "teacher", "student") for name in RUN
    }
    expected |= {f"output/base/tiny/{name}" for name in BASE}
    (states,) = (folder / "output/demo/teacher_states").glob("[!.]*")
    expected |= {
        f"output/demo/teacher_states/{states.name}/{name}"
        for name in ("user.bin", "states.bin", "exits.bin", "meta.json")
    }
    assert files(folder) == expected


def test_results_and_logs_say_what_a_reader_needs(house):
    folder, printed = house
    for step in ("sasrec", "teacher", "student"):
        results = json.loads((folder / f"output/demo/{step}/results.json").read_text())
        assert (
            results["steps"] == 3
            and results["users"] == 120
            and results["parameters"] >= results["trainable_parameters"] > 0
        )
        assert set(results["test"]) == set(results["valid"]) == {"sampled", "full", "full_all"}
        assert set(results["test"]["full"]) == {
            "HR@1",
            "HR@5",
            "HR@10",
            "HR@20",
            "NDCG@5",
            "NDCG@10",
            "NDCG@20",
            "MRR",
        }
        assert results["candidates"]["fewest"] < results["candidates"]["asked"] == 999
        assert "all of them are used" in printed[step]
        assert f"test sampled  HR@1 {results['test']['sampled']['HR@1']:.4f}" in printed[step]
        assert results["random_base"] == (step != "sasrec")
    lines = [json.loads(line) for line in open(folder / "output/demo/student/metrics.jsonl")]
    parts = next(line for line in lines if line["event"] == "train")
    for part in ("ce", "exits", "align_cos", "align_norm", "teacher_ce", "total"):
        assert parts[part] > 0, part
    assert (
        "inherited from the teacher run in output/demo/teacher: max_seq_length 30, "
        in printed["student"]
    )


def test_eval_only_repeats_the_metrics_and_trains_nothing(inside):
    for step, module in (("sasrec", train_sr_trad), ("teacher", finetune), ("student", distill)):
        run = inside / f"output/demo/{step}"
        before = json.loads((run / "results.json").read_text())
        kept = hashes(run / "best") | hashes(run / "last")
        after = module.main(eval_only=True)
        assert hashes(run / "best") | hashes(run / "last") == kept
        for name in before.keys() - {"inference_seconds", "inference_users_per_second"}:
            assert after[name] == before[name], (step, name)


def test_eval_only_refuses_what_contradicts_the_run(inside):
    with pytest.raises(
        UsageError,
        match="--hid_dim=64 contradicts the sasrec run in output/demo/sasrec, which has 32",
    ):
        train_sr_trad.main(eval_only=True, hid_dim=64)
    with pytest.raises(
        UsageError, match="--num_candidates=50 contradicts the student run .*, which has 999"
    ):
        distill.main(eval_only=True, num_candidates=50)


def test_a_second_run_reads_the_first_and_overwrite_gives_the_same_bits(inside, capsys):
    kept = hashes(inside / "output/demo/teacher")
    results = finetune.main(**SHORT)
    printed = capsys.readouterr().out
    assert "output/demo/teacher holds this command's finished run" in printed
    assert f"test sampled  HR@1 {results['test']['sampled']['HR@1']:.4f}" in printed
    assert hashes(inside / "output/demo/teacher") == kept
    (inside / "output/demo/teacher/notes.txt").write_text("mine")
    finetune.main(**SHORT, overwrite=True)
    before = hashes(inside / "output/demo/teacher/best")
    finetune.main(**SHORT, overwrite=True)
    after = hashes(inside / "output/demo/teacher/best")
    assert after["weights.safetensors"] == before["weights.safetensors"]
    assert (inside / "output/demo/teacher/notes.txt").exists()


def test_the_teacher_is_never_written_to(inside):
    before = hashes(inside / "output/demo/teacher") | hashes(inside / "output/base/tiny")
    distill.main(**SHORT, overwrite=True)
    assert hashes(inside / "output/demo/teacher") | hashes(inside / "output/base/tiny") == before


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


def test_no_step_takes_over_another_steps_folder(inside):
    before = hashes(inside / "output/demo/teacher")
    with pytest.raises(
        UsageError, match="output/demo/teacher holds a teacher run, not a student run"
    ):
        distill.main(**SHORT, output_dir="output/demo/teacher", overwrite=True)
    with pytest.raises(UsageError, match="holds a teacher run, not a sasrec run"):
        train_sr_trad.main(**SHORT, output_dir="output/demo/teacher", overwrite=True)
    assert hashes(inside / "output/demo/teacher") == before
    with pytest.raises(
        UsageError, match="--teacher=output/demo/student holds a student run, expected a teacher"
    ):
        distill.main(**SHORT, teacher="output/demo/student", output_dir="x")


def test_a_replaced_table_is_noticed(inside):
    Path("output/demo/sasrec_item.pkl").write_bytes(
        Path("output/demo/sasrec_item.pkl").read_bytes() + b" "
    )
    with pytest.raises(UsageError, match="is not the table that .*sasrec_item.json describes"):
        finetune.main(**SHORT, overwrite=True)


def test_without_alignment_no_teacher_is_needed(inside):
    shutil.rmtree(inside / "output/demo/teacher")
    off = {"distill_lambda": 0.0, "norm_lambda": 0.0}
    results = distill.main(**SHORT, **off, cls_multiple_lambda=0.0, output_dir="ce")
    lines = [json.loads(line) for line in open("ce/metrics.jsonl")]
    assert {"exits", "align_cos", "align_norm", "teacher_ce"}.isdisjoint(lines[0])
    assert results["steps"] == 3
    distill.main(
        **SHORT, **off, cls_multiple_lambda=0.0, llama_decoder_nums_student=3, output_dir="three"
    )
    distill.main(**SHORT, **off, output_dir="exits")
    assert "exits" in json.loads(open("exits/metrics.jsonl").readline())
    with pytest.raises(
        UsageError, match="--teacher=output/demo/teacher: no teacher run there; finetune.py makes"
    ):
        distill.main(**SHORT, output_dir="x")


def test_online_trains_both_and_saves_the_student(inside):
    shutil.rmtree(inside / "output/demo/teacher")
    results = distill.main(
        **SHORT,
        distill_mode="online",
        llama_decoder_nums_teacher=8,
        logit_lambda=0.5,
        output_dir="online",
    )
    parts = json.loads(open("online/metrics.jsonl").readline())
    assert {
        "ce",
        "exits",
        "align_cos",
        "align_norm",
        "logit_kl",
        "teacher_ce",
        "teacher_exits",
    } <= set(parts)
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
    heads = {
        run: {name for name in checkpoint.load(f"{run}/best")[0] if "exit" in name}
        for run in ("both", "final")
    }
    assert heads == {"both": {"exit_heads.0.weight"}, "final": set()}


def test_a_contradiction_with_the_teacher_is_refused_naming_both(inside):
    with pytest.raises(
        UsageError,
        match="--max_seq_length=20 contradicts the teacher run in .*/teacher, which has 30",
    ):
        distill.main(max_seq_length=20, overwrite=True)
    with pytest.raises(UsageError, match="--base_model=small contradicts .*, which has tiny"):
        distill.main(base_model="small", overwrite=True)
    with pytest.raises(
        UsageError, match="--llama_decoder_nums_teacher=4 contradicts .*, which has 8"
    ):
        distill.main(llama_decoder_nums_teacher=4, overwrite=True)


def test_a_damaged_note_and_ids_without_measure_are_one_line(inside, monkeypatch):
    monkeypatch.setattr(item_table, "LARGEST_GIB", 1e-6)
    with pytest.raises(
        UsageError,
        match="ids reach 160 for 160 items, an item table of 0.0 GiB; number the items from 0",
    ):
        extract_emb.main()
    Path("output/demo/sasrec_item.json").write_text("{")
    with pytest.raises(UsageError, match="sasrec_item.json: damaged, not JSON"):
        finetune.main(overwrite=True)


def test_another_domain_or_table_is_refused(inside):
    write_demo("data/other.csv", n_users=100, n_items=160, seed=1)
    with pytest.raises(
        UsageError, match="sasrec_item.pkl was extracted from data with sha256 .*data/other.csv has"
    ):
        finetune.main(domain_type="other", item_table="output/demo/sasrec_item.pkl")
    with pytest.raises(UsageError, match="its data_sha256 is .*, data/other.csv has"):
        extract_emb.main(domain_type="other", sasrec="output/demo/sasrec")
    train_sr_trad.main(**SHORT, seed=5, overwrite=True)
    extract_emb.main()
    with pytest.raises(
        UsageError,
        match="output/demo/teacher was made from another file: its table_sha256 is .*"
        "output/demo/sasrec_item.pkl has",
    ):
        distill.main(overwrite=True)


@pytest.mark.parametrize("lost", ["lora_A", "adapter"])
def test_a_teacher_that_lacks_trained_weights_is_refused(inside, lost):
    finetune.main(**SHORT, train_strategy="lora", output_dir="lora")
    tensors, meta = checkpoint.load("lora/best")
    kept = {name: tensor for name, tensor in tensors.items() if lost not in name}
    assert len(kept) < len(tensors)
    checkpoint.save("lora/best", kept, meta)
    with pytest.raises(UsageError, match=f"does not fit the model: lacks .*{lost}"):
        distill.main(**SHORT, teacher="lora", overwrite=True)


def test_lora_trains_and_saves_adapters_only(inside):
    finetune.main(**SHORT, train_strategy="lora", output_dir="lora")
    names = set(checkpoint.load("lora/best")[0])
    assert names and all(
        "lora_" in name or name.startswith(("adapter.", "head.")) for name in names
    )
    assert len([name for name in names if "lora_A" in name]) == 8 * len(TARGETS)


def test_a_folder_saved_by_llama_for_causal_lm_is_a_base(inside):
    """Any LlamaForCausalLM folder with a fast tokenizer, grouped-query attention and half precision
    on disk.
    """
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(small_config(layers=6, kv_heads=2, vocab_size=400)).to(
        torch.bfloat16
    ).save_pretrained("my base")
    PreTrainedTokenizerFast(tokenizer_file="output/base/tiny/tokenizer.json").save_pretrained(
        "my base"
    )
    common = {**SHORT, "bf16": False}
    finetune.main(
        **common,
        base_model="./my base",
        llama_decoder_nums=4,
        layer_selection="interval",
        interval_nums=2,
        output_dir="t",
    )
    config = json.loads(Path("t/config.json").read_text())
    assert (
        config["model"]["layers"] == [0, 1, 3, 4]
        and config["model"]["strategy"] == "lora"
        and not config["random_base"]
    )
    assert len(config["model"]["prompt_ids"]) == 62
    distill.main(
        **common, teacher="t", llama_decoder_nums_student=2, distill_block=2, output_dir="s"
    )
    tensors = load_file("my base/model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1" not in name},
        "my base/model.safetensors",
    )
    with pytest.raises(UsageError, match="is another base than the one that the run was"):
        distill.main(eval_only=True, output_dir="s")


def test_prefixes_as_training_targets_and_interval_flags_reach_the_model(inside):
    finetune.main(**SHORT, train_targets="all", llama_decoder_nums=2, output_dir="all")
    train_sr_trad.main(**SHORT, train_targets="last", norm="pre", output_dir="last")
    assert json.loads(Path("last/config.json").read_text())["flags"]["norm"] == "pre"


def test_sampled_loss_trains_sasrec_and_the_same_seed_gives_the_same_bits(inside):
    for run in ("one", "two"):
        train_sr_trad.main(**SHORT, loss="sampled", num_negatives=20, output_dir=run)
    train_sr_trad.main(**SHORT, loss="sampled", num_negatives=21, output_dir="three")
    train_sr_trad.main(
        **SHORT, loss="sampled", num_negatives=20, train_targets="last", output_dir="four"
    )
    weights = [
        hashes(Path(run) / "best")["weights.safetensors"] for run in ("one", "two", "three", "four")
    ]
    assert weights[0] == weights[1] and len(set(weights)) == 3


def test_bfloat16_and_checkpointing_and_micro_batches_run(inside):
    finetune.main(
        **SHORT,
        bf16=True,
        gradient_checkpointing=True,
        micro_batch_size=8,
        llama_decoder_nums=2,
        tensorboard=True,
        output_dir="b",
    )
    assert any(path.name.startswith("events") for path in Path("b/tensorboard").iterdir())


def test_a_gap_in_the_ids_changes_no_metric(inside):
    """The same sequences with every id i replaced by 3 i + 7."""
    import csv

    csv.field_size_limit(2**31 - 1)
    rows = list(csv.DictReader(open("data/demo.csv")))
    with open("data/gappy.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["reviewerID", "asin"])
        writer.writerows(
            [row["reviewerID"], json.dumps([3 * i + 7 for i in json.loads(row["asin"])])]
            for row in rows
        )
    results = [
        train_sr_trad.main(**SHORT, domain_type=domain, overwrite=True)
        for domain in ("demo", "gappy")
    ]
    assert results[0]["test"] == results[1]["test"] and results[0]["valid"] == results[1]["valid"]
    logs = [log_of(f"output/{domain}/sasrec") for domain in ("demo", "gappy")]
    assert logs[0] == logs[1]
    extract_emb.main(domain_type="gappy")
    teacher = [finetune.main(**SHORT, domain_type="gappy", llama_decoder_nums=2)]
    extract_emb.main()
    teacher.append(finetune.main(**SHORT, llama_decoder_nums=2, overwrite=True))
    assert teacher[0]["test"] == teacher[1]["test"]


def test_a_student_does_not_share_its_teachers_draws(inside):
    """At equal seeds: other new weights, another order of samples; the same seed gives the same."""
    still = SHORT | {"learning_rate": 1e-12, "llama_decoder_nums": 4, "log_steps": 1}
    finetune.main(**still, output_dir="t")
    del still["llama_decoder_nums"]
    off = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
    for name in ("s", "again"):
        distill.main(**still, **off, output_dir=name)
    weights = {name: checkpoint.load(f"{name}/best")[0] for name in ("t", "s", "again")}
    for name in ("adapter.weight", "head.weight"):
        assert not torch.allclose(weights["t"][name], weights["s"][name], atol=1e-3)
        assert torch.equal(weights["s"][name], weights["again"][name])
    name = "decoder.llama.layers.0.mlp.up_proj.weight"  # the base's, for both
    assert torch.allclose(weights["t"][name], weights["s"][name], atol=1e-6)
    losses = [[line["ce"] for line in trained_lines(name)] for name in ("t", "s", "again")]
    assert losses[1] == losses[2] != losses[0]


def test_what_is_not_read_without_a_teacher_is_said(inside, capsys):
    off = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
    unread = {"teacher": "t", "teacher_cache": "c", "distill_mode": "online", "distill_block": 2}
    distill.main(**SHORT, **off, **unread, llama_decoder_nums_teacher=4, output_dir="ce")
    printed = capsys.readouterr().out
    assert "base tiny, without a trained teacher" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("without effect: ")]
    for name in unread | {"llama_decoder_nums_teacher": 4}:
        assert f"--{name}=" in line


def test_lora_on_a_base_that_is_trained_in_full_is_said(inside, capsys):
    finetune.main(**SHORT, llama_decoder_nums=2, lora_r=4, lora_dropout=0.0, output_dir="t")
    said = "without effect: --lora_dropout, --lora_r (this base is trained in full)"
    assert said in capsys.readouterr().out


def test_the_room_of_other_teachers_states_is_said(inside, capsys):
    distill.main(**SHORT, train_targets="all", output_dir="s")
    assert "teacher states: 1 other folders in output/demo/teacher_states take 0.00 GiB" in (
        capsys.readouterr().out
    )
