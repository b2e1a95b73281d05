"""Recommendation lists as a file: a row per user and rank, as CSV, JSON lines or parquet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from datasets.items import Items
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


@contextmanager
def writing(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    """What adds a table to a file, by its suffix; the file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".jsonl":
            options = {"orient": "records", "lines": True, "force_ascii": False}
            with open(partial, "w", encoding="utf-8") as file:
                yield lambda table: file.write(table.to_pandas().to_json(**options))
        elif path.suffix == ".csv":
            quoting = pa.csv.WriteOptions(quoting_style="needed")
            with pa.csv.CSVWriter(partial, SCHEMA, write_options=quoting) as file:
                yield file.write_table
        else:
            with pa.parquet.ParquetWriter(partial, SCHEMA) as file:
                yield file.write_table
