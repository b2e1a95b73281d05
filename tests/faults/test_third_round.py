"""Faults found by three independent walks on 2026-11-28; each was tried on the program first."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import distill
import extract_emb
import train_sr_trad
from datasets import convert, process
from datasets.interactions import read_csv
from datasets.items import Finder, Items
from engine import cli
from engine.errors import UsageError
from serving import export, recommend

CE = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
SHORT = {"domain_type": "shop", "max_steps": 2, "batch_size": 16}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name: str, *lines: str) -> Path:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(name)


def log_of(n: int = 600, users: int = 30, items: int = 20) -> Path:
    draws = np.random.default_rng(0)
    rows = [f"p{n % users:02d},i{draws.integers(items):02d},{n}" for n in range(n)]
    return save("log.csv", "user_id,item_id,timestamp", *rows)


@pytest.fixture
def timed(inside) -> None:
    """SASRec and a student of a split by time, the student without saying so."""
    convert.main(input=str(log_of()), domain_type="shop")
    train_sr_trad.main(**SHORT, split="time:0.8")
    extract_emb.main(domain_type="shop")
    distill.main(**SHORT, **CE, output_dir="output/shop/student")


def test_a_student_knows_the_split_that_it_took_over(timed, capsys):
    config = json.loads(Path("output/shop/student/config.json").read_text())
    assert config["flags"]["split"] == "time:0.8"
    assert len(recommend.main(domain_type="shop", model="student", history=["i01"], k=3)) == 3
    export.main(domain_type="shop", model="student", output_dir="out", verify_users=4)
    card = Path("out/README.md").read_text()
    assert "split time:0.8" in card and "after one moment is the target" in card
    with pytest.raises(UsageError, match="contradicts the earlier step's time:0.8"):
        distill.main(**SHORT, **CE, split="leave_one_out", output_dir="other")


def test_a_start_of_another_split_is_refused(timed):
    extract_emb.main(domain_type="shop", sasrec="output/shop/sasrec")
    train_sr_trad.main(**SHORT, output_dir="whole")
    extract_emb.main(domain_type="shop", sasrec="whole", item_table="whole.pkl")
    distill.main(**SHORT, **CE, item_table="whole.pkl", output_dir="before")
    with pytest.raises(UsageError, match="was trained with --split=leave_one_out, this run has"):
        distill.main(**SHORT, **CE, init_from="before", output_dir="after")


def test_who_has_no_history_gets_what_is_popular_now(timed):
    """All interactions count, also those after the moment."""
    items, scores = recommend.recommend([[]], 1, domain_type="shop", model="sasrec")
    counts = np.bincount(read_csv("data/shop.csv").items)
    assert (items[0, 0], scores[0, 0]) == (counts.argmax(), counts.max())


@pytest.mark.parametrize("times", ["[NaN, 1, 2, 3]", "[1, 2, Infinity, Infinity]"])
def test_times_that_are_no_numbers_are_refused(times):
    path = save("a.csv", "reviewerID,asin,time", f'u,"[1, 2, 3, 4]","{times}"')
    with pytest.raises(UsageError, match="row 2: time is .*expected a list of 4 numbers"):
        read_csv(path, split="time:0.5")


def test_whole_times_beyond_2_53_and_shares_are_exact():
    start = 1_700_000_000_000_000_000
    rows = []
    for u in range(18):
        items, times = [(u + i) % 7 for i in range(5)], [start + 5 * u + i for i in range(5)]
        rows.append(f'u{u},"{items}","{times}"')
    data = read_csv(save("a.csv", "reviewerID, asin, time", *rows), split="time:0.7")
    assert data.moment == start + 63  # 63 of 90 times are before it


def test_a_domains_own_files_are_converted_with_ids_times_and_titles():
    rows = ["a,7,1,Brazil", "a,3,2,Alien", "b,9,3,Dune", "b,7,4,"]
    path = save("log.csv", "user_id,item_id,timestamp,title", *rows)
    convert.main(input=str(path), domain_type="one")
    convert.main(input="data/one.csv", items="data/one.items.csv", domain_type="two")
    for name in ("csv", "items.csv"):
        assert Path(f"data/one.{name}").read_text() == Path(f"data/two.{name}").read_text()
    assert "1,7,Brazil" in Path("data/two.items.csv").read_text()


def test_a_list_of_items_adds_titles_and_takes_none_away():
    path = save("log.csv", "user_id,item_id,timestamp,title", "a,1,1,Alien", "b,2,2,")
    items = save("items.csv", "item_id,title", "1,", "2,Brazil")
    convert.main(input=str(path), items=str(items), domain_type="shop")
    assert Path("data/shop.items.csv").read_text().splitlines()[1:] == ["0,1,Alien", "1,2,Brazil"]
    other = save("other.csv", "item_id,title", "0001,Alien")
    with pytest.raises(UsageError, match="none of its items is in the log: '0001' there, '1' here"):
        convert.main(input=str(path), items=str(other), domain_type="x")
    with pytest.raises(UsageError, match="--items_columns=item_id,titel: not in .*which has item"):
        columns = ["item_id", "titel"]
        convert.main(input=str(path), items=str(items), items_columns=columns, domain_type="x")


def test_repeated_rows_are_not_later_purchases(capsys):
    rows = ["a,x,1", "a,x,1", "a,y,2", "a,x,9", "b,x,1"]
    path = save("log.csv", "user_id,item_id,timestamp", *rows)
    lists = {}
    for dedup in ("no", "rows", "items"):
        convert.main(input=str(path), domain_type="shop", dedup=dedup, overwrite=True)
        lists[dedup] = Path("data/shop.csv").read_text().splitlines()[1].split('"')[1]
    assert lists == {"no": "[0, 0, 1, 0]", "rows": "[0, 1, 0]", "items": "[0, 1]"}
    assert "1 rows repeat user, item and time of another; --dedup rows drops them" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "times, problem",
    [
        (["20240425120000900001", "20240425120000900002"], "at most 2\\^63"),
        (["280524", "270524"], "days before years"),
    ],
)
def test_times_that_do_not_sort_are_refused(times, problem):
    rows = [f"{user},{item},{time}" for user in "ab" for item, time in zip("xy", times)]
    path = save("log.csv", "user_id,item_id,timestamp", *rows)
    with pytest.raises(UsageError, match=problem):
        convert.main(input=str(path), domain_type="s")


def test_the_offer_has_the_column_of_times():
    rows = ["a;x;25.04.2024 08:00", "b;y;26.04.2024 08:00"]
    with pytest.raises(UsageError, match="--user customer --item sku --time bought_at"):
        path = save("log.csv", "customer;sku;bought_at", *rows)
        convert.main(input=str(path), domain_type="shop")


def test_reviews_without_a_name_or_with_huge_numbers_are_broken_lines(capsys):
    good = {"reviewerID": "u", "asin": "A", "overall": 5, "unixReviewTime": 1}
    many = [json.dumps(good | {"reviewerID": f"u{i // 5}", "asin": f"{i}"}) for i in range(600)]
    for change in ({"reviewerID": ""}, {"asin": ["B"]}, {"reviewerID": "A\ud800"}):
        many.append(json.dumps(good | change))
    many.append(json.dumps(good).replace('"unixReviewTime": 1', f'"unixReviewTime": 1{"0" * 400}'))
    save("r.json", *many)
    process.main(reviews="r.json", domain_type="shop", min_item=1)
    assert "skipped 4 broken lines of 604, the first is line 601" in capsys.readouterr().out


def test_titles_with_commas_and_brackets_are_found():
    items = Items(np.arange(3), ["11", "10", "12"], ["Seven (Se7en)", "Usual Suspects, The", "Se7"])
    finder = Finder(items, "auto")
    given = cli._split("Seven (Se7en),Usual Suspects, The")
    assert finder.find_joined(given, "x") == [0, 1]
    assert cli._split("[a, b]") == ["a", "b"] and cli._split("Seven (Se7en)") == ["Seven (Se7en)"]
    with pytest.raises(UsageError, match=r"did you mean 'Seven \(Se7en\)' \(11\)"):
        finder.find("Seven (Sen)", "x")


def test_known_users_of_a_new_log(timed, capsys):
    save("new.csv", "user_id,item_id,timestamp", "p01,i03,9000", "new,i04,9001")
    flags = {"domain_type": "shop", "model": "sasrec", "users": "new.csv", "k": 20}
    recommend.main(**flags, output="a.csv")
    assert "1 users are users of data/shop.csv too" in capsys.readouterr().out
    recommend.main(**flags, output="b.csv", known="join")
    listed = [(pd.read_csv(name)["reviewerID"] == "p01").sum() for name in ("a.csv", "b.csv")]
    log = pd.read_csv("log.csv")
    met = {*log["item_id"][log["user_id"] == "p01"], "i03"}
    assert listed == [19, 20 - len(met)]
    save("odd.csv", "user_id,item_id,timestamp", "n,3,1", "m,4,2")
    with pytest.raises(UsageError, match="none of its items is known"):
        recommend.main(**flags | {"users": "odd.csv"}, unknown="skip", output="c.csv")
    rows = ["n,i03,5,2", "n,i04,5,1", "m,i05,5,1"]
    save("amazon.csv", "reviewerID,asin,overall,unixReviewTime", *rows)
    recommend.main(**flags | {"users": "amazon.csv"}, output="d.csv")
    assert len(Path("d.csv").read_text().splitlines()) == 1 + 18 + 19


def test_best_is_of_the_data_that_is_there(timed, capsys):
    train_sr_trad.main(**SHORT, output_dir="output/shop/whole")
    Path("kept.csv").write_text(Path("data/shop.csv").read_text())
    convert.main(input=str(log_of(700)), domain_type="shop", overwrite=True)
    train_sr_trad.main(**SHORT, output_dir="output/shop/newer")
    Path("data/shop.csv").write_text(Path("kept.csv").read_text())
    for name in ("config.json", "results.json"):
        Path(f"output/shop/newer/{name}").touch()
    recommend.main(domain_type="shop", history=["i01"], k=1)
    assert "best of 1 runs: output/shop/whole" in capsys.readouterr().out


def test_files_of_another_domain_are_named_as_such(timed):
    convert.main(input="log.csv", domain_type="gift")
    Path("data/gift.csv").write_text(Path("data/gift.csv").read_text().replace("p01", "q01"))
    with pytest.raises(UsageError, match="it is of the domain shop, this is gift: name another"):
        distill.main(domain_type="gift", item_table="output/shop/sasrec_item.pkl", **CE)
