"""Recommendation lists as a file: a row per user and place, as CSV, JSON lines or parquet."""

import csv
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.items import Items
from engine import processes
from engine.errors import UsageError
from engine.files import replacing

COLUMNS = ("reviewerID", "rank", "item_id", "asin", "title", "score")
SUFFIXES = (".csv", ".jsonl", ".parquet")


class Rows(NamedTuple):
    """Some users' lists, a row per place."""

    users: list[str]
    ranks: list[int]
    ids: list[int]
    asins: list[str]
    titles: list[str]
    scores: list[float]


def rows(users: list[str], items: np.ndarray, scores: np.ndarray, names: Items) -> Rows:
    """The lists of `users` as rows.

    Args:
        items: catalogue indices [n, k], -1 where a list is shorter.
        scores: [n, k].
    """
    user, place = np.nonzero(items >= 0)
    index = items[user, place]
    return Rows(
        [users[i] for i in user],
        (place + 1).tolist(),
        names.ids[index].tolist(),
        [names.asins[i] for i in index],
        [names.titles[i] for i in index],
        [float(f"{score:.6g}") for score in scores[user, place].tolist()],
    )


class Writer:
    """Writes rows to a file that appears only when it is complete.

    With several processes, each writes its own part, and the first one joins them in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None
        self.parquet: Any = None

    @staticmethod
    def check(path: Path) -> None:
        """Raise UsageError where the suffix says no known form."""
        if path.suffix not in SUFFIXES:
            raise UsageError(f"--output={path}: must end in {', '.join(SUFFIXES)}")

    def part(self, rank: int) -> Path:
        return self.path.with_name(f".tmp-{self.path.name}-part{rank}")

    def __enter__(self) -> "Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.part(processes.rank())
        if self.path.suffix == ".parquet":
            kinds = pa.string(), pa.int32(), pa.int64(), pa.string(), pa.string(), pa.float32()
            self.parquet = pq.ParquetWriter(part, pa.schema(list(zip(COLUMNS, kinds))))
            return self
        self.file = open(part, "w", encoding="utf-8", newline="")
        if self.path.suffix == ".csv" and processes.is_first():
            csv.writer(self.file, lineterminator="\n").writerow(COLUMNS)
        return self

    def add(self, found: Rows) -> None:
        """Append rows."""
        if self.parquet is not None:
            self.parquet.write_table(pa.table(list(found), schema=self.parquet.schema))
        elif self.path.suffix == ".csv":
            csv.writer(self.file, lineterminator="\n").writerows(zip(*found))
        else:
            for row in zip(*found):
                self.file.write(orjson.dumps(dict(zip(COLUMNS, row))).decode() + "\n")

    def __exit__(self, failed: type | None, *_) -> None:
        (self.parquet or self.file).close()
        if failed is None:
            processes.barrier()
            if processes.is_first():
                self._join()
            processes.barrier()
        self.part(processes.rank()).unlink(missing_ok=True)

    def _join(self) -> None:
        parts = [self.part(rank) for rank in range(processes.world())]
        with replacing(self.path) as partial:
            if self.parquet is not None:
                with pq.ParquetWriter(partial, self.parquet.schema) as whole:
                    for part in parts:
                        file = pq.ParquetFile(part)
                        for group in range(file.num_row_groups):
                            whole.write_table(file.read_row_group(group))
                return
            with open(partial, "wb") as whole:
                for part in parts:
                    with open(part, "rb") as file:
                        shutil.copyfileobj(file, whole)
