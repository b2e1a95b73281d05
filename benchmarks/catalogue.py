"""How cost grows with the catalogue: the loss, evaluation, lists and the item table on disk.

    python -m benchmarks.catalogue                                  # ten minutes on 2 cores
    python -m benchmarks.catalogue --n_items 10000                  # a look

Each row is a fresh process. Its peak memory holds everything, the item table too. There is no plain
form beside it: at ten million items that one does not fit.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from datasets.item_table import read_table
from datasets.sequences import EvaluationBatch
from models.catalogue import catalogue_cross_entropy
from models.recommender import Recommender
from utils import cli, processes
from utils.evaluation import collect, rank_users
from utils.files import check_writable
from utils.flags import PositiveInt, flag

DIM, SLOTS, LENGTH, CANDIDATES, K = 128, 30, 10, 999, 10
DRAWN, SHORTER = 2**16, 1e-3  # vectors that are drawn; a larger table has them shorter again


class Row(NamedTuple):
    """Of one work on a catalogue of so many items: users served, seconds, peak bytes."""

    items: int
    work: str
    users: int
    seconds: float
    peak: int | None


def item_table(n_items: int) -> Tensor:
    """Item vectors [N, D], the same few at many lengths, made without a second copy."""
    torch.manual_seed(0)
    drawn, table = torch.randn(min(n_items, DRAWN), DIM) / DIM**0.5, torch.empty(n_items, DIM)
    for i, part in enumerate(table.split(DRAWN)):  # equal rows would be equal scores, and slow
        part.copy_(drawn[: len(part)] * (1 - i * SHORTER))
    return table


def loss_step(n_items: int, n_users: int) -> Callable[[], object]:
    """Cross-entropy over the whole catalogue and its gradient to the users, as an LLM step has."""
    table = item_table(n_items)
    users = torch.randn(n_users, DIM, requires_grad=True)
    target = torch.randint(n_items, (n_users,))
    return lambda: catalogue_cross_entropy(users, table, target).backward()


def evaluation(n_items: int, n_users: int) -> Callable[[], object]:
    """Ranks of some users under all three protocols."""
    columns, users = item_table(n_items).T, torch.randn(n_users, DIM)
    target = torch.randint(n_items, (n_users,))
    seen = torch.randint(n_items, (n_users, LENGTH))
    candidates = torch.randint(n_items, (n_users, CANDIDATES))
    batch = EvaluationBatch(seen, target, seen, candidates)
    return lambda: collect([rank_users(users, columns, batch)])


def lists(n_items: int, n_users: int) -> Callable[[], object]:
    """Top-10 lists by recommend.py's code, from user vectors that are there."""
    users, table = torch.randn(n_users, DIM), item_table(n_items)
    histories = torch.randint(n_items, (n_users, LENGTH)).tolist()
    recommender = Recommender(lambda _: users, table, torch.zeros(n_items), SLOTS)
    return lambda: recommender.recommend(histories, K)


def reading(path: str, n_items: int) -> Callable[[], object]:
    """The item table from disk, checked."""
    return lambda: read_table(path, np.arange(n_items))


def measured(work: str, n_items: int, n_users: int, prepare: Callable, *arguments: object) -> Row:
    device = torch.device("cpu")
    run = prepare(*arguments)
    run()
    seconds = measure.seconds(run, device)
    del run
    peak = measure.peak_memory(prepare, *arguments, device=device, with_preparation=True)
    return Row(n_items, work, n_users, seconds, peak)


def rows_of(n_items: int, n_users: int, folder: Path) -> list[Row]:
    works = {"cross-entropy": loss_step, "evaluation": evaluation, "top-10 lists": lists}
    rows = []
    for work, prepare in works.items():
        rows.append(measured(work, n_items, n_users, prepare, n_items, n_users))
    path = folder / "table.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (n_items, DIM))
    stored[:] = item_table(n_items).numpy()
    stored.flush()
    del stored
    rows.append(measured("reading the table", n_items, 0, reading, str(path), n_items))
    path.unlink()
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| items | what | ms per user | seconds | peak GiB |", "|---|---|---|---|---|"]
    for row in rows:
        each = f"{row.seconds / row.users * 1e3:.2f}" if row.users else ""
        peak = f"{row.peak / 2**30:.2f}" if row.peak else "died"
        lines.append(f"| {row.items:,} | {row.work} | {each} | {row.seconds:.2f} | {peak} |")
    return "\n".join(lines)


@cli.command
def main(
    *,
    n_items: list[PositiveInt] = flag([10**4, 10**5, 10**6, 10**7], "catalogue sizes"),
    users: PositiveInt = flag(256, "users in a batch"),
    output_dir: str = flag("output/benchmarks", "where catalogue.json and catalogue.md go"),
) -> dict:
    """Measure the loss, evaluation, lists and the item table over catalogue sizes."""
    check_writable(Path(output_dir), "--output_dir")
    device = processes.choose_device("cpu")
    rows: list[Row] = []
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        for size in n_items:
            rows += rows_of(size, users, Path(folder))
            print("\n".join(table(rows).splitlines()[-4:]), flush=True)
    result = measure.machine(device) | {"users": users, "rows": [row._asdict() for row in rows]}
    measure.write_report(Path(output_dir), "catalogue", result, table(rows))
    return result


if __name__ == "__main__":
    cli.run(main)
