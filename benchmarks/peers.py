"""RecTools' and RecBole's SASRec beside ours: equal width, blocks, length and full softmax.

    python -m venv peers && peers/bin/pip install torch==2.13.0 "rectools[torch]" recbole==1.2.1
    python -m benchmarks.peers --python peers/bin/python --data_path data/amazon2014_beauty.csv.xz
    python -m benchmarks.peers --python ... --data_path ... --epochs 3       # and NDCG@10

All learn to predict items[1:-2] of every user, and give lists of ten for items[:-1]. Each runs in a
process of its own, in turn, `--repeats` times; figures are medians. Without `--epochs` it takes
`--steps` optimizer steps after three that warm up; an epoch is its own number of steps times the
median. RecTools and ours have a sample per user with all its targets, RecBole one per target.
Writes peers.json and peers.md.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from engine import cli
from engine.cli import PositiveInt, flag
from engine.errors import RunError
from engine.files import markdown

WIDTH, BLOCKS, LENGTH, BATCH, RATE, DROPOUT = 64, 2, 30, 128, 1e-3, 0.2
K, WARM, LISTED = 10, 3, 2048  # length of a list; users who are listed for the rate
ALLOCATOR = {  # keep freed memory: every side is spared the page faults of large tensors
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}


RECBOLE = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "hidden_size": WIDTH,
    "inner_size": WIDTH,
    "n_layers": BLOCKS,
    "n_heads": 1,
    "hidden_dropout_prob": DROPOUT,
    "attn_dropout_prob": DROPOUT,
    "loss_type": "CE",
    "train_neg_sample_args": None,
    "train_batch_size": BATCH,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "use_gpu": False,
    "show_progress": False,
}


def step_seconds(ends: list[float]) -> float:
    """The median optimizer step, from when each ended, after the ones that warm up."""
    return float(np.median(np.diff(ends)[WARM:]))


def ours(lists: list[list[int]], steps: int, epochs: int) -> dict[str, Any]:
    import torch

    from datasets import sequences
    from datasets.interactions import Interactions
    from models.catalogue import catalogue_cross_entropy
    from models.sasrec import SASRec
    from serving.recommender import Recommender
    from utils.flags import SASRecModel

    flat, offsets = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
    n_items = int(flat.max()) + 1
    rows = np.arange(len(lists))
    data = Interactions(
        [], rows, flat.astype(np.int32), offsets, offsets[-1:], np.arange(n_items), ""
    )
    samples = sequences.training_samples(data, "last", LENGTH, every_position=True)
    shape = SASRecModel(emb_dim=WIDTH, hid_dim=WIDTH, num_blocks=BLOCKS, dropout=DROPOUT)
    model = SASRec(n_items, LENGTH, **shape.values())
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0, fused=True)
    per_epoch = -(-len(samples) // BATCH)
    ends = [time.perf_counter()]
    for step in range(epochs * per_epoch or steps + WARM):
        if step % per_epoch == 0:
            order = np.random.default_rng(step).permutation(len(samples))
        part = step % per_epoch * BATCH
        batch = samples.batch(order[part : part + BATCH], torch.device("cpu"))
        loss = catalogue_cross_entropy(model.states(batch.history), model.item_table, batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ends.append(time.perf_counter())
    table = model.item_table.detach()
    served = Recommender(model.user_encoder(), table, torch.zeros(n_items), LENGTH)
    known = [items[:-1] for items in lists]

    def recommend(users: range) -> list[list[int]]:
        return served.recommend([known[user] for user in users], K)[0].tolist()

    return {"step": step_seconds(ends), "per_epoch": per_epoch, "recommend": recommend}


def rectools(lists: list[list[int]], steps: int, epochs: int) -> dict[str, Any]:
    import pandas as pd
    import pytorch_lightning as lightning
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    def dataset(end: int) -> Dataset:
        rows = [(u, i, 1.0, t) for u, own in enumerate(lists) for t, i in enumerate(own[:end])]
        frame = pd.DataFrame(rows, columns=["user_id", "item_id", "weight", "datetime"])
        frame["datetime"] = pd.to_datetime(frame["datetime"], unit="D")
        return Dataset.construct(frame)

    ends = [time.perf_counter()]

    class Ticks(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    def trainer() -> Any:
        length = {"max_epochs": epochs} if epochs else {"max_steps": steps + WARM}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        kind = lightning.Trainer  # theirs
        return kind(accelerator="cpu", callbacks=[Ticks()], **length, **quiet)

    shape = {"n_factors": WIDTH, "n_blocks": BLOCKS, "n_heads": 1, "session_max_len": LENGTH}
    training = {"lr": RATE, "batch_size": BATCH, "dropout_rate": DROPOUT, "loss": "softmax"}
    model = SASRecModel(**shape, **training, get_trainer_func=trainer)
    model.fit(dataset(-2))
    known = dataset(-1)

    def recommend(users: range) -> list[list[int]]:
        found = model.recommend(np.array(users), known, K, filter_viewed=True)
        listed = defaultdict(list, found.groupby("user_id")["item_id"].agg(list))
        return [listed[user] for user in users]

    per_epoch = -(-sum(len(own) >= 4 for own in lists) // BATCH)
    return {"step": step_seconds(ends), "per_epoch": per_epoch, "recommend": recommend}


def recbole(lists: list[list[int]], steps: int, epochs: int) -> dict[str, Any]:
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.data.interaction import Interaction
    from recbole.model.sequential_recommender import SASRec

    folder = Path(tempfile.mkdtemp())
    lines = [f"{u}\t{i}\t{t}" for u, own in enumerate(lists) for t, i in enumerate(own)]
    (folder / "peer").mkdir()
    head = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "peer/peer.inter").write_text("\n".join([head, *lines]) + "\n")
    settings = RECBOLE | {"data_path": str(folder)}
    config = Config(model="SASRec", dataset="peer", config_dict=settings)
    data = create_dataset(config)
    train, _, _ = data_preparation(config, data)
    model = SASRec(config, train.dataset)
    optimizer, ends = torch.optim.Adam(model.parameters(), RATE), [time.perf_counter()]
    done = 0
    while not done or done < epochs * len(train):
        for batch in train:
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
            ends.append(time.perf_counter())
            done += 1
            if not epochs and done == steps + WARM:
                break
    model.eval()
    numbers = [np.array(data.token2id("item_id", [str(i) for i in own])) for own in lists]
    names = data.id2token("item_id", np.arange(data.item_num))

    @torch.no_grad()
    def recommend(users: range) -> list[list[int]]:
        histories = torch.zeros(len(users), LENGTH, dtype=torch.int64)
        for row, user in enumerate(users):
            last = numbers[user][:-1][-LENGTH:]
            histories[row, : len(last)] = torch.from_numpy(last)
        given = {"item_id_list": histories, "item_length": (histories > 0).sum(1)}
        scores = model.full_sort_predict(Interaction(given))
        scores[:, 0] = -torch.inf
        for row, user in enumerate(users):
            scores[row, numbers[user][:-1]] = -torch.inf
        return [[int(names[i]) for i in own] for own in scores.topk(K).indices.tolist()]

    return {"step": step_seconds(ends), "per_epoch": len(train), "recommend": recommend}


SIDES = {"ours": ours, "RecTools": rectools, "RecBole": recbole}


def work(side: str, path: str, steps: int, epochs: int) -> None:
    """In a process of its own: train, list, and print what was measured as JSON."""
    lists = json.loads(Path(path).read_text())
    found = SIDES[side](lists, steps, epochs)
    recommend = found.pop("recommend")
    users, listed = range(min(LISTED, len(lists))), []
    recommend(users[:64])  # warms up
    started = time.perf_counter()
    for start in range(0, len(users), 256):
        listed += recommend(users[start : start + 256])
    found["users_per_second"] = len(users) / (time.perf_counter() - started)
    if epochs:
        for start in range(len(users), len(lists), 256):
            listed += recommend(range(start, min(start + 256, len(lists))))
        gains = []
        for own, items in zip(listed, lists):
            gains.append(1 / np.log2(own.index(items[-1]) + 2) if items[-1] in own else 0.0)
        found["ndcg10"] = float(np.mean(gains))
    found["epoch_seconds"] = found["step"] * found["per_epoch"]
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(found))


@cli.command
def main(
    *,
    python: str = flag(help="the interpreter of an environment with both packages"),
    data_path: str = flag(help="a sequence CSV"),
    steps: PositiveInt = flag(20, "timed optimizer steps of each, where --epochs is not given"),
    epochs: int = flag(0, "whole epochs of each, with NDCG@10 after them; 0 times steps alone"),
    repeats: PositiveInt = flag(3, "rounds"),
    sides: list[str] = flag([*SIDES], "which ones"),
    keep_memory: bool = flag(True, "keep freed memory, which spares all of them page faults"),
    output_dir: str = flag("output/benchmarks", "where peers.json and peers.md go"),
) -> dict:
    """Race the three and print a table."""
    import torch

    from benchmarks import measure
    from datasets.interactions import read_csv

    data = read_csv(data_path)
    lists = np.split(data.items[: data.offsets[-1]], data.offsets[1:-1])
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lists.json"
        path.write_text(json.dumps([own.tolist() for own in lists]))
        for _ in range(repeats):
            for side in sides:
                interpreter = sys.executable if side == "ours" else python
                given = side, str(path), steps, epochs
                code = f"from benchmarks import peers; peers.work(*{given})"
                command = [interpreter, "-c", code]
                env = os.environ | (ALLOCATOR if keep_memory else {})
                done = subprocess.run(command, capture_output=True, text=True, env=env)
                if done.returncode:
                    raise RunError(f"{side}: {done.stderr[-500:]}")
                rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, rounds[side][-1])
    names = ["epoch_seconds", "peak_mib", "users_per_second", *["ndcg10"] * bool(epochs)]
    medians = {
        side: {name: float(np.median([found[name] for found in own])) for name in names}
        for side, own in rounds.items()
    }
    lines = []
    for side, found in medians.items():
        cells = [f"{found[name]:,.{4 if name == 'ndcg10' else 1}f}" for name in names]
        lines.append([side, *cells])
    about = measure.machine(torch.device("cpu")) | {"keep_memory": keep_memory, "epochs": epochs}
    result = about | {"rows": medians, "rounds": rounds}
    measure.write_report(Path(output_dir), "peers", result, markdown(["SASRec", *names], lines))
    return result


if __name__ == "__main__":
    cli.run(main)
