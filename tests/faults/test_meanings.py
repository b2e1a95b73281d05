"""Numbers that are other items elsewhere, tables of another kind, and files that must stay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import extract_emb
import finetune
import train_sr_trad
from datasets import convert
from datasets.items import Finder, Items, read_items
from engine import cli
from engine.errors import RunError, UsageError
from serving import recommend
from tests.conftest import SHORT, hashes
from tests.faults.conftest import TRAIN, convert_by
from utils import training


def top(**flags) -> list[int]:
    return [row["item_id"] for row in recommend.main(domain_type="x", model="sasrec", **flags)]


def listed(**flags) -> pd.DataFrame:
    recommend.main(domain_type="x", model="sasrec", output="o.csv", overwrite=True, **flags)
    return pd.read_csv("o.csv", dtype={"asin": str})


def test_ids_of_a_list_beside_an_items_csv_are_mapped_once(shop):
    Path("one.csv").write_text('reviewerID,asin\nn,"[5, 6]"\n')
    shutil.copy("data/x.items.csv", "one.items.csv")
    own = top(history=["5", "6"], by="id", k=3)
    for by in ("id", "auto", "asin"):
        assert listed(users="one.csv", by=by, k=3)["item_id"].tolist() == own


def test_without_its_items_csv_a_run_knows_what_its_numbers_mean(shop):
    before = top(history=["105", "106"], k=3)
    Path("data/x.items.csv").unlink()
    assert top(history=["105", "106"], k=3) == before
    assert listed(users="orders.csv", k=1)["asin"].isin([str(n) for n in range(100, 108)]).all()


def test_runs_beside_other_items_csv_are_of_other_items(shop):
    shutil.copytree("output/x", "a")
    names = Path("data/x.items.csv")
    names.write_text(names.read_text().replace(",10", ",20"))
    with pytest.raises(UsageError, match="items_sha256|items.csv"):
        extract_emb.main(domain_type="x", sasrec="a/sasrec", item_table="t.pkl")
    with pytest.raises(UsageError, match="items_sha256|items.csv"):
        train_sr_trad.main(**TRAIN, domain_type="x", init_from="a/sasrec", output_dir="from_a")
    train_sr_trad.main(**TRAIN, domain_type="x", output_dir="b/sasrec")
    with pytest.raises(UsageError, match="different items.csv|another item there"):
        recommend.main(domain_type="x", model="a/sasrec,b/sasrec", history=["200"])


def test_users_of_a_file_of_lists_are_named_as_those_of_a_log(shop):
    asked = {"domain_type": "x", "users": "l.jsonl", "output": "o.csv", "known": "join", "k": 1}
    Path("l.jsonl").write_text(json.dumps({"reviewerID": " u0 ", "asin": ["100"]}) + "\n")
    recommend.main(**asked)
    joined = pd.read_csv("o.csv")
    assert joined["reviewerID"].tolist() == ["u0"]
    history = [*convert_by("--input orders.csv")[0]["u0"], "100"]
    best = recommend.main(domain_type="x", history=history, k=1)
    assert joined["item_id"].tolist() == [best[0]["item_id"]]
    timed = {"reviewerID": "n", "asin": ["100", "101", "102"], "time": [3, 1, 2]}
    Path("l.jsonl").write_text(json.dumps(timed) + "\n")
    recommend.main(**asked, overwrite=True)
    best = recommend.main(domain_type="x", history=["101", "102", "100"], k=1)
    assert pd.read_csv("o.csv")["score"].tolist() == [pytest.approx(best[0]["score"], rel=1e-5)]
    Path("l.jsonl").write_text(json.dumps({"reviewerID": None, "asin": ["100"]}) + "\n")
    with pytest.raises(UsageError, match="l.jsonl: row 1: the user is missing"):
        recommend.main(**asked, overwrite=True)


def test_folders_may_have_commas_and_damaged_runs_are_named_or_left_out(shop):
    run = Path("output/x/sasrec")
    shutil.copytree(run, "a, b")
    assert recommend.main(domain_type="x", model="a, b", history=["100"], k=1)
    assert extract_emb.main(domain_type="x", sasrec="a, b", item_table="t.pkl")
    shutil.copytree(run, "output/x/other")
    Path("output/x/other/results.json").write_text('{"steps": 20}')
    assert recommend.main(domain_type="x", history=["100"], k=1)
    for flags in ([1], {}, {"max_seq_length": "x"}):
        Path("a, b/config.json").write_text(json.dumps({"step": "sasrec", "flags": flags}))
        with pytest.raises(UsageError, match="a, b/config.json: damaged, its flags lack"):
            recommend.main(domain_type="x", model="a, b", history=["100"])


def test_a_denied_title_leaves_out_every_item_that_has_it(tmp_path):
    items = Items(np.arange(4), ["a", "b", "c", "d"], ["Shirt", "Hat", "shirt", "Sock"])
    (tmp_path / "deny.txt").write_text("Shirt\nd\n")
    assert read_items(tmp_path / "deny.txt", Finder(items, "auto"), "--deny") == [0, 2, 3]


def test_titles_with_commas_and_brackets_are_found():
    items = Items(np.arange(3), ["11", "10", "12"], ["Seven (Se7en)", "Usual Suspects, The", "Se7"])
    finder = Finder(items, "auto")
    given = cli._split("Seven (Se7en),Usual Suspects, The")
    assert finder.find_joined(given, "x") == [0, 1]
    assert cli._split("[a, b]") == ["a", "b"] and cli._split("Seven (Se7en)") == ["Seven (Se7en)"]
    with pytest.raises(UsageError, match=r"did you mean 'Seven \(Se7en\)' \(11\)"):
        finder.find("Seven (Sen)", "x")


def test_every_tensor_of_a_base_counts_in_its_fingerprint(inside):
    base = Path(shutil.copytree("output/base/tiny", "my base"))
    flags = {"base_model": "./my base", "train_strategy": "lora", "output_dir": "lora"}
    finetune.main(**SHORT, **flags)
    original = (base / "model.safetensors").read_bytes()
    for name in load_file(base / "model.safetensors"):
        weights = load_file(base / "model.safetensors")
        weights[name] = weights[name] * -3 + 1
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        if "embed" not in name and int(name.split(".")[1] if "layers" in name else 0) < 8:
            with pytest.raises(UsageError, match="is another base"):
                finetune.main(eval_only=True, output_dir="lora")
        (base / "model.safetensors").write_bytes(original)


@pytest.mark.parametrize("change", ["a row of padding", "transposed"])
def test_a_table_of_ones_own_with_other_rows_than_ids_is_refused(inside, change):
    table = torch.rand(200, 161).T if change == "transposed" else torch.rand(161, 128)
    own = table.T if change == "transposed" else torch.cat([torch.rand(1, 128), table])
    torch.save({"item_embedding": own}, "own.pkl")
    with pytest.raises(UsageError, match="own.pkl: .* no id is above 160: row i must be item id i"):
        finetune.main(**SHORT, item_table="own.pkl", output_dir="t")
    with pytest.raises(UsageError, match="own.pkl: .* no id is above 160: row i must be item id i"):
        train_sr_trad.main(**SHORT, emb_dim=own.shape[1], init_table="own.pkl", output_dir="t")


def test_files_that_are_read_or_belong_to_a_run_are_not_replaced(shop):
    Path("u").mkdir()
    shutil.copy("orders.csv", "u/a.csv")
    shutil.copytree("output/x/sasrec", "run")
    before = hashes(Path("."))
    for flags, line in (
        ({"users": "u", "output": "u/a.csv"}, "is in a folder that is read"),
        ({"users": "orders.csv", "output": "run/items.csv"}, "in the folder of a run"),
    ):
        with pytest.raises(UsageError, match=line):
            recommend.main(domain_type="x", model="sasrec", overwrite=True, **flags)
    with pytest.raises(UsageError, match="--output_dir=u is the folder that is read"):
        convert.main(input="u", domain_type="a", output_dir="u", overwrite=True)
    Path("mine.pkl").write_bytes(b"mine")
    for notes in ("{}", '{"text_model": "titles\'", "data_sha256": "d"}'):
        Path("mine.json").write_text(notes)
        with pytest.raises(UsageError, match="mine.pkl: mine.pkl is there, and not written by th"):
            extract_emb.main(domain_type="x", item_table="mine.pkl")
    Path("mine.pkl").unlink()
    with pytest.raises(UsageError, match="mine.pkl: mine.json is there, and not written by this"):
        extract_emb.main(domain_type="x", item_table="mine.pkl")
    Path("mine.json").unlink()
    assert hashes(Path(".")) == before


def test_a_folder_of_other_runs_is_no_runs_folder(shop):
    with pytest.raises(UsageError, match=r"=output/x holds other runs \(sasrec\); name"):
        train_sr_trad.main(**TRAIN, domain_type="x", output_dir="output/x")


def test_a_link_stays_a_link(shop):
    Path("shared").mkdir()
    Path("shared/o.csv").write_text("old")
    Path("o.csv").symlink_to("shared/o.csv")
    listed(users="orders.csv", k=1)
    assert Path("o.csv").is_symlink() and "old" not in Path("shared/o.csv").read_text()


def test_a_run_that_fails_leaves_the_one_that_it_was_to_replace(shop, monkeypatch):
    before = hashes(Path("output/x/sasrec"))
    with pytest.raises(RunError, match="not finite.*; the run that was there is back"):
        train_sr_trad.main(**TRAIN, domain_type="x", overwrite=True, learning_rate=1e30)
    assert hashes(Path("output/x/sasrec")) == before
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(training, "evaluate", lambda *_, **__: 1 / 0)
        train_sr_trad.main(**TRAIN, domain_type="x", overwrite=True)
    assert hashes(Path("output/x/sasrec")) == before
    assert train_sr_trad.main(**TRAIN, domain_type="x")["steps"] == 4


def test_a_run_that_replaces_another_leaves_nothing_of_it(shop):
    train_sr_trad.main(**TRAIN | {"max_steps": 2}, domain_type="x", overwrite=True)
    assert not Path("output/x/sasrec/.replaced").exists()


@pytest.mark.parametrize("place", ["engine.run.write_json", "utils.training.evaluate"])
def test_a_start_that_died_puts_the_old_run_back(inside, monkeypatch, place):
    folder = Path("output/demo/sasrec")
    before = hashes(folder)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, die)  # the old run has stepped aside
        with pytest.raises(KeyboardInterrupt):
            train_sr_trad.main(**SHORT, seed=5, overwrite=True)
        assert hashes(folder) == before
        patch.setattr("engine.run.put_back", lambda folder: False)  # a kill
        with pytest.raises(KeyboardInterrupt):
            train_sr_trad.main(**SHORT, seed=5, overwrite=True)
    assert hashes(folder) != before
    train_sr_trad.main(**SHORT)  # finished: prints its results
    assert hashes(folder) == before and not (folder / ".replaced").exists()


def test_best_asks_no_config_of_another_run_without_need(shop):
    Path("output/x/other/best").mkdir(parents=True)
    shutil.copy("output/x/sasrec/results.json", "output/x/other/results.json")
    results = json.loads(Path("output/x/other/results.json").read_text())
    results["valid"]["full"]["MRR"] = 0.0
    Path("output/x/other/results.json").write_text(json.dumps(results))
    Path("output/x/other/config.json").write_text("{")  # cut
    assert recommend.main(domain_type="x", history=["105"], k=3)  # the best is another
