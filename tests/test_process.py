import gzip
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from datasets import process
from datasets.cells import clean_title
from datasets.interactions import read_csv
from engine.errors import UsageError
from tests.conftest import ROOT, real


def review(user, item, time, rating=5.0, **extra):
    return json.dumps(
        {"overall": rating, "reviewerID": user, "asin": item, "unixReviewTime": time, **extra}
    )


META = [
    {"asin": "A", "title": " Salt &amp; Pepper&#39;s  mill "},
    {"asin": "B", "title": '<span id="productTitle" class="a-size-large">Tea <b>pot</b></span>'},
    {"asin": "C", "title": 'Cup <span class="a-size-medium'},
    {"asin": "D", "title": "var aPageStart = (new Date()).getTime();"},
    {"asin": "D", "title": "second record of D"},
    {"asin": "E"},
    {"asin": "Z", "title": "nobody's \ud800"},
]

REVIEWS = [
    review("u2", "A", 30),
    review("u1", "C", 50),
    review("u1", "A", 10),
    review("u1", "B", 10),  # a tie: file order
    review("u1", "A", 60),  # a repeat of A by u1, later
    review("u1", "D", 20),
    review("u2", "B", 20),
    review("u2", "C", 10),
    review("u2", "D", 40),
    review("u1", "D", 20),  # the same review twice
    review("u2", "E", 5, rating=2.0),  # rated too low
    review("u3", "A", 1),
    review("u3", "B", 2),  # too short
]


def written(tmp_path, lines=REVIEWS, meta=META, **flags):
    reviews, metadata = tmp_path / "r.json.gz", tmp_path / "m.json"
    reviews.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    metadata.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in meta)
    )
    values = {
        "min_user": 3,
        "min_item": 2,
        "min_length": 4,
        "output_dir": str(tmp_path / "out"),
    } | flags
    process.main(reviews=str(reviews), meta=str(metadata), domain_type="hand", **values)
    return tmp_path / "out"


def test_every_defect_at_once_gives_the_expected_files(tmp_path, capsys):
    out = written(tmp_path)
    assert (out / "hand.csv").read_text() == (
        "reviewerID,asin,title,time\n"
        'u2,"[2, 1, 0, 3]","[""Cup"", ""Tea pot"", ""Salt & Pepper\'s mill"", ""second record of '
        'D""]","[10, 20, 30, 40]"\n'
        'u1,"[0, 1, 3, 2]","[""Salt & Pepper\'s mill"", ""Tea pot"", ""second record of D"", '
        '""Cup""]","[10, 10, 20, 50]"\n'
    )
    assert (out / "hand.items.csv").read_text() == (
        "item_id,asin,title\n0,A,Salt & Pepper's mill\n1,B,Tea pot\n2,C,Cup\n3,D,second record "
        "of D\n"
    )
    assert sorted(path.name for path in out.iterdir()) == ["hand.csv", "hand.items.csv"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "interactions" in line]
    assert [re.findall(r"(\d+) (?:users|items|interactions)", line) for line in printed] == [
        ["3", "4", "12"],  # rating (E had only the low one)
        ["3", "4", "11"],  # the same review twice
        ["2", "4", "9"],  # u3 has 2
        ["2", "4", "9"],
        ["2", "4", "9"],
        ["2", "4", "8"],  # A twice by u1
        ["2", "4", "8"],
    ]


@pytest.mark.parametrize(
    "title, clean",
    [
        ("&lt;b&gt;Bold&lt;/b&gt; x", "Bold x"),
        ("I <3 You & <Love me", "I <3 You & <Love me"),
        ("a &amp;amp; b", "a & b"),
        ("bad \ud800 title", "bad ? title"),
        (None, ""),
        (["x"], ""),
        ("<i></i>", ""),
    ],
)
def test_titles(title, clean):
    assert clean_title(title) == clean


def test_file_order_as_released(tmp_path):
    data = read_csv(written(tmp_path, order="file") / "hand.csv")
    assert data.items.tolist() == [0, 1, 2, 3, 2, 0, 1, 3]


def test_filters_in_their_order(tmp_path, capsys):
    """After the item filter u1 is down to two reviews and falls out by length, not by the user
    filter.
    """
    lines = [review("u1", item, t) for t, item in enumerate("ABXY")] + [
        review(user, item, t) for user in ("u2", "u3") for t, item in enumerate("ABCD")
    ]
    data = read_csv(written(tmp_path, lines=lines, min_user=4, min_item=2) / "hand.csv")
    assert data.users == ["u2", "u3"]
    assert "sequences of >= 4" in capsys.readouterr().out


def test_the_same_input_gives_the_same_bytes(tmp_path):
    one = written(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path)
    two = written(tmp_path / "b" if (tmp_path / "b").mkdir() is None else tmp_path)
    for name in ("hand.csv", "hand.items.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_broken_lines_are_counted_and_too_many_are_an_error(tmp_path, capsys):
    many = [review(f"u{i // 4}", "ABCD"[i % 4], i) for i in range(400)]
    (tmp_path / "few").mkdir()
    written(
        tmp_path / "few",
        lines=[
            *many[:50],
            '{"overall": 5.0, "revi',
            "[" * 100000,
            review("u1", "A", float("nan")),
            *many[50:],
        ],
    )
    assert (
        "r.json.gz: skipped 3 broken lines of 403, the first is line 51" in capsys.readouterr().out
    )
    (tmp_path / "more").mkdir()
    with pytest.raises(
        UsageError, match="20 of 420 lines are broken or lack .*, the first is line 401"
    ):
        written(tmp_path / "more", lines=[*many, *["{}"] * 20])
    assert not (tmp_path / "more/out").exists()


def test_python_literal_metadata_is_read(tmp_path):
    out = written(tmp_path, meta=["{'asin': 'A', 'title': \"It's\"}", *META[1:]])
    assert (out / "hand.items.csv").read_text().splitlines()[1] == "0,A,It's"


def test_refusals(tmp_path):
    written(tmp_path)
    with pytest.raises(UsageError, match="already exists; --overwrite replaces it"):
        written(tmp_path)
    written(tmp_path, overwrite=True)
    with pytest.raises(
        UsageError, match="nothing is left of 9 after 'items with >= 50 reviews'; lower --min_item"
    ):
        written(tmp_path, overwrite=True, min_item=50)
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress("\n".join(REVIEWS * 9).encode())[:-9])
    with pytest.raises(UsageError, match="cut.json.gz: damaged"):
        process.main(
            reviews=str(tmp_path / "cut.json.gz"), domain_type="x", output_dir=str(tmp_path)
        )
    with pytest.raises(UsageError, match="--reviews=.*file not found; --meta=.*file not found"):
        process.main(reviews="nope", meta="nope", domain_type="x")
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        process.main(
            reviews=str(tmp_path / "empty.json"), domain_type="x", output_dir=str(tmp_path)
        )


def test_gift_cards_end_to_end(tmp_path):
    process.main(
        reviews=str(real("Gift_Cards_5.json.gz")),
        meta=str(real("meta_Gift_Cards.json.gz")),
        domain_type="gift",
        min_item=5,
        output_dir=str(tmp_path),
    )
    data = read_csv(tmp_path / "gift.csv")
    assert (data.n_users, data.n_items, len(data.items)) == (442, 146, 2871)
    titles = (tmp_path / "gift.items.csv").read_text()
    assert "&#39;" not in titles and "<" not in titles


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_counts_and_plots(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    reviews, meta = real("Gift_Cards_5.json.gz"), real("meta_Gift_Cards.json.gz")
    notebook = nbformat.read(ROOT / "datasets/process.ipynb", as_version=4)
    monkeypatch.setenv("SLMREC_REVIEWS", str(reviews))
    monkeypatch.setenv("SLMREC_META", str(meta))
    monkeypatch.setenv("SLMREC_MIN_ITEM", "5")
    monkeypatch.setenv("SLMREC_OUT", str(tmp_path))
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "datasets")}},
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert "2,871 interactions" in "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert (tmp_path / "notebook.csv").exists()


def test_what_strict_json_refuses_is_read_where_the_fields_are_whole(tmp_path, capsys):
    whole = [
        '{"asin": "A", "overall": 5.0, "image": NaN}',
        '{"asin": "B", "overall": 5, "text": "\\ud800"}',
        '{"asin": "C", "overall": 5, "big": 123456789012345678901234567890}',
        "{'asin': 'D', 'overall': 5.0}",
    ]
    broken = [
        '{"asin": "A", "overall": NaN}',
        '{"asin": "A", "overall": 1e300}',
        '{"asin": 3, "overall": 5}',
        '{"asin": "A", "overall": true}',
        '{"asin": "A"}',
        "[1]",
        "{'asin': f()}",
        "[" * 100000,
    ]
    lines = [line.encode() for line in (*whole * 400, *broken)] + [b"\xff"]
    (tmp_path / "a.json").write_bytes(b"\n".join(lines))
    frames = list(process._records(tmp_path / "a.json", ("asin",), ("overall",)))
    assert [asin for frame in frames for asin in frame["asin"]] == [*"ABCD"] * 400
    assert "skipped 9 broken lines of 1,609, the first is line 1601" in capsys.readouterr().out


def plain_process(
    path: Path, min_rating: float, min_user: int, min_item: int, min_length: int
) -> pd.DataFrame:
    """The released notebook's filters in pandas, in time order: one row per user, items from 0."""
    with open(path, encoding="utf-8") as file:
        frame = pd.DataFrame([json.loads(line) for line in file])[
            ["reviewerID", "asin", "overall", "unixReviewTime"]
        ]
    frame = frame[frame.overall >= min_rating].drop_duplicates(
        ["reviewerID", "asin", "unixReviewTime"]
    )
    frame = frame[frame.groupby("reviewerID").asin.transform("size") >= min_user]
    frame = frame[frame.groupby("asin").asin.transform("size") >= min_item]
    frame = frame.sort_values(["reviewerID", "unixReviewTime"], kind="stable")
    frame = frame[frame.groupby("reviewerID").asin.transform("size") >= min_length]
    frame = frame.drop_duplicates(["reviewerID", "asin"])
    frame = frame[frame.groupby("reviewerID").asin.transform("size") >= min_length]
    frame["item"] = frame.asin.astype("category").cat.codes
    return frame.groupby("reviewerID", sort=False).item.apply(list).reset_index()


def test_plain_process_gives_the_same_sequences(tmp_path):
    path = tmp_path / "r.json"
    rng = np.random.default_rng(0)
    item = (rng.pareto(1.2, 6000) * 50).astype(int) % 150
    with open(path, "w") as file:
        for i, (user, code) in enumerate(zip(rng.integers(0, 500, 6000), item)):
            row = {"overall": float(rng.integers(1, 6)), "reviewerID": f"A{user:012d}"}
            row |= {"asin": f"B{code:09d}", "unixReviewTime": 1441324800 + i}
            file.write(json.dumps(row) + "\n")
    frame = plain_process(path, 3, 5, 20, 5)
    process.main(reviews=str(path), domain_type="made", output_dir=str(tmp_path))
    ours = pd.read_csv(tmp_path / "made.csv")
    assert 50 < len(ours) == len(frame)
    wanted = dict(zip(frame.reviewerID, frame.item))
    for user, items in zip(ours.reviewerID, ours.asin):
        assert json.loads(items) == wanted[user]
