"""Recommendation lists as a file: a row per user and rank, as CSV, JSON lines or parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from datasets.items import Items
from engine.errors import UsageError
from engine.files import replacing

SCHEMA = pa.schema(
    [
        ("reviewerID", pa.string()),
        ("rank", pa.int32()),
        ("item_id", pa.int64()),
        ("asin", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
    ]
)
SUFFIXES = (".csv", ".jsonl", ".parquet")


def check_suffix(path: Path) -> None:
    """Raise UsageError where the suffix says no known form."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--output={path}: must end in {', '.join(SUFFIXES)}")


def as_table(users: list[str], items: np.ndarray, scores: np.ndarray, names: Items) -> pa.Table:
    """The lists of `users`, a row per rank.

    Args:
        items: catalogue indices [n, k], -1 where a list is shorter.
        scores: [n, k].
    """
    user, rank = np.nonzero(items >= 0)
    index = items[user, rank]
    columns = [
        [users[i] for i in user],
        (rank + 1).tolist(),
        names.ids[index].tolist(),
        [names.asins[i] for i in index],
        [names.titles[i] for i in index],
        [float(f"{score:.6g}") for score in scores[user, rank].tolist()],
    ]
    return pa.table(columns, schema=SCHEMA)


class Writer:
    """Writes tables to a file that appears only when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.form = path, path.suffix
        self.replacing = replacing(path)
        self.file: Any = None

    def __enter__(self) -> "Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.replacing.__enter__()
        if self.form == ".parquet":
            self.file = pa.parquet.ParquetWriter(partial, SCHEMA)
        elif self.form == ".csv":
            options = pa.csv.WriteOptions(quoting_style="needed")
            self.file = pa.csv.CSVWriter(partial, SCHEMA, write_options=options)
        else:
            self.file = open(partial, "w", encoding="utf-8")
        return self

    def add(self, table: pa.Table) -> None:
        if self.form == ".jsonl":
            frame = table.to_pandas()
            self.file.write(frame.to_json(orient="records", lines=True, force_ascii=False))
        else:
            self.file.write_table(table)

    def __exit__(self, *failed) -> None:
        self.file.close()
        self.replacing.__exit__(*failed)
