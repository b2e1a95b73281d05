"""--split=time: targets after one moment of the whole log, worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import convert, sequences
from datasets.interactions import read_csv
from engine.errors import UsageError
from experiments import report
from serving import export, recommend
from tests.conftest import OFF, save
from utils.flags import Evaluation

SHORT = {"domain_type": "shop", "max_steps": 2, "batch_size": 16}
ROWS = [  # user, items, times; of the 20 times 60 % are below 100
    ("early", [1, 2, 3, 4], [1, 2, 3, 4]),  # nothing after: trains with everything
    ("both", [2, 3, 4, 5, 6, 7], [5, 6, 7, 100, 101, 102]),  # 5 is its test target, 6 and 7 go
    ("few", [1, 2, 3], [8, 9, 103]),  # two before: not evaluated, 3 is not trained on
    ("late", [8, 9], [104, 105]),  # nothing before: nothing is left
    ("also", [4, 3, 2, 1, 9], [10, 11, 12, 106, 107]),
]


pytestmark = pytest.mark.usefixtures("here")


def write(path, rows=ROWS, header="reviewerID,asin,time"):
    lines = [f'{user},"{items}","{times}"' for user, items, times in rows]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_every_list_is_cut_at_one_moment(tmp_path):
    data = read_csv(write(tmp_path / "a.csv"), split="time:0.6")
    assert data.moment == 100
    assert data.users == ["both", "also"] and data.n_items == 9
    ids = data.item_ids[data.items].tolist()
    assert ids == [2, 3, 4, 5, 4, 3, 2, 1, 1, 2, 3, 4, 1, 2]
    assert data.offsets.tolist() == [0, 4, 8]
    assert data.short_offsets.tolist() == [8, 12, 14, 14]
    plain = read_csv(tmp_path / "a.csv")
    assert plain.sha256 == read_csv(tmp_path / "a.csv", split="leave_one_out").sha256
    assert plain.sha256 != data.sha256 and plain.moment is None
    assert data.sha256 != read_csv(tmp_path / "a.csv", split="time:0.65").sha256


def test_users_without_a_target_train_with_all_before_the_moment(tmp_path):
    data = read_csv(write(tmp_path / "a.csv"), split="time:0.6")
    every = [([2], 3), ([4], 3), ([1], 2), ([1, 2], 3), ([1, 2, 3], 4), ([1], 2)]
    for targets, expected in (("last", [*every[:2], *every[4:]]), ("all", every)):
        samples = sequences.training_samples(data, targets, 5)
        found = []
        for i in range(len(samples)):
            rows = np.array([i])
            history = samples.histories(rows)[0].tolist()
            shown = [int(data.item_ids[item]) for item in history if item < data.n_items]
            found.append((shown, int(data.item_ids[samples.targets(rows)[0]])))
        assert found == expected


def test_targets_candidates_and_what_is_said(tmp_path):
    data = read_csv(write(tmp_path / "a.csv"), split="time:0.6")
    splits = sequences.evaluation_splits(data, 5, Evaluation(num_candidates=3))
    assert data.item_ids[splits["valid"].targets()].tolist() == [4, 2]
    assert data.item_ids[splits["test"].targets()].tolist() == [5, 1]
    told = sequences.describe(data, sequences.training_samples(data, "last", 5), splits)
    assert "3 users with fewer than 3 items before that time, or none after it" in told
    assert "50.0% of the test targets occur nowhere in training" in told  # 5


def test_times_that_mean_nothing_are_refused(tmp_path):
    for row, problem in (
        (("x", [1, 2], [2, 1]), "row 2: times are not ascending"),
        (("x", [1, 2], [1]), r"row 2: time is '\[1\]', expected a list of 2 numbers"),
        (("x", [1, 2], ["a", "b"]), "row 2: time is .*expected a list of 2 numbers"),
        (("x", [1, 2], "[NaN, 1]"), "row 2: time is .*expected a list of 2 numbers"),
        (("x", [1, 2], "[1, Infinity]"), "row 2: time is .*expected a list of 2 numbers"),
    ):
        path = write(tmp_path / "a.csv", [row, *ROWS])
        with pytest.raises(UsageError, match=problem):
            read_csv(path, split="time:0.6")
        assert read_csv(path).n_users == 3  # leave-one-out does not read them


def test_a_file_without_times_or_without_targets_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no column time, which --split=time reads"):
        read_csv(write(tmp_path / "a.csv", header="reviewerID,asin,when"), split="time:0.6")
    with pytest.raises(UsageError, match="no user has 3 items before time 1 and one after"):
        read_csv(write(tmp_path / "a.csv"), split="time:0.01")


def test_later_steps_take_the_split_over_and_refuse_another(tmp_path, capsys):
    """From a log with times to a teacher, as a user would."""
    convert.main(input=str(log_of(800, 40, 30)), domain_type="shop")
    short = {"domain_type": "shop", "max_steps": 2}
    results = train_sr_trad.main(split="time:0.9", **short)
    assert results["users"] == 40
    extract_emb.main(domain_type="shop")
    with pytest.raises(UsageError, match="=leave_one_out contradicts the earlier step's time:0.9"):
        finetune.main(split="leave_one_out", **short)
    taught = finetune.main(**short, llama_decoder_nums=2)
    assert taught["data_sha256"] == results["data_sha256"]
    page = report.main(runs="output/shop", resamples=100).read_text()
    assert "## shop (split time:0.9)" in page
    assert Path("output/shop/report_shop_split_time_0.9_metrics.png").is_file()
    train_sr_trad.main(**short, output_dir="whole")
    with pytest.raises(UsageError, match="the run has --split time:0.9"):
        train_sr_trad.main(**short, eval_only=True)
    assert "test targets from time 720 on" in capsys.readouterr().out


def test_whole_times_beyond_2_53_and_shares_are_exact():
    start = 1_700_000_000_000_000_000
    rows = []
    for u in range(18):
        items, times = [(u + i) % 7 for i in range(5)], [start + 5 * u + i for i in range(5)]
        rows.append(f'u{u},"{items}","{times}"')
    data = read_csv(save("a.csv", "reviewerID, asin, time", *rows), split="time:0.7")
    assert data.moment == start + 63  # 63 of 90 times are before it


def log_of(n: int = 600, users: int = 30, items: int = 20) -> Path:
    draws = np.random.default_rng(0)
    rows = [f"p{n % users:02d},i{draws.integers(items):02d},{n}" for n in range(n)]
    return save("log.csv", "user_id,item_id,timestamp", *rows)


@pytest.fixture
def timed(here) -> None:
    """SASRec and a student of a split by time, the student without saying so."""
    convert.main(input=str(log_of()), domain_type="shop")
    train_sr_trad.main(**SHORT, split="time:0.8")
    extract_emb.main(domain_type="shop")
    distill.main(**SHORT, **OFF, output_dir="output/shop/student")


def test_a_student_knows_the_split_that_it_took_over(timed, capsys):
    config = json.loads(Path("output/shop/student/config.json").read_text())
    assert config["flags"]["split"] == "time:0.8"
    assert len(recommend.main(domain_type="shop", model="student", history=["i01"], k=3)) == 3
    export.main(domain_type="shop", model="student", output_dir="out", verify_users=4)
    card = Path("out/README.md").read_text()
    assert "split time:0.8" in card and "after one moment is the target" in card


def test_a_start_of_another_split_is_refused(timed):
    extract_emb.main(domain_type="shop", sasrec="output/shop/sasrec")
    train_sr_trad.main(**SHORT, output_dir="whole")
    extract_emb.main(domain_type="shop", sasrec="whole", item_table="whole.pkl")
    distill.main(**SHORT, **OFF, item_table="whole.pkl", output_dir="before")
    with pytest.raises(UsageError, match="was trained with --split=leave_one_out, this run has"):
        distill.main(**SHORT, **OFF, init_from="before", output_dir="after")


def test_who_has_no_history_gets_what_is_popular_now(timed):
    """All interactions count, also those after the moment."""
    items, scores = recommend.recommend([[]], 1, domain_type="shop", model="sasrec")
    counts = np.bincount(read_csv("data/shop.csv").items)
    assert (items[0, 0], scores[0, 0]) == (counts.argmax(), counts.max())


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
    rows = ["n,i03,5,2", "n,i04,5,1", "m,i05,5,1", "m,i06,1,2"]
    save("amazon.csv", "reviewerID,asin,overall,unixReviewTime", *rows)
    recommend.main(**flags | {"users": "amazon.csv"}, min_rating=3, output="d.csv")
    assert len(Path("d.csv").read_text().splitlines()) == 1 + 18 + 19


def test_best_is_of_the_split_that_is_named(timed, capsys):
    train_sr_trad.main(**SHORT, split="time:0.7", output_dir="output/shop/split")
    recommend.main(domain_type="shop", history=["1"], by="id", k=1, split="time:0.7")
    out = capsys.readouterr().out
    assert "best of 1 runs: output/shop/split" in out and "left out: 2 runs" in out


def test_files_of_another_domain_are_named_as_such(timed):
    convert.main(input="log.csv", domain_type="gift")
    Path("data/gift.csv").write_text(Path("data/gift.csv").read_text().replace("p01", "q01"))
    with pytest.raises(UsageError, match="it is of the domain shop, this is gift: name another"):
        distill.main(domain_type="gift", item_table="output/shop/sasrec_item.pkl", **OFF)
