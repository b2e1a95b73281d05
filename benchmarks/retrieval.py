"""Top-k lists: exact tiles beside an index, many users and one history.

    python -m benchmarks.retrieval                                  # ten minutes on 2 cores
    python -m benchmarks.retrieval --n_items 12101 --users 512 --repeats 2       # a look
    pip install faiss-cpu                                           # for the rows of faiss

Item vectors are drawn around centres, as trained ones lie in clusters, and user vectors near items.
The model of the one-history row is a student of the built-in base `small` with random weights.
"""

import functools
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from datasets.prompts import read_template, tokenise
from models import base
from models.recommender import Recommender, top_k
from utils import cli, processes
from utils.evaluation import users_per_tile
from utils.files import check_writable
from utils.flags import PositiveInt, flag

DIM, CENTRES, SPREAD, NEAR = 128, 500, 0.5, 1.0
LINKS, SEARCH = 32, 128  # of HNSW: links per item, items looked at per query
SLOTS, LENGTH = 30, 6


class Row(NamedTuple):
    """One line of the table; recall is against the exact lists."""

    name: str
    users_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    recall: float
    build_seconds: float


def vectors(n_items: int, n_users: int) -> tuple[Tensor, Tensor]:
    """Item vectors [N, D] in clusters, and user vectors [U, D] near items."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centre = torch.randint(CENTRES, (n_items,), generator=generator)
    items = normal(CENTRES, DIM)[centre] + SPREAD * normal(n_items, DIM)
    users = items[torch.randint(n_items, (n_users,), generator=generator)]
    return items, users + NEAR * normal(n_users, DIM)


def exact(items: Tensor, k: int) -> Callable[[Tensor], np.ndarray]:
    """What recommend.py does: whole rows of scores, a tile at a time."""
    columns = items.T
    rows = users_per_tile(columns)

    def search(users: Tensor) -> np.ndarray:
        return torch.cat([top_k(part @ columns, k)[0] for part in users.split(rows)]).numpy()

    return search


def faiss_index(items: Tensor, k: int, kind: str) -> Callable[[Tensor], np.ndarray]:
    """faiss's flat index, or HNSW, by inner product."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if kind == "flat":
        index = faiss.IndexFlatIP(DIM)
    else:
        index = faiss.IndexHNSWFlat(DIM, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = SEARCH
    index.add(items.numpy())
    return lambda users: index.search(users.numpy(), k)[1]


def measured(
    name: str,
    build: Callable[[], Callable[[Tensor], np.ndarray]],
    users: Tensor,
    best: np.ndarray | None,
    repeats: int,
) -> tuple[Row, np.ndarray]:
    """Time an index on all users at once and on one at a time."""
    started = time.perf_counter()
    search = build()
    built = time.perf_counter() - started
    found = search(users)
    whole = [measure.seconds(lambda: search(users), users.device) for _ in range(repeats)]
    one = [measure.seconds(lambda: search(user), users.device) for user in users[:200].split(1)]
    recall = 1.0
    if best is not None:
        recall = np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found, best)])
    p50, p99 = (float(np.percentile(one, q)) * 1e3 for q in (50, 99))
    return Row(name, len(users) / float(np.median(whole)), p50, p99, float(recall), built), found


def one_history(items: Tensor, k: int) -> Row:
    """The whole of recommend.py for one history, the model in memory."""
    location = base.locate("small")
    ids = tokenise(read_template("alpaca"), location)
    shape = measure.Shape(base.read_config(location), *ids, items, SLOTS)
    model = shape.model(4, "full")
    recommender = Recommender(model.user_encoder(), items, torch.zeros(len(items)), SLOTS)
    generator = np.random.default_rng(0)
    histories = generator.integers(len(items), size=(220, LENGTH)).tolist()
    times = [
        measure.seconds(lambda: recommender.recommend([history], k), items.device)
        for history in histories
    ][20:]
    p50, p99 = (float(np.percentile(times, q)) * 1e3 for q in (50, 99))
    many = histories * 4
    seconds = measure.seconds(lambda: recommender.recommend(many, k), items.device)
    return Row("recommend, 4 layers of small", len(many) / seconds, p50, p99, 1.0, 0.0)


def table(sizes: dict[int, list[Row]]) -> str:
    lines = [
        "| items | what | users/s | one, p50 ms | one, p99 ms | recall@10 | build s |",
        "|---|---|---|---|---|---|---|",
    ]
    for n_items, rows in sizes.items():
        for row in rows:
            numbers = f"{row.users_per_second:,.0f} | {row.p50_ms:.2f} | {row.p99_ms:.2f}"
            last = f"{row.recall:.3f} | {row.build_seconds:.1f}"
            lines.append(f"| {n_items:,} | {row.name} | {numbers} | {last} |")
    return "\n".join(lines)


@cli.command
def main(
    *,
    n_items: list[PositiveInt] = flag([12101, 376858], "catalogue sizes"),
    users: PositiveInt = flag(1024, "user vectors per search"),
    k: PositiveInt = flag(10, "length of a list"),
    repeats: PositiveInt = flag(5, "searches per row; their median counts"),
    output_dir: str = flag("output/benchmarks", "where retrieval.json and retrieval.md go"),
) -> dict:
    """Measure exact lists beside faiss and print the table."""
    check_writable(Path(output_dir), "--output_dir")
    device = processes.choose_device("cpu")
    sizes: dict[int, list[Row]] = {}
    for size in n_items:
        items, queries = vectors(size, users)
        row, best = measured("exact", lambda: exact(items, k), queries, None, repeats)
        sizes[size] = [row]
        for kind in ("flat", "HNSW") if find_spec("faiss") else ():
            build = functools.partial(faiss_index, items, k, kind)
            sizes[size].append(measured(f"faiss {kind}", build, queries, best, repeats)[0])
        sizes[size].append(one_history(items, k))
        print(table(sizes).splitlines()[-1], flush=True)
    about = measure.machine(device) | {"users": users, "k": k, "repeats": repeats}
    rows = {str(size): [row._asdict() for row in found] for size, found in sizes.items()}
    result = about | {"rows": rows}
    measure.write_report(Path(output_dir), "retrieval", result, table(sizes))
    return result


if __name__ == "__main__":
    cli.run(main)
