import csv
import gzip
import json
import re

import numpy as np
import pandas as pd
import pytest

from datasets import process
from datasets.cells import clean_title
from datasets.interactions import read_csv
from engine.errors import UsageError
from tests.conftest import real, refused, script


def review(user, item, time, rating=5.0, **extra):
    names = {"overall": rating, "reviewerID": user, "asin": item, "unixReviewTime": time}
    return json.dumps(names | extra)


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
    rows = [line if isinstance(line, str) else json.dumps(line) for line in meta]
    metadata.write_text("\n".join(rows))
    values = {"min_user": 3, "min_item": 2, "min_length": 4} | flags
    values |= {"output_dir": str(tmp_path / "out")}
    process.main(reviews=str(reviews), meta=str(metadata), domain_type="hand", **values)
    return tmp_path / "out"


def test_every_defect_at_once_gives_the_expected_files(tmp_path, capsys):
    out = written(tmp_path)
    salt, pot, cup, record = "Salt & Pepper's mill", "Tea pot", "Cup", "second record of D"
    rows = [("u2", [2, 1, 0, 3], [cup, pot, salt, record], [10, 20, 30, 40])]
    rows.append(("u1", [0, 1, 3, 2], [salt, pot, record, cup], [10, 10, 20, 50]))
    with open(out / "hand.csv", newline="") as file:
        header, *found = csv.reader(file)
    assert header == ["reviewerID", "asin", "title", "time"]
    assert found == [[user, *map(json.dumps, lists)] for user, *lists in rows]
    items = f"item_id,asin,title\n0,A,{salt}\n1,B,{pot}\n2,C,{cup}\n3,D,{record}\n"
    assert (out / "hand.items.csv").read_text() == items
    assert sorted(path.name for path in out.iterdir()) == ["hand.csv", "hand.items.csv"]
    printed = [line for line in capsys.readouterr().out.splitlines() if " users " in line]
    counts = [re.findall(r"(\d+) (?:users|items|interactions)", line) for line in printed]
    # rating (E had only the low one), the same review twice, u3 has 2, nothing twice, A twice by u1
    expected = "3 4 12|3 4 11|2 4 9|2 4 9|2 4 9|2 4 8|2 4 8"
    assert counts == [line.split() for line in expected.split("|")]


def test_titles():
    for title, clean in (
        ("&lt;b&gt;Bold&lt;/b&gt; x", "Bold x"),
        ("I <3 You & <Love me", "I <3 You & <Love me"),
        ("a &amp;amp; b", "a & b"),
        ("bad \ud800 title", "bad ? title"),
        (None, ""),
    ):
        assert clean_title(title) == clean


def test_titles_may_come_late_and_records_may_be_long(tmp_path):
    long = {"asin": "X", "description": "x" * 2**19}
    late = [long, *({"asin": f"Y{i}"} for i in range(99)), *META]
    for name, meta in (("plain", META), ("late", late)):
        (tmp_path / name).mkdir()
        written(
            tmp_path / name,
            lines=[review("u9", "A", 1, reviewText="x" * 2**19), *REVIEWS],
            meta=meta,
        )
    plain, found = (
        (tmp_path / name / "out/hand.items.csv").read_text() for name in ("plain", "late")
    )
    assert found == plain and "Tea pot" in found


def test_file_order_as_released(tmp_path):
    data = read_csv(written(tmp_path, order="file") / "hand.csv")
    assert data.items.tolist() == [0, 1, 2, 3, 2, 0, 1, 3]


def test_refusals(tmp_path):
    written(tmp_path)
    (tmp_path / "v3.jsonl").write_text('{"user_id": "a", "parent_asin": "x", "timestamp": 1}\n')
    with pytest.raises(UsageError, match="has no reviewerID, .*; python -m datasets.convert reads"):
        process.main(reviews=str(tmp_path / "v3.jsonl"), domain_type="x")
    with pytest.raises(UsageError, match="already exists; --overwrite replaces it"):
        written(tmp_path)
    written(tmp_path, overwrite=True)
    with refused("nothing is left of 9 after 'items with >= 50 reviews'; lower --min_item"):
        written(tmp_path, overwrite=True, min_item=50)
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress("\n".join(REVIEWS * 9).encode())[:-9])
    (tmp_path / "empty.json").write_text("")
    flags = {"domain_type": "x", "output_dir": str(tmp_path)}
    for name, words in (("cut.json.gz", "cut.json.gz: damaged"), ("empty.json", "is empty")):
        with refused(words):
            process.main(reviews=str(tmp_path / name), **flags)
    with refused("--reviews=nope: file not found; --meta=nope: file not found"):
        process.main(reviews="nope", meta="nope", domain_type="x")


@pytest.mark.slow
def test_gift_cards_end_to_end(tmp_path):
    raw = {"reviews": "Gift_Cards_5.json.gz", "meta": "meta_Gift_Cards.json.gz"}
    raw = {flag: str(real(name)) for flag, name in raw.items()}
    process.main(**raw, domain_type="gift", min_item=5, output_dir=str(tmp_path))
    data = read_csv(tmp_path / "gift.csv")
    assert (data.n_users, data.n_items, len(data.items)) == (442, 146, 2871)
    titles = (tmp_path / "gift.items.csv").read_text()
    assert "&#39;" not in titles and "<" not in titles
    script("train_sr_trad.py", "--data_path=gift.csv", "--output_dir=run", cwd=tmp_path)
    results = json.loads((tmp_path / "run/results.json").read_text())
    popularity = results["popularity"]["test"]["sampled"]["HR@10"]
    assert results["test"]["sampled"]["HR@10"] > max(0.25, popularity)  # seeds vary by less than .1


def test_what_strict_json_refuses_is_read_and_a_broken_line_is_named(tmp_path):
    """NaN, lone surrogates, huge numbers and Python literals beside the fields that are read."""
    more = [f'{line[:-1]}, "x": {x}}}' for line, x in zip(REVIEWS, ("NaN", '"\\ud800"', "1" * 99))]
    literal = REVIEWS[3].replace('"', "'")
    (tmp_path / "whole").mkdir()
    lines = [*more, literal, *REVIEWS[4:]]
    found = (written(tmp_path / "whole", lines=lines) / "hand.csv").read_text()
    (tmp_path / "plain").mkdir()
    assert found == (written(tmp_path / "plain") / "hand.csv").read_text()
    for broken, said in (
        ('{"overall": 5.0, "revi', "row 14: not a JSON object"),
        ("[1]", "row 14: not a JSON object"),
        ("{'asin': f()}", "row 14: not a JSON object"),
        ("[" * 100000, "row 14: not a JSON object"),
        (review("u1", "A", float("nan")), "row 14: the time is missing"),
        (review("u1", "A", 3, rating=None), "row 14: the rating is missing"),
    ):
        with refused(f"r.json.gz: {said}"):
            written(tmp_path, lines=[*REVIEWS, broken])
    assert not (tmp_path / "out").exists()


def plain_process(path, min_rating, min_user, min_item, min_length) -> pd.DataFrame:
    """The released notebook's filters in pandas, in time order: one row per user, items from 0."""
    frame = pd.read_json(path, lines=True, convert_dates=False)
    frame = frame[frame.overall >= min_rating]
    frame = frame.drop_duplicates(["reviewerID", "asin", "unixReviewTime"])
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
