"""What people of this field run into, and each kind of mistake behind it.

Inputs are made here. A case is refused in one line that names what was seen, or gives the right
value; advice that a message gives is followed.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import process, sequences
from datasets.domain import Domain
from datasets.interactions import read_csv
from datasets.item_table import check_size
from engine.errors import RunError, UsageError
from tests.conftest import OFF, SHORT, hashes, refused, save, stop_at_step, write_sequences

LISTS = [[i % 7 + 1, i % 5 + 8, i % 11 + 13, i % 3 + 24, i + 30] for i in range(40)]


def changed_base(change):
    """A copy of the tiny base whose tensors `change` edits in place."""
    folder = Path(shutil.copytree("output/base/tiny", "my base"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return {"base_model": "./my base", "llama_decoder_nums": 4, "output_dir": "new"}


def quantised(kind, scale):
    def change(tensors):
        name = "layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(kind)
        if scale:
            tensors["layers.1.mlp.up_proj.weight_scale"] = torch.ones(1)

    return change


def with_lora(layer):
    def change(tensors):
        tensors[f"layers.{layer}.mlp.up_proj.lora_A.default.weight"] = torch.ones(2, 64)

    return change


FLOAT8, BIAS = torch.float8_e4m3fn, {"layers.0.mlp.gate.bias": torch.ones(3)}
UNREAD = [
    (quantised(torch.bfloat16, scale=True), "has 1 more tensors .*: the weights are quantised"),
    (quantised(FLOAT8, scale=False), "up_proj.weight is F8_E4M3, quantised"),
    (quantised(torch.int8, scale=False), "up_proj.weight is I8, quantised; use the check"),
    (with_lora(2), "lora_A.default.weight: LoRA is not merged; merge it into the weights"),
    (lambda tensors: tensors.update(BIAS), "gate.bias: nothing here reads"),
]


@pytest.mark.parametrize("change, line", UNREAD)
def test_a_tensor_of_a_kept_layer_that_nothing_reads_is_refused(inside, change, line):
    flags = changed_base(change)
    before = hashes(Path("."))
    with pytest.raises(UsageError, match=f"--base_model=./my base: .*{line}"):
        finetune.main(**SHORT, **flags)
    assert hashes(Path(".")) == before


def test_what_is_not_needed_may_be_there(inside):
    """LoRA of a layer that is not kept, stored rotary frequencies, a language model's head."""

    def change(tensors):
        with_lora(6)(tensors)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = torch.ones(3, 64)

    assert finetune.main(**SHORT, **changed_base(change))["steps"] == 3


@pytest.mark.parametrize(
    "entry, value, line",
    [
        (
            "quantization_config",
            {"quant_method": "awq"},
            r"is quantised \(awq\); its scales are not",
        ),
        (
            "attention_dropout",
            0.1,
            "attention_dropout is 0.1, and nothing here applies it; write 0",
        ),
    ],
)
def test_a_config_that_says_more_than_is_read_is_refused(inside, entry, value, line):
    flags, path = changed_base(lambda tensors: None), Path("my base/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(UsageError, match=line):
        finetune.main(**SHORT, **flags)


def test_an_exchanged_base_is_refused_by_name(inside):
    """By --eval_only of a LoRA run, by distill.py's LoRA teacher, when resuming."""
    flags = changed_base(lambda tensors: None) | {"train_strategy": "lora", "output_dir": "lora"}
    result = finetune.main(**SHORT, **flags)
    assert finetune.main(eval_only=True, output_dir="lora")["test"] == result["test"]
    distill.main(**SHORT, teacher="lora", output_dir="s")  # its states are on disk now
    weights = load_file("my base/model.safetensors")
    weights["layers.2.mlp.up_proj.weight"] *= 1.5  # the same names and sizes
    save_file(weights, "my base/model.safetensors")
    line = "--base_model=./my base: .* is another base than the one that the run was trained on"
    with pytest.raises(UsageError, match=line):
        finetune.main(eval_only=True, output_dir="lora")
    for cache in ("auto", "off"):
        with pytest.raises(UsageError, match=line):
            distill.main(**SHORT, teacher="lora", teacher_cache=cache, seed=1, output_dir="t")
    start = {"teacher": "lora", "student_init": "teacher", "train_strategy": "lora"}
    with pytest.raises(UsageError, match=line):
        distill.main(**SHORT, **OFF, **start, llama_decoder_nums_student=2, output_dir="t")


MEANING = {
    "zeros at the end": ([ids + [0] * (9 - len(ids)) for ids in LISTS], "at the end of 40 of 40"),
    "zeros at the start": ([[0, 0, 0, *ids] for ids in LISTS], "at the start of 40 of 40 lists"),
    "some padded": ([*LISTS[:30], *[ids + [0, 0] for ids in LISTS[30:]]], "end of 10 of 40 lists"),
    "padded with N + 1": ([(ids + [99] * 4)[: 5 + ids[4] % 4] for ids in LISTS], "item 99"),
    "one zero before all": ([[0, *ids] for ids in LISTS], "item 0 appears at the start of 40 of"),
    "one item": ([[7, 7, 7, 7]] * 12, "item 7 is the only one"),
    "one target": ([[*ids, 99] for ids in LISTS], "item 99 appears at the end of 40 of 40 lists"),
}


@pytest.mark.parametrize("name", MEANING)
def test_valid_form_with_an_impossible_meaning_is_refused(tmp_path, name):
    lists, line = MEANING[name]
    path = write_sequences(tmp_path / "d.csv", lists)
    with pytest.raises(UsageError, match=line):
        read_csv(path)


def test_zero_is_an_item_where_it_is_said(tmp_path):
    path = write_sequences(tmp_path / "d.csv", [[0, 0, 0, *ids] for ids in LISTS])
    assert read_csv(path, ends_are_items=True).item_ids[0] == 0
    write_sequences(tmp_path / "e.csv", [[0, *ids, 0] for ids in LISTS[:9]] + LISTS)
    assert read_csv(tmp_path / "e.csv").item_ids[0] == 0  # no runs
    domain = Domain("f", str(write_sequences(tmp_path / "f.csv", MEANING["some padded"][0])))
    for name in ("0", "SKU-7"):  # of the item in its items.csv
        save(tmp_path / "f.items.csv", "item_id,asin,title", f"0,{name},")
        with pytest.raises(UsageError) if name == "0" else nullcontext():
            domain.read()


def test_what_was_said_of_the_ends_holds_in_later_steps(tmp_path, monkeypatch, inside):
    write_sequences(Path("data/zero.csv"), [[0, 0, *ids] for ids in LISTS])
    short = SHORT | {"domain_type": "zero"}
    with pytest.raises(UsageError, match="or say --ends_are_items if it is meant"):
        train_sr_trad.main(**short)
    train_sr_trad.main(**short, ends_are_items=True)
    extract_emb.main(domain_type="zero")
    finetune.main(**short)
    distill.main(**short)


def test_a_default_that_is_given_is_another_run_where_it_would_adapt(inside):
    with pytest.raises(UsageError, match=r"--warmup_steps=50 \(not in the run\)"):
        finetune.main(**SHORT, warmup_steps=50)
    finetune.main(**SHORT, warmup_steps=50, output_dir="given")
    assert finetune.main(**SHORT, warmup_steps=50, output_dir="given")["steps"] == 3
    with pytest.raises(UsageError, match=r"no --warmup_steps \(the run has 50\)"):
        finetune.main(**SHORT, output_dir="given")


def test_of_two_files_of_a_domain_the_one_that_is_read_is_named(inside, capsys):
    shutil.copyfile("data/demo.csv", "data/demo.csv.gz")
    train_sr_trad.main(eval_only=True)
    assert "reading data/demo.csv; not read: data/demo.csv.gz" in capsys.readouterr().out


def test_ids_of_nine_digits_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = [[item * 10_000_019 for item in ids] for ids in LISTS]
    path = write_sequences(tmp_path / "data/far.csv", lists)
    with pytest.raises(UsageError, match=r"far.csv: ids reach \d+ for .* GiB; number the items"):
        train_sr_trad.main(domain_type="far", **SHORT)
    assert not Path("output").exists()
    ids = np.array([5, 600_000])  # .3 GiB, nearly all gaps
    check_size(path, ids, 128)
    with pytest.raises(UsageError, match="number the items from 0"):
        check_size(path, ids * 4, 128)


def test_short_users_count_in_popularity_and_train_sasrec(tmp_path):
    """Users of 4, 3, 2 and 1 items; ids 1..6 are indices 0..5."""
    lists = [[1, 2, 3, 4], [5, 5, 6], [2, 5], [6]]
    data = read_csv(write_sequences(tmp_path / "d.csv", lists))
    assert data.n_users == 1 and data.n_short == 3
    # before the validation target: 1, 2; of short users everything: 5 5 6, 2 5, 6
    assert sequences.popularity(data).tolist() == [1, 2, 0, 0, 3, 2]
    samples = sequences.training_samples(data, "last", 3, every_position=True)
    every = np.arange(len(samples))
    assert samples.histories(every).tolist() == [[6, 6, 0], [6, 4, 4], [6, 6, 1]]
    assert samples.shifted_targets(every).tolist() == [[6, 6, 1], [6, 4, 5], [6, 6, 4]]
    assert samples.users(every) == ["u0", "a short user", "a short user"]
    assert len(sequences.training_samples(data, "last", 3)) == 1
    assert len(sequences.training_samples(data, "all", 3)) == 1


def reviews_of_one_day(path: Path) -> Path:
    """30 users with 6 items each on one day, the file in item order."""
    rows = []
    rng = np.random.default_rng(0)
    for user in range(30):
        for item in sorted(rng.choice(40, 6, replace=False)):
            rows.append({"reviewerID": f"U{user}", "asin": f"B{item:03}", "overall": 5.0})
            rows[-1]["unixReviewTime"] = 86400
    rows.sort(key=lambda row: row["asin"])
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rising(path: Path) -> float:
    """Share of neighbouring items whose number rises."""
    data = read_csv(path)
    steps = [np.diff(items) for items in np.split(data.items, data.offsets[1:-1])]
    return float((np.concatenate(steps) > 0).mean())


def test_reviews_of_one_day_stand_in_an_order_that_says_nothing(tmp_path, capsys):
    reviews = str(reviews_of_one_day(tmp_path / "r.json"))
    common = {"reviews": reviews, "min_item": 1, "output_dir": str(tmp_path)}
    process.main(domain_type="file", ties="file", **common)
    told = "100.0% of a user's neighbouring reviews share a time: in file order"
    assert told in capsys.readouterr().out
    process.main(domain_type="hash", **common)
    process.main(domain_type="again", **common)
    process.main(domain_type="other", tie_seed=1, **common)
    assert rising(tmp_path / "file.csv") == 1.0  # the next item is the larger one
    assert rising(tmp_path / "hash.csv") == pytest.approx(0.5, abs=0.12)
    texts = [(tmp_path / f"{name}.csv").read_text() for name in ("hash", "again", "other")]
    assert texts[0] == texts[1] != texts[2]


def test_the_filter_that_left_nothing_is_named(tmp_path):
    path = reviews_of_one_day(tmp_path / "r.json")
    common = {"reviews": str(path), "domain_type": "x", "output_dir": str(tmp_path)}
    path.write_text(path.read_text().replace('"overall": 5.0', '"overall": 1'))
    with refused("nothing is left of 180 rows; lower --min_rating"):
        process.main(**common)
    process.main(**common, min_rating=1, min_item=1)
    for flag, stage in (("min_user", "users with >= 99"), ("min_length", "sequences of >=")):
        with pytest.raises(UsageError, match=f"'{stage}.*'; lower --{flag}"):
            process.main(**common, min_rating=1, overwrite=True, **{"min_item": 1, flag: 99})


# -- advice that the next command takes ---------------------------------------------------------


@pytest.mark.parametrize("after", [1, 4])
def test_advice_when_memory_runs_out(inside, monkeypatch, after):
    """Before and after the first checkpoint: the same command with a lower --micro_batch_size."""
    flags = SHORT | {"max_steps": 6, "save_steps": 3, "output_dir": "run"}
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        stop_at_step(patch, after, torch.OutOfMemoryError("CUDA out of memory"))
        finetune.main(**flags)
    results = finetune.main(**flags | {"micro_batch_size": 8, "eval_batch_size": 32})
    assert results["steps"] == 6


def test_advice_when_the_data_has_grown(inside):
    """The first refusal names the whole road, and it works."""
    with open("data/demo.csv", "a") as file:
        file.write('new,"[1, 2, 3, 4, 5]","[]"\n')
    with pytest.raises(UsageError, match="sasrec_item.pkl was made from another file") as error:
        finetune.main(**SHORT)
    road = "train_sr_trad.py --overwrite, extract_emb.py, then the others with --overwrite"
    assert road in str(error.value)
    with pytest.raises(UsageError, match=f"its data_sha256 is .* in order: {road}"):
        extract_emb.main()
    train_sr_trad.main(**SHORT, overwrite=True)
    extract_emb.main()
    finetune.main(**SHORT, overwrite=True)
    with pytest.raises(UsageError, match="holds a finished run from something else.* --overwrite"):
        distill.main(**SHORT)
    assert distill.main(**SHORT, overwrite=True)["users"] == 121


def test_advice_when_a_folder_is_taken(inside, monkeypatch):
    with pytest.raises(UsageError, match="choose another folder, or --overwrite starts from scrat"):
        finetune.main(**SHORT, seed=9)
    finetune.main(**SHORT, seed=9, output_dir="another")
    finetune.main(**SHORT, seed=9, overwrite=True)
    flags = SHORT | {"save_steps": 1, "output_dir": "unfinished"}
    with monkeypatch.context() as patch, pytest.raises(RunError):
        stop_at_step(patch, 2)
        finetune.main(**flags)
    with pytest.raises(UsageError, match="give its flags to resume it, or --overwrite starts"):
        finetune.main(**flags, seed=9)
    assert finetune.main(**flags)["seed"] == 42
    assert finetune.main(**flags, seed=9, overwrite=True)["seed"] == 9


THREE = {"cls_multiple_lambda": 1.0, "distill_block": 3}
ADVICE = [
    ({"max_seq_length": 5000}, "lower --max_seq_length", {"max_seq_length": 20}),
    ({"batch_size": 30, "micro_batch_size": 7}, "is not a multiple", {"micro_batch_size": 6}),
    ({"prompt_template_name": "x"}, "available: alpaca", {"prompt_template_name": "alpaca"}),
    (THREE, "use one of 2, 4, 8", {"distill_block": 2}),
    ({"device": "cuda"}, "use --device=cpu", {"device": "cpu"}),
]


@pytest.mark.parametrize("flags, advice, mended", ADVICE)
def test_advice_about_a_flag(inside, flags, advice, mended):
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UsageError, match=advice):
        finetune.main(**SHORT | flags, output_dir="new")
    assert finetune.main(**SHORT | flags | mended, output_dir="new")["steps"] == 3
