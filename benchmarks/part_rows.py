"""Rows of benchmarks/throughput.py: the parts around the LLM, and SASRec."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, plain
from benchmarks.bench import DIM, Bench
from benchmarks.measure import Race, training_step
from datasets import process, sequences
from datasets.candidates import draw
from models.catalogue import catalogue_cross_entropy
from models.sasrec import SASRec
from utils.evaluation import evaluate

LARGE = 376_858  # items of the paper's largest domain


def catalogue(bench: Bench, n_rows: int = 256) -> None:
    """Cross-entropy over the catalogue, forward and backward, time and peak memory beyond its
    inputs.
    """
    for n_items, trained in (
        (bench.data.n_items, False),
        (LARGE, False),
        (bench.data.n_items, True),
        (LARGE, True),
    ):
        users, table, target = cross_entropy_inputs(n_rows, n_items, trained, bench.device)
        again = range(len(bench.batches))
        timed = bench.race(
            lambda _: catalogue_cross_entropy(users, table, target).backward(),
            lambda _: plain_cross_entropy(users, table, target),
            again,
        )
        arguments = (n_rows, n_items, trained, bench.device.type)
        peaks = [
            measure.peak_memory(cross_entropy_peak, which, *arguments, device=bench.device)
            for which in ("ours", "plain")
        ]
        own = table.numel() * 4 if trained else 0
        memory = {}
        if None not in peaks:
            memory = {
                "peak_mib": peaks[0] / 2**20,
                "plain_peak_mib": peaks[1] / 2**20,
                "table_gradient_mib": own / 2**20,
                "peak_share": (peaks[0] - own) / max(peaks[1], 1),
            }
        bench.add(
            f"catalogue CE, {n_rows} x {n_items:,} x {DIM}, {'trained' if trained else 'frozen'} "
            f"table",
            "ms",
            timed,
            1e3,
            **memory,
        )


def cross_entropy_inputs(
    n_rows: int, n_items: int, trained: bool, device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    users, table = (
        torch.randn(n_rows, DIM, generator=generator),
        torch.randn(n_items, DIM, generator=generator),
    )
    target = torch.randint(n_items, (n_rows,), generator=generator)
    return (
        users.to(device).requires_grad_(),
        table.mul_(0.1).to(device).requires_grad_(trained),
        target.to(device),
    )


def plain_cross_entropy(users: Tensor, table: Tensor, target: Tensor) -> None:
    F.cross_entropy(users @ table.T, target).backward()


def cross_entropy_peak(which: str, n_rows: int, n_items: int, trained: bool, device: str):
    """For measure.peak_memory: one forward and backward."""
    inputs = cross_entropy_inputs(n_rows, n_items, trained, device)
    if which == "plain":
        return functools.partial(plain_cross_entropy, *inputs)
    return lambda: catalogue_cross_entropy(*inputs).backward()


def candidates(bench: Bench, n_users: int = 512, n_plain: int = 16) -> None:
    rng = np.random.default_rng(0)
    lengths = np.resize(np.diff(bench.data.offsets), n_users)
    owner = np.repeat(np.arange(n_users), lengths)
    for n_items in (bench.data.n_items, LARGE):
        met = rng.integers(0, n_items, len(owner))
        pool, histories = (
            set(range(n_items)),
            [met[owner == user].tolist() for user in range(n_plain)],
        )
        k = min(999, n_items - int(lengths.max()))

        def plain_draw(_):
            return [plain.plain_candidates(pool, history, k) for history in histories]

        timed = bench.race(
            lambda _: draw((0, 1), np.arange(n_users), owner, met, n_items, k),
            plain_draw,
            range(len(bench.batches)),
        )
        per_user = Race(
            timed.ours / n_users, timed.plain / n_plain, timed.ratio * n_users / n_plain
        )
        bench.add(f"{k} candidates per user of {n_items:,} items", "users/s", per_user)


def ranking(bench: Bench, n_users: int = 128) -> None:
    """Sampled and full ranks by counting in tiles, against one score matrix that is sorted for the
    full rank alone.
    """
    for n_items in (bench.data.n_items, LARGE):
        users, table, target = (
            t.detach() for t in cross_entropy_inputs(n_users, n_items, False, bench.device)
        )
        seen = target[:, None].repeat(1, 6)
        negatives = torch.randint(n_items, (n_users, 999), device=bench.device)
        batch = sequences.EvaluationBatch(users, target, seen, negatives)
        history = [[int(t)] for t in target]
        timed = bench.race(
            lambda _: evaluate(lambda vectors: vectors, table, [batch]),
            lambda _: plain.plain_ranks(users, table, target, history),
            range(len(bench.batches)),
        )
        bench.add(f"ranks among {n_items:,} items", "users/s", timed, n_users)


def sasrec(bench: Bench, batch_size: int = 256) -> None:
    """Step 1 at its defaults, every position a target. An epoch: its steps times the median."""
    per_epoch = len(bench.samples) / batch_size
    rng = np.random.default_rng(0)
    batches = [
        rng.choice(len(bench.samples), min(batch_size, len(bench.samples)), replace=False)
        for _ in bench.batches
    ]
    for hid_dim in (32, 128):
        torch.manual_seed(0)
        shape = {
            "emb_dim": DIM,
            "hid_dim": hid_dim,
            "num_blocks": 2,
            "num_heads": 1,
            "dropout": 0.5,
            "norm": "query",
            "init_std": 0.02,
        }
        ours, theirs = (
            SASRec(bench.data.n_items, bench.shape.slots, **shape).to(bench.device)
            for _ in range(2)
        )

        def loss(rows, model, states, cross_entropy):
            history, targets = (
                bench.samples.histories(rows).to(bench.device),
                bench.samples.shifted_targets(rows).to(bench.device),
            )
            real = targets != bench.data.n_items
            return cross_entropy(states(history)[real], model.item_table, targets[real])

        timed = bench.race(
            training_step(
                ours, lambda rows: loss(rows, ours, ours.states, catalogue_cross_entropy)
            ),
            training_step(
                theirs,
                lambda rows: loss(
                    rows, theirs, theirs._padded_states, lambda u, t, y: F.cross_entropy(u @ t.T, y)
                ),
            ),
            batches,
        )
        targets = float(np.mean([bench.samples.lengths()[rows].sum() for rows in batches]))
        product = 2 * 3 * targets * bench.data.n_items * DIM  # logits, two gradients
        bench.add(f"SASRec epoch, width {hid_dim}, full catalogue", "s", timed, per_epoch, product)


def reviews(bench: Bench, n_rows: int = 200_000) -> None:
    """Raw reviews to sequences: streamed, against pandas over the whole file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reviews.json"
        write_reviews(path, n_rows)

        def ours(_):
            raw, _ = process.read_reviews(path, 3)
            kept = process.filter_reviews(raw, 5, 20, 5, None, lambda *_: None)
            process.write_domain(kept, {}, Path(folder) / "ours.csv")

        def theirs(_):
            plain.plain_process(path, 3, 5, 20, 5).to_csv(Path(folder) / "plain.csv", index=False)

        timed = bench.race(ours, theirs, range(3))
        assert (
            len(pd.read_csv(Path(folder) / "ours.csv"))
            == len(pd.read_csv(Path(folder) / "plain.csv"))
            > 0
        )
    bench.add("datasets.process, reviews to sequences", "rows/s", timed, n_rows)


def write_reviews(path: Path, n_rows: int) -> None:
    """Made-up reviews with the fields and about the length of the real ones."""
    rng = np.random.default_rng(0)
    user, item = (
        rng.integers(0, n_rows // 12, n_rows),
        (rng.pareto(1.2, n_rows) * 50).astype(int) % (n_rows // 40),
    )
    text = "It does what it says and arrived in time; I would buy it again for a friend. " * 3
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n_rows):
            row = {
                "overall": float(rng.integers(1, 6)),
                "verified": True,
                "reviewTime": "09 4, 2015",
                "reviewerID": f"A{user[i]:012d}",
                "asin": f"B{item[i]:09d}",
                "reviewerName": "A buyer",
                "reviewText": text,
                "summary": "Five Stars",
                "unixReviewTime": 1441324800 + i,
            }
            file.write(json.dumps(row) + "\n")
