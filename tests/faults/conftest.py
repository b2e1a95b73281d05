"""A shop whose original ids are numbers: its log, its domain `x`, and a SASRec run."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest

import train_sr_trad
from datasets import convert
from engine import cli

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


@pytest.fixture
def shop(folder):
    """The domain x with numbers as original ids, and a SASRec run."""
    convert_by("--input orders.csv")
    train_sr_trad.main(**TRAIN, domain_type="x")
