"""Twenty fresh cases that an independent tester tried: numbers, logs, advice, output, folders.

A case is refused in one line, or gives the right value; advice that a message gives is followed.
"""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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

HEADER = "user_id,item_id,timestamp\n"
ROWS = [(f"u{i % 4}", f"{100 + (i * 3) % 8}", 1_700_000_000 + 60 * i) for i in range(24)]
LOG = HEADER + "".join(f"{user},{item},{time}\n" for user, item, time in ROWS)
TRAIN = {"max_steps": 4, "hid_dim": 8, "emb_dim": 8, "eval_batch_size": 8}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("orders.csv").write_text(LOG)


def convert_by(words: str) -> tuple[dict[str, list[int]], list[str]]:
    """Convert by a command line; each user's items, and the original ids in order."""
    convert.main(**cli.bind(convert.main, shlex.split(f"--domain_type x --overwrite true {words}")))
    lists = pd.read_csv("data/x.csv").set_index("reviewerID")["asin"].map(json.loads)
    asins = pd.read_csv("data/x.items.csv", dtype=str, keep_default_na=False)["asin"]
    return {user: [asins[i] for i in items] for user, items in lists.items()}, list(asins)


def plain_lists() -> dict[str, list[str]]:
    """The log's lists, worked out without our code: its rows are in time order."""
    lists: dict[str, list[str]] = {}
    for user, item, _ in ROWS:
        lists.setdefault(user, []).append(item)
    return lists


# -- a log that is read in another way ------------------------------------------------------------


def swapped() -> str:
    return "item_id,user_id,timestamp\n" + "".join(f"{i},{u},{t}\n" for u, i, t in ROWS[12:])


def last_line_cut(digits: int) -> str:
    return LOG.rstrip("\n")[:-digits] + "\n"


def zoned() -> str:
    dates = [f"2024-01-{1 + i:02d} 10:00:00" + "+05:00" * (i % 2) for i in range(24)]
    return HEADER + "".join(f"{u},{i},{date}\n" for (u, i, _), date in zip(ROWS, dates))


REFUSED = {
    "a part without the header": (
        {"p/a": LOG[: LOG.index("u0,", 200)], "p/b": LOG[LOG.index("u0,", 200) :]},
        "p",
        "p/b: starts with 'u0,.*', p/a with 'user_id,item_id,timestamp'; give every part the same",
    ),
    "parts with columns in another order": (
        {"p/a": HEADER + "u1,1,5\nu2,2,6\n", "p/b": swapped()},
        "p",
        "p/b: starts with 'item_id,user_id,timestamp', p/a with",
    ),
    "a folder in the folder": ({"p/a": LOG, "p/q/b": LOG}, "p", "p: holds the folder q; put all"),
    "a last line that was cut": (
        {"a.csv": last_line_cut(5)},
        "a.csv",
        "row 25: the time is 17000, the others are dates .1 such rows.: missing, or cut",
    ),
    "times that a spreadsheet cut": (
        {"a.csv": LOG.replace("1700000060", "1.7E+09")},
        "a.csv",
        "row 3: the time is '1.7E\\+09', expected all its digits: a spreadsheet cut them",
    ),
    "half the times with a zone": (
        {"a.csv": zoned()},
        "a.csv",
        "row 2: the time is '2024-01-01 10:00:00', expected a time zone, as in other rows",
    ),
    "ids that are objects": (
        {"a.jsonl": '{"user_id": "a", "item_id": {"$oid": "x1"}, "timestamp": 3}\n' * 2},
        "a.jsonl",
        "the user|the item '{.*' is an object; write its id alone",
    ),
    "pandas' numbers for names": (
        {"a.csv": ",0,1,2\n" + "".join(f"{n},{u},{i},{t}\n" for n, (u, i, t) in enumerate(ROWS))},
        "a.csv",
        "its first row, ',0,1,2', numbers the columns; write their names",
    ),
    "zstd": ({"a.zst": "\x28\u00b5/\u00fd"}, "a.zst", "looks like zstd; unpack it first"),
    "sqlite": ({"a.db": "SQLite format 3\0"}, "a.db", "looks like an SQLite database; export"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_log_that_would_be_read_in_another_way_is_refused(folder, name):
    files, given, line = REFUSED[name]
    for path, text in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=line):
        convert_by(f"--input {given}" + " --user user_id --item item_id" * (given[-5:] == "jsonl"))
    assert not Path("data").exists()


def test_parts_with_one_header_are_one_log(folder):
    Path("p").mkdir()
    for name, rows in (("a", ROWS[:9]), ("b", ROWS[9:])):
        Path("p", name).write_text(HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    assert convert_by("--input p")[0] == plain_lists()


def test_bytes_and_an_index_in_parquet_are_columns_like_others(folder):
    users, items, times = zip(*ROWS)
    binary = [pa.array([x.encode() for x in column], pa.binary()) for column in (users, items)]
    table = pa.table({"user_id": binary[0], "item_id": binary[1], "timestamp": times})
    pq.write_table(table, "b.parquet")
    assert convert_by("--input b.parquet")[0] == plain_lists()
    frame = pd.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
    frame.set_index("user_id").to_parquet("i.parquet")
    assert convert_by("--input i.parquet")[0] == plain_lists()


def test_a_cell_of_any_length_and_separators_within_cells_are_read(folder):
    lines = LOG.splitlines()
    Path("image.csv").write_text(
        "\n".join([lines[0] + ",img", *(line + "," + "A" * 200_000 for line in lines[1:])])
    )
    assert convert_by("--input image.csv")[0] == plain_lists()
    Path("tags.csv").write_text(
        "\n".join([lines[0] + ",genres", *(line + ",Action;Indie" for line in lines[1:])])
    )
    assert convert_by("--input tags.csv")[0] == plain_lists()
    Path("excel.csv").write_text("sep=,\n" + LOG)
    assert convert_by("--input excel.csv")[0] == plain_lists()


def test_ids_that_look_like_powers_of_ten_are_text(folder):
    Path("hex.csv").write_text(LOG.replace(",100,", ",7e1234,"))
    assert "7e1234" in convert_by("--input hex.csv")[1]


# -- advice is followed ---------------------------------------------------------------------------


def test_time_none_on_a_command_line_keeps_file_order(folder):
    Path("my orders.csv").write_text("kunde,artikel\na,x\na,y\nb,x\nb,z\n")
    with pytest.raises(UsageError) as refused:
        convert_by("--input 'my orders.csv'")
    offered = str(refused.value).split("python -m datasets.convert ")[1]
    offered = offered.replace("--domain_type x ", "")
    offered = offered.replace("--user COLUMN", "--user kunde").replace(
        "--item COLUMN", "--item artikel"
    )
    assert convert_by(offered)[0] == {"a": ["x", "y"], "b": ["x", "z"]}
    Path("back.csv").write_text(HEADER + "a,x,9\na,y,8\nb,x,9\nb,z,8\n")
    assert convert_by("--input back.csv --time none")[0] == {"a": ["x", "y"], "b": ["x", "z"]}


def test_the_columns_of_an_item_list_are_named_apart_from_the_logs(folder):
    Path("cat.csv").write_text("sku,name\n" + "".join(f"{i},No. {i}\n" for i in range(100, 108)))
    with pytest.raises(UsageError, match="--items_columns ITEM,TITLE names them"):
        convert_by("--input orders.csv --items cat.csv")
    convert_by("--input orders.csv --items cat.csv --items_columns sku,name")
    assert "0,100,No. 100" in Path("data/x.items.csv").read_text()
    Path("u.item").write_text("".join(f"{i}|Film {i}|1995\n" for i in range(100, 108)))
    convert_by("--input orders.csv --items u.item --items_columns 1,2")
    assert "0,100,Film 100" in Path("data/x.items.csv").read_text()


# -- a number means another item elsewhere --------------------------------------------------------


@pytest.fixture
def shop(folder):
    """The domain x with numbers as original ids, and a SASRec run."""
    convert_by("--input orders.csv")
    train_sr_trad.main(**TRAIN, domain_type="x")


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
    for command in (
        lambda: extract_emb.main(domain_type="x", sasrec="a/sasrec", item_table="t.pkl"),
        lambda: train_sr_trad.main(
            **TRAIN, domain_type="x", init_from="a/sasrec", output_dir="from_a"
        ),
    ):
        with pytest.raises(UsageError, match="items_sha256|items.csv"):
            command()
    train_sr_trad.main(**TRAIN, domain_type="x", output_dir="b/sasrec")
    with pytest.raises(UsageError, match="are of different items.csv|was trained beside"):
        recommend.main(domain_type="x", model="a/sasrec,b/sasrec", history=["200"])


def test_a_denied_title_leaves_out_every_item_that_has_it(tmp_path):
    items = Items(np.arange(4), ["a", "b", "c", "d"], ["Shirt", "Hat", "shirt", "Sock"])
    (tmp_path / "deny.txt").write_text("Shirt\nd\n")
    assert read_items(tmp_path / "deny.txt", Finder(items, "auto"), "--deny") == [0, 2, 3]


# -- weights and tables ---------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a row of padding", "transposed"])
def test_a_table_of_ones_own_with_other_rows_than_ids_is_refused(inside, change):
    table = torch.rand(200, 161).T if change == "transposed" else torch.rand(161, 128)
    own = table.T if change == "transposed" else torch.cat([torch.rand(1, 128), table])
    torch.save({"item_embedding": own}, "own.pkl")
    with pytest.raises(UsageError, match="own.pkl: .* no id is above 160: row i must be item id i"):
        finetune.main(**SHORT, item_table="own.pkl", output_dir="t")


# -- output stands until the new one is there -----------------------------------------------------


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
    with pytest.raises(UsageError, match="mine.pkl: is there, and not written by this command"):
        extract_emb.main(domain_type="x", item_table="mine.pkl")
    Path("mine.pkl").unlink()
    assert hashes(Path(".")) == before


def test_a_link_stays_a_link(shop):
    Path("shared").mkdir()
    Path("shared/o.csv").write_text("old")
    Path("o.csv").symlink_to("shared/o.csv")
    listed(users="orders.csv", k=1)
    assert Path("o.csv").is_symlink() and "old" not in Path("shared/o.csv").read_text()


def test_a_run_that_fails_leaves_the_one_that_it_was_to_replace(shop):
    before = hashes(Path("output/x/sasrec"))
    with pytest.raises(RunError, match="not finite.*; the run that was there is back"):
        train_sr_trad.main(**TRAIN, domain_type="x", overwrite=True, learning_rate=1e30)
    assert hashes(Path("output/x/sasrec")) == before
    assert train_sr_trad.main(**TRAIN, domain_type="x")["steps"] == 4


def test_a_run_that_replaces_another_leaves_nothing_of_it(shop):
    train_sr_trad.main(**TRAIN | {"max_steps": 2}, domain_type="x", overwrite=True)
    assert not Path("output/x/sasrec/.replaced").exists()
