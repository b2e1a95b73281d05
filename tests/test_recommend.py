"""Top-k lists: equal to the ranks of evaluation, in every form of request and of output."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import distill
import train_sr_trad
from datasets.interactions import read_histories
from datasets.items import Finder, Items
from datasets.sequences import TEST, EvaluationSplit
from engine.errors import UsageError
from serving import recommend, served
from serving.histories import History, join_by_time
from serving.recommender import Recommender, top_k
from serving.served import ServedFiles
from tests.conftest import OFF, SHORT, hashes, refused, script


@pytest.mark.parametrize("k", [1, 3, 7, 9])
def test_top_k_is_a_stable_sort(k):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (50, 7), generator=generator).float()  # many are equal
    scores[torch.rand(50, 7, generator=generator) < 0.3] = -torch.inf
    columns, values = top_k(scores, k)
    for row, found, value in zip(scores.tolist(), columns.tolist(), values.tolist()):
        there = [i for i in range(7) if row[i] != -np.inf]
        best = sorted(there, key=lambda i: (-row[i], i))[:k]
        assert found == best + [-1] * (k - len(best))
        assert value == [row[i] for i in best] + [-np.inf] * (k - len(best))


def test_lists_by_hand():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0]])

    def encode(history):  # the sum of the items read; index 4 is the padding
        rows = torch.cat([table, torch.zeros(1, 2)])
        return rows[history].sum(1)

    recommender = Recommender(encode, table, torch.tensor([1.0, 5.0, 5.0, 0.0]), 2)
    items, scores = recommender.recommend([[0], [1, 2, 0], []], 3)
    assert items.tolist() == [[2, 3, 1], [3, -1, -1], [1, 2, 0]]
    assert scores.tolist() == [[2, 1, 0], [3, -np.inf, -np.inf], [5, 5, 1]]
    items, _ = recommender.recommend([[0], [1, 2, 0]], 2, exclude="none")
    assert items.tolist() == [[2, 0], [2, 0]]
    allowed = torch.tensor([False, True, False, True])
    items, _ = recommender.recommend([[0], []], 2, allowed=allowed)
    assert items.tolist() == [[3, 1], [1, 3]]


@pytest.mark.parametrize("model", ["student", "teacher", "sasrec"])
def test_a_targets_place_is_its_rank(inside, model):
    found = served.read(ServedFiles(model=model))
    data, slots = found.inputs.data, found.run.flags["max_seq_length"]
    recommender, names = recommend.open_model([found], "cpu")
    split = EvaluationSplit(data, TEST, slots, 0, 1)
    ends = split.samples.end
    seen = [data.items[a:b].tolist() for a, b in zip(data.offsets[:-1], ends)]
    items, scores = recommender.recommend(seen, data.n_items)
    with np.load(f"output/demo/{model}/ranks.npz") as found:
        ranks = found["test_full"]
    compared = 0
    for row, (target, history) in enumerate(zip(data.items[ends], seen)):
        if target in history:  # evaluation ranks it all the same
            continue
        place = items[row].tolist().index(target)
        near = (scores[row] - scores[row, place]).abs() < 1e-5  # others of nearly equal score
        if near.sum() == 1:
            assert place + 1 == ranks[row]
            compared += 1
    assert compared > 60


def test_the_function_takes_and_gives_ids(inside):
    ids, scores = recommend.recommend([[12, 99], [], [3]], 4)
    assert ids.shape == scores.shape == (3, 4) and ids.dtype == np.int64
    assert not set(ids[0]) & {12, 99}
    data = served.read(ServedFiles()).inputs.data
    counts = np.bincount(data.items, minlength=data.n_items)
    best = np.argsort(-counts, kind="stable")[:4]
    assert ids[1].tolist() == data.item_ids[best].tolist()
    with pytest.raises(UsageError, match="histories: '999' is no item; ids run from 1 to 160"):
        recommend.recommend([[999]])


def test_one_history_on_the_screen(inside, capsys):
    title = Items.of(Path("data/demo.csv"), np.arange(1, 161)).titles[11]
    by_id = recommend.main(history=["12", "99"], k=3)
    said = capsys.readouterr().out
    assert "history, 2 items" in said and title in said and "top 3" in said
    last = ["3", f"{by_id[2]['score']:.4f}", str(by_id[2]["item_id"])]
    assert said.splitlines()[-1].split()[:3] == last
    assert recommend.main(history=[title.upper(), "99"], k=3) == by_id
    recommend.main()
    assert "no history: by popularity" in capsys.readouterr().out


def test_many_users_into_a_file_of_each_form(inside):
    for suffix in ("csv", "jsonl", "parquet"):
        recommend.main(users="all", output=f"out/recs.{suffix}", k=4, batch_size=50)
    rows = list(csv.DictReader(open("out/recs.csv")))
    lines = [json.loads(line) for line in open("out/recs.jsonl")]
    table = pq.read_table("out/recs.parquet").to_pylist()
    assert len(rows) == len(lines) == len(table) == 4 * 120
    for row, line, other in zip(rows, lines, table):
        score = pytest.approx(line.pop("score"), rel=1e-5)
        assert float(row.pop("score")) == score and other.pop("score") == score
        assert line == other and {name: str(value) for name, value in line.items()} == row
    ids, _ = recommend.recommend([[int(rows[0]["item_id"])]], 2)
    users = "reviewerID,asin\nann,[" + rows[0]["item_id"] + ']\nbob,[]\ncid,"12 99"\n'
    Path("mine.csv").write_text(users)
    recommend.main(users="mine.csv", output="mine_out.csv", k=2)
    mine = list(csv.DictReader(open("mine_out.csv")))
    assert [row["reviewerID"] for row in mine] == ["ann", "ann", "bob", "bob", "cid", "cid"]
    assert [int(row["item_id"]) for row in mine[:2]] == ids[0].tolist()
    assert {path.name for path in Path("out").iterdir()} == {f"recs{s}" for s in recommend.SUFFIXES}
    Path("new.csv").write_text("reviewerID,asin\nzoe,[]\nann,[]\n")
    recommend.main(users="new.csv", output="new_out.csv", k=1)
    assert [row["reviewerID"] for row in csv.DictReader(open("new_out.csv"))] == ["zoe", "ann"]


def test_allow_and_deny(inside):
    every = [row["item_id"] for row in recommend.main(history=["12"], k=160)]
    assert len(every) == 159
    Path("allow.txt").write_text("\n".join(map(str, [*every[5:9], 12])))
    Path("deny.txt").write_text(f"{every[6]}\n\n")
    some = recommend.main(history=["12"], allow="allow.txt")
    assert [row["item_id"] for row in some] == every[5:9]
    both = recommend.main(history=["12"], allow="allow.txt", deny="deny.txt")
    assert [row["item_id"] for row in both] == [every[5], *every[7:9]]
    Path("wrong.txt").write_text("12\nnothing like it\n")
    for flags, message in (
        ({"allow": "wrong.txt"}, "--allow=wrong.txt: line 2: 'nothing like it' is no item"),
        ({"deny": "none.txt"}, "--deny=none.txt: file not found"),
        ({"allow": "deny.txt", "deny": "deny.txt"}, "--allow and --deny leave no item"),
    ):
        with pytest.raises(UsageError, match=message):
            recommend.main(history=["12"], **flags)


def test_a_run_elsewhere_knows_its_own_files(inside):
    shutil.move("data/demo.csv", "mine.csv")
    shutil.move("output/demo/sasrec_item.pkl", "mine.pkl")
    shutil.move("output/demo/sasrec_item.json", "mine.json")
    own = {"data_path": "mine.csv", "item_table": "mine.pkl", "domain_type": "shop"}
    distill.main(**SHORT, **own, **OFF, base_model="tiny", output_dir="s")
    assert recommend.main(history=["12"], model="s", k=2)
    train_sr_trad.main(**SHORT, data_path="mine.csv", domain_type="shop", output_dir="b")
    assert recommend.main(history=["12"], model="b", k=2)


def test_what_is_missing_or_cannot_be_is_named(inside):
    Path("bad.txt").write_bytes(b"\xff\n")
    Path("null.csv").write_text('reviewerID,asin,time\na,"[1, 2]","[null, 3]"\n')
    Path("folder.csv").mkdir()
    for flags, words in (
        ({"model": "none"}, "--model=none: no run in none; one of the four scripts makes it"),
        ({"model": "student,"}, "--model=student,: an empty name between commas"),
        ({"domain_type": "x"}, "--model=best: no finished run in output/x/*; train one first"),
        ({"domain_type": "x", "model": "student"}, "output/x/student; distill.py makes it"),
        ({"item_table": "no.pkl"}, "item table not found: no.pkl"),
        ({"users": "all"}, "--users needs --output"),
        ({"users": "U0012"}, "--users=U0012: no such file, and data/demo.csv has"),
        ({"user": "U00012", "history": ["1"]}, "--history and --user: give one of them"),
        ({"user": "U00012", "users": "U00013"}, "--user and --users: give one of them"),
        ({"history": ["3"], "model": "a,sasrec", "item_table": "x"}, "each reads its own table"),
        ({"users": "no.csv", "output": "a.csv"}, "--users=no.csv: file not found"),
        ({"output": "a.csv"}, "--output is of --users"),
        ({"users": "all", "output": "a.xlsx"}, "a.xlsx: must end in .csv, .jsonl, .parquet"),
        ({"history": ["1"], "allow": "bad.txt"}, "--allow=bad.txt: not UTF-8 text"),
        ({"users": "null.csv", "output": "o.csv"}, "row 2: expected a list of 2 times, found"),
        ({"users": "all", "output": "folder.csv"}, "--output=folder.csv is a folder"),
    ):
        with refused(words):
            recommend.main(**flags)
    Path("data/demo.items.csv").write_bytes(b"\xff")
    with refused("demo.items.csv: row 0: expected item_id,asin,title"):
        recommend.main(history=["1"])
    done = script("-m", "serving.recommend", "--history=12,zzz", cwd=inside, status=2)
    assert "error: " in done.stderr.splitlines()[-1]


def test_names_are_found_in_order_and_near_ones_offered():
    items = Items(np.array([3, 7, 9]), ["7", "B01", ""], ["Red mug", "Blue mug", "7"])
    assert Finder(items, "auto").find("7", "x") == 0  # the original id before the id
    assert Finder(items, "id").find("7", "x") == 1
    assert Finder(items, "asin").find("7", "x") == 0
    assert Finder(items, "title").find("7", "x") == 2
    assert Finder(items, "auto").find(" blue MUG ", "x") == 1
    for name, hint in (
        ("blu mug", "did you mean 'Blue mug' \\(B01\\)"),
        ("b01x", "did you mean 'B01' \\(Blue mug\\)"),
        ("9", "original ids are such as 7, B01"),  # an id of the CSV needs --by id
        ("zebra", "original ids are such as 7, B01"),
    ):
        with pytest.raises(UsageError, match=f"x: '{name}' is no item; {hint}"):
            Finder(items, "auto").find(name, "x")


def test_a_damaged_items_csv_is_refused_by_its_row(tmp_path):
    path = tmp_path / "a.items.csv"
    for row in ("one,x,y", "1,z,y"):  # the second names item 1 again
        path.write_text(f"item_id,asin,title\n1,x,y\n{row}\n")
        with pytest.raises(UsageError, match="a.items.csv: row 3: expected item_id,asin,title"):
            Items.of(tmp_path / "a.csv", np.array([1]))


def test_the_notebook_shows_lists(inside, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    from tests.conftest import ROOT

    monkeypatch.setenv("SLMREC_RUNS", str(inside))
    notebook = nbformat.read(ROOT / "docs/recommend.ipynb", as_version=4)
    folder = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    text = [output.get("text", "") or output["data"]["text/plain"] for output in outputs]
    expected = recommend.recommend([[12, 99, 103]], 5, model="student")[0][0]
    assert str(expected[0]) in text[-3] and len(text[-2].splitlines()) == 5
    assert "no." in text[-1]


def test_where_original_ids_are_numbers_a_number_is_one_of_them():
    items = Items(np.array([0, 1, 2]), ["007", "7", "500"], ["", "", ""])
    finder = Finder(items, "auto")
    assert [finder.find(name, "x") for name in ("007", "7", "500")] == [0, 1, 2]
    with pytest.raises(UsageError, match="x: '1' is no item; original ids are such as 007, 7, 500"):
        finder.find("1", "x")
    assert Finder(items, "id").find("1", "x") == 1


def test_names_of_another_catalogue_are_refused(inside):
    """items.csv says what a number means; the run knows its own."""
    rows = [f"{item},B{item:03d},Title {item}" for item in range(1, 161)]
    listing = Path("data/demo.items.csv")
    listing.write_text("\n".join(["item_id,asin,title", *rows]) + "\n")
    train_sr_trad.main(**SHORT, output_dir="s")
    assert Path("s/items.csv").read_text() == listing.read_text()
    first = recommend.main(model="s", history=["B012"], k=3)
    listing.write_text(listing.read_text().replace("Title", "Name"))  # titles may change
    again = recommend.main(model="s", history=["B012"], k=3)
    assert [row["item_id"] for row in first] == [row["item_id"] for row in again]
    with pytest.raises(UsageError, match="--domain_type=x: the run in s is of the domain demo"):
        recommend.main(model="s", domain_type="x", history=["B012"])
    listing.write_text(listing.read_text().replace("B012", "B999"))
    with refused("a number is another item there; s/items.csv is the right one"):
        recommend.main(model="s", history=["B011"])
    shutil.copyfile("s/items.csv", listing)  # as the line says
    assert recommend.main(model="s", history=["B012"], k=3)[0]["item_id"] == first[0]["item_id"]


def test_numbers_that_may_be_two_things_are_refused():
    """Lists of numbers that are original ids, and ids of the run's CSV, of other items."""
    items = Items(np.array([0, 1, 2, 3]), ["3", "2", "1", "7"], [""] * 4)
    finder = Finder(items, "auto")
    with pytest.raises(UsageError, match="l.csv: 1 is the original id of one item, and in the run"):
        finder.refuse_ambiguous([["1", "2"], ["3"]], "l.csv")
    finder.refuse_ambiguous([["1", "7"]], "l.csv")  # 7 is an original id alone
    finder.refuse_ambiguous([["S-1"]], "l.csv")
    Finder(items, "id").refuse_ambiguous([["1", "2"]], "l.csv")
    same = Items(np.array([1, 2]), ["1", "2"], [""] * 2)
    Finder(same, "auto").refuse_ambiguous([["1", "2"]], "l.csv")


def test_the_best_run_is_taken_and_a_worse_one_says_so(inside, capsys):
    shutil.rmtree("output/demo/teacher_states")
    for name, mrr in (("sasrec", 0.3), ("teacher", 0.1), ("student", 0.2)):
        path = Path(f"output/demo/{name}/results.json")
        results = json.loads(path.read_text())
        results["valid"]["sampled"]["MRR"] = results["valid"]["full"]["MRR"] = mrr
        path.write_text(json.dumps(results))
    best = recommend.main(history=["12", "99"], k=3)
    assert "best of 3 runs: output/demo/sasrec, validation MRR 0.3000" in capsys.readouterr().out
    assert best == recommend.main(model="sasrec", history=["12", "99"], k=3)
    distill.main(eval_only=True)
    printed = capsys.readouterr().out
    assert re.search(r"behind SASRec on validation: MRR 0\.0\d+, SASRec has 0\.3000", printed)
    table = printed[printed.index("valid MRR") :].splitlines()
    assert [line[:14].strip() for line in table[1:4]] == ["popularity", "SASRec", "this student"]
    own = json.loads(Path("output/demo/sasrec/results.json").read_text())["test"]["full"]
    assert table[2].split()[1:] == ["0.3000", *table[2].split()[2:5], f"{own['NDCG@10']:.4f}"]
    shutil.copytree("output/demo", "other")  # the SASRec beside a run comes before the domain's
    Path("other/sasrec/results.json").write_text("{}")
    distill.main(eval_only=True, output_dir="other/student")
    assert "SASRec" not in capsys.readouterr().out


def named(inside) -> None:
    """The demo's items get original ids; a log of two new users, and one unknown product."""
    rows = [f"{item},B{item:03d}," for item in range(1, 161)]
    Path("data/demo.items.csv").write_text("\n".join(["item_id,asin,title", *rows]) + "\n")
    lines = ["user_id,item_id,timestamp", "z,B099,1500000000", "y,B007,1300000005"]
    lines.append("z,B012,1400000000")
    Path("new.csv").write_text("\n".join([*lines, "y,B999,1300000006"]) + "\n")


def test_a_log_of_new_users_by_original_ids_and_one_unknown_product(inside, capsys):
    """Rows 3 and 24: read as it is; an unknown item refuses the file, or is counted."""
    named(inside)
    asked = {"users": "new.csv", "output": "lists.csv", "k": 2}
    with pytest.raises(UsageError, match="--users=new.csv: y: 'B999' is no item"):
        recommend.main(**asked)
    assert not Path("lists.csv").exists()
    recommend.main(**asked, unknown="skip")
    assert "--users: 1 unknown items skipped" in capsys.readouterr().out
    with open("lists.csv", newline="") as file:
        found = list(csv.DictReader(file))
    for user, history in (("z", ["B012", "B099"]), ("y", ["B007"])):
        expected = [row["item_id"] for row in recommend.main(history=history, k=2)]
        mine = [int(row["item_id"]) for row in found if row["reviewerID"] == user]
        assert mine == expected
    rows = "kunde;artikel;datum\nz;B099;14.07.2017\ny;B007;13.03.2011\nz;B012;02.08.2016\n"
    Path("kunden.csv").write_text(rows)
    with pytest.raises(UsageError, match="kunden.csv: which column .*--columns USER,ITEM,TIME"):
        recommend.main(users="kunden.csv", output="again.csv")
    named_by = {"columns": ["kunde", "artikel", "datum"], "time_format": "%d.%m.%Y"}
    recommend.main(users="kunden.csv", output="again.csv", k=2, **named_by)
    assert Path("again.csv").read_text() == Path("lists.csv").read_text()
    Path("lists_in.csv").write_text('reviewerID,asin\nz,"[""B012""]"\n')
    with pytest.raises(UsageError, match="--time_format=%Y: no times are read"):
        recommend.main(users="lists_in.csv", output="of_lists.csv", time_format="%Y")
    Path("untimed.csv").write_text("user_id,item_id\nz,B012\nz,B099\n")
    recommend.main(users="untimed.csv", output="again.csv", k=2, overwrite=True)
    assert "no time: items stay in file order" in capsys.readouterr().out
    for content, said in (
        ("user_id,item_id,ts\nz,B012,9\nz,B099,8\n", "which column .* ts "),  # backwards
        ("reviewerID,asin,timestamp\nz,B099,15\nz,B012,14\n", "which column is the time.*--colum"),
        ('user_id,item_id\nz,"[12, 99]"\ny,"[12, 7]"\n', "like a list; write an item per row, or"),
    ):
        Path("untimed.csv").write_text(content)
        with pytest.raises(UsageError, match=f"untimed.csv: .*{said}"):
            recommend.main(users="untimed.csv", output="again.csv", k=2, overwrite=True)
    best = recommend.main(history=["B012"], k=1)[0]["item_id"]
    Path("deny.txt").write_text(f"B999\nB{best:03d}\n")  # what is unknown is not recommended anyway
    assert recommend.main(history=["B012"], k=1, deny="deny.txt")[0]["item_id"] != best


def test_joined_histories_are_in_time_order_and_hold_an_event_once():
    known, new = History([1, 2, 3], [10, 20, 30]), History([9, 2, 2], [5.0, 20.0, 40.0])
    assert join_by_time(known, new) == ([9, 1, 2, 3, 2], [5.0, 10, 20, 30, 40.0])
    for other in (History([7]), History([7], [1.7e9])):  # without times, or of another unit
        assert join_by_time(known, other) == ([1, 2, 3, 7], None)


def test_no_file_of_the_run_is_written_over(inside):
    """Row 5: neither the sequences, nor items.csv, nor the log of --users."""
    named(inside)
    Path("link.csv").symlink_to("data/demo.csv")
    before = hashes(Path("."))
    read = [("all", name) for name in ("data/demo.csv", "link.csv", "data/demo.items.csv")]
    for users, output in [*read, ("new.csv", "new.csv")]:
        with pytest.raises(UsageError, match=f"--output={output} is a file that"):
            recommend.main(users=users, output=output, overwrite=True, unknown="skip")
    Path("mine.csv").write_text("x")
    with pytest.raises(UsageError, match="--output=mine.csv: already exists; --overwrite true"):
        recommend.main(users="all", output="mine.csv")
    Path("mine.csv").unlink()
    assert hashes(Path(".")) == before


def test_a_user_of_the_domain_by_name(inside, capsys):
    """`--users NAME` and `--user NAME`: that user's history, on the screen."""
    users = {user: ids for user, ids, _ in read_histories(Path("data/demo.csv"))}
    history = [str(item) for item in users["U00012"]]
    expected = recommend.main(history=history, k=3, by="id")
    assert recommend.main(user="U00012", k=3) == expected
    assert recommend.main(users="U00012", k=3) == expected
    assert [found.shape for found in recommend.recommend([], k=3)] == [(0, 3)] * 2
    assert f"history, {len(history)} items" in capsys.readouterr().out


def test_similar_items_by_hand():
    """Mean (1, 1): the vectors left are (2, 0), (1, 0), (0, 2), (-3, -2)."""
    table = torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 3.0], [-2.0, -1.0]])
    model = Recommender(None, table, torch.ones(4), 3)
    items, cosines = model.similar(0, 3)
    assert items.tolist() == [[1, 2, 3]]
    assert cosines[0].tolist() == pytest.approx([1.0, 0.0, -3 / 13**0.5], abs=1e-6)
    allowed = torch.tensor([True, False, True, False])
    assert model.similar(0, 3, allowed)[0].tolist() == [[2, -1, -1]]


def test_similar_items_on_the_screen(inside, capsys):
    found = recommend.main(similar="99", k=4)
    assert len(found) == 4 and 99 not in [row["item_id"] for row in found]
    printed = capsys.readouterr().out
    assert "items like\n" in printed and "top 4\n" in printed
