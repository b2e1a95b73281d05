"""--split=time: targets after one moment of the whole log, worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

import extract_emb
import finetune
import train_sr_trad
from datasets import convert, sequences
from datasets.interactions import read_csv
from engine.errors import UsageError
from experiments import report
from utils.flags import Evaluation

ROWS = [  # user, items, times; of the 20 times 60 % are below 100
    ("early", [1, 2, 3, 4], [1, 2, 3, 4]),  # nothing after: trains with everything
    ("both", [2, 3, 4, 5, 6, 7], [5, 6, 7, 100, 101, 102]),  # 5 is its test target, 6 and 7 go
    ("few", [1, 2, 3], [8, 9, 103]),  # two before: not evaluated, 3 is not trained on
    ("late", [8, 9], [104, 105]),  # nothing before: nothing is left
    ("also", [4, 3, 2, 1, 9], [10, 11, 12, 106, 107]),
]


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


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("last", [([2], 3), ([4], 3), ([1, 2, 3], 4), ([1], 2)]),
        ("all", [([2], 3), ([4], 3), ([1], 2), ([1, 2], 3), ([1, 2, 3], 4), ([1], 2)]),
    ],
)
def test_users_without_a_target_train_with_all_before_the_moment(tmp_path, targets, expected):
    data = read_csv(write(tmp_path / "a.csv"), split="time:0.6")
    samples = sequences.training_samples(data, targets, 5)
    ids = data.item_ids
    found = []
    for i in range(len(samples)):
        rows = np.array([i])
        history = samples.histories(rows)[0].tolist()
        shown = [int(ids[item]) for item in history if item < data.n_items]
        found.append((shown, int(ids[samples.targets(rows)[0]])))
    assert found == expected


def test_targets_candidates_and_what_is_said(tmp_path):
    data = read_csv(write(tmp_path / "a.csv"), split="time:0.6")
    splits = sequences.evaluation_splits(data, 5, Evaluation(num_candidates=3))
    assert data.item_ids[splits["valid"].targets()].tolist() == [4, 2]
    assert data.item_ids[splits["test"].targets()].tolist() == [5, 1]
    told = sequences.describe(data, sequences.training_samples(data, "last", 5), splits)
    assert "3 users with fewer than 3 items before that time, or none after it" in told
    assert "50.0% of the test targets occur nowhere in training" in told  # 5


@pytest.mark.parametrize(
    "row, problem",
    [
        (("x", [1, 2], [2, 1]), "row 2: times are not ascending"),
        (("x", [1, 2], [1]), r"row 2: time is '\[1\]', expected a list of 2 numbers"),
        (("x", [1, 2], ["a", "b"]), "row 2: time is .*expected a list of 2 numbers"),
    ],
)
def test_times_that_mean_nothing_are_refused(tmp_path, row, problem):
    path = write(tmp_path / "a.csv", [row, *ROWS])
    with pytest.raises(UsageError, match=problem):
        read_csv(path, split="time:0.6")
    assert read_csv(path).n_users == 3  # leave-one-out does not read them


def test_a_file_without_times_or_without_targets_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no column time, which --split=time reads"):
        read_csv(write(tmp_path / "a.csv", header="reviewerID,asin,when"), split="time:0.6")
    with pytest.raises(UsageError, match="no user has 3 items before time 1 and one after"):
        read_csv(write(tmp_path / "a.csv"), split="time:0.01")


def test_later_steps_take_the_split_over_and_refuse_another(tmp_path, monkeypatch, capsys):
    """From a log with times to a teacher, as a user would."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    rows = [f"u{n % 40},i{draws.integers(30)},{n}" for n in range(800)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    convert.main(input="log.csv", domain_type="shop")
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
    with pytest.raises(UsageError, match="another --split is other data too"):
        train_sr_trad.main(**short, eval_only=True)
    assert "test targets from time 720 on" in capsys.readouterr().out
