"""The item table on disk: a pickle `{'item_embedding': FloatTensor [rows, dim]}`, read without
trusting it.

Tables that others wrote are read too: a tensor or an array alone, .npy, a file of torch.save, and a
dict with one entry. Row i is item id i in all of them.
"""

import codecs
import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import UsageError
from engine.files import file_sha256, replacing, write_json

KEY = "item_embedding"
LARGEST_GIB = 16  # of an item table; ten million items of 128 numbers are 5 GiB
SPARSE_GIB = 0.5  # of one that is nearly all gaps

LEGACY = b"\x80\x02\x8a\nl\xfc"  # a file of torch.save before its zip format

_ARRAY = object()  # stands for numpy.ndarray, whose own call would accept bytes as objects


def _empty_array(kind: object, shape: tuple, code: bytes) -> np.ndarray:
    """numpy's own first step of unpickling an array, for plain arrays alone."""
    if kind is not _ARRAY:
        raise pickle.UnpicklingError("an array of an unknown kind")
    return np._core.multiarray._reconstruct(np.ndarray, (0,), b"b")


def _plain_dtype(code: str, align: bool = False, copy: bool = False) -> np.dtype:
    """A dtype of plain numbers; none that holds objects, fields or raw bytes."""
    # a copy: the pickle then sets its byte order
    dtype = np.dtype(code, align, copy) if isinstance(code, str) else None
    if dtype is None or dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise pickle.UnpicklingError(f"array of {str(code)[:20]}, expected plain numbers")
    return dtype


def _storage(data: bytes) -> object:
    """torch's reducer for storages is a nested pickle: the weights-only reader opens it."""
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


_REBUILD = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("numpy.core.numeric", "_frombuffer"): np._core.numeric._frombuffer,
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _TensorUnpickler(pickle.Unpickler):
    """Allows only the globals that rebuild tensors and arrays."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _REBUILD:
            raise pickle.UnpicklingError(f"forbidden global {module}.{name}")
        return _REBUILD[module, name]


class _SameBytes(pickle.Pickler):
    """The same bytes for the same table: torch's reducer of storages writes an address."""

    def reducer_override(self, value):
        if not isinstance(value, torch.storage.TypedStorage):
            return NotImplemented
        stored = io.BytesIO()
        torch.save(value, stored)
        return torch.storage._load_from_bytes, (stored.getvalue(),)


def write_table(
    path: str | Path, item_ids: np.ndarray, vectors: Tensor, about: dict
) -> dict[str, Any]:
    """Write a table, zeros in the rows of ids that do not occur, and beside it as .json what it is;
    atomically.

    Args:
        item_ids: int64 [N], ascending.
        vectors: [N, dim].
    Returns:
        `about`, with the table's size and sha256.
    """
    path, rows = Path(path), int(item_ids[-1]) + 1
    table = torch.zeros(rows, vectors.shape[1])
    table[torch.from_numpy(item_ids)] = vectors.detach().cpu().float()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        with open(partial, "wb") as file:
            _SameBytes(file, protocol=4).dump({KEY: table})
        sha256 = file_sha256(partial)
    about = about | {"dim": table.shape[1], "rows": rows, "items": len(item_ids)}
    about["table_sha256"] = sha256
    write_json(path.with_suffix(".json"), about)
    print(f"wrote {path}: {rows:,} rows x {table.shape[1]}, {len(item_ids):,} of them items")
    return about


def check_size(path: Path, item_ids: np.ndarray, dim: int) -> None:
    """Refuse ids whose table, a row for every number up to the largest id, would be too large.
    Raises UsageError: more than LARGEST_GIB, or more than SPARSE_GIB that are nearly all gaps.
    """
    rows = int(item_ids[-1]) + 1
    gib = rows * dim * 4 / 2**30
    mostly_gaps = rows > 10 * len(item_ids)
    if gib > LARGEST_GIB or (mostly_gaps and gib > SPARSE_GIB):
        raise UsageError(
            f"{path}: ids reach {item_ids[-1]} for {len(item_ids)} items, an item table of"
            f" {gib:.1f} GiB; number the items from 0"
        )


def read_table(path: str | Path, item_ids: np.ndarray, largest: int | None = None) -> Tensor:
    """The rows of `item_ids` (int64 [N], ascending) of a pickled table, float32 [N, dim].

    Args:
        largest: the largest id that anything names; a table with more rows is numbered otherwise.
    Raises:
        UsageError: a pickle that holds anything but tensors, a wrong key, shape or dtype, too few
            rows, or rows of occurring items that are all zero or not finite.
    """
    path, table = Path(path), _opened(Path(path))
    if item_ids[-1] >= len(table):
        raise UsageError(
            f"{path}: max id {item_ids[-1]} but the item table has {len(table)} rows"
            " (the table of another domain?)"
        )
    if largest is not None and len(table) > largest + 1:
        raise UsageError(
            f"{path}: {len(table)} rows of width {table.shape[1]}, but no id is above {largest}:"
            " row i must be item id i; cut rows of padding off, or transpose it"
        )
    rows = table[torch.from_numpy(item_ids)].float()
    broken = item_ids[~torch.isfinite(rows).all(1).numpy()]
    empty = int((~rows.any(1)).sum())
    if len(broken):
        shown = ", ".join(map(str, broken[:5]))
        raise UsageError(f"{path}: rows {shown} contain NaN or infinity ({len(broken)} in all)")
    if empty:
        raise UsageError(
            f"{path}: {empty} of {len(rows)} occurring items have a row of zeros;"
            " give every item of the CSV a vector"
        )
    return rows


def ids_with_vectors(path: str | Path) -> np.ndarray:
    """The ids whose row is not all zeros, ascending; int64. Raises UsageError: as `read_table`, for
    what the file holds.
    """
    return (_opened(Path(path)) != 0).any(1).nonzero().flatten().numpy()


def _opened(path: Path) -> Tensor:
    """The table of a file, floating point [rows, dim]; maybe mapped into memory."""
    table = _content(path)
    if isinstance(table, dict):
        table = table.get(KEY, next(iter(table.values())) if len(table) == 1 else table)
    if isinstance(table, np.ndarray) and table.dtype.kind == "f" and table.dtype.itemsize <= 8:
        table = torch.as_tensor(table.astype(table.dtype.newbyteorder("="), copy=False))
    dense = isinstance(table, Tensor) and table.layout == torch.strided
    if dense and table.dim() == 2 and table.is_floating_point():
        return table.detach()
    found = type(table).__name__
    if isinstance(table, dict):
        found = f"{len(table)} entries: {', '.join(map(str, table))}"[:100]
    if isinstance(table, Tensor | np.ndarray):
        found = f"{table.dtype} of shape {tuple(table.shape)}"
    raise UsageError(
        f"{path}: the item table must be floating point of shape [items, dim], found {found};"
        f" write it as torch.save({{'{KEY}': table}}, path), row = item id"
    )


def _content(path: Path) -> object:
    """What a file holds, by its first bytes: numpy's, torch's, or a pickle's.

    The first two are mapped into memory, so that a large table is there once, not twice.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            if start == b"\x93NUMPY":
                return np.load(path, mmap_mode="c", allow_pickle=False)
            if start.startswith((b"PK", LEGACY)):
                zipped = start.startswith(b"PK")
                return torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
            return _TensorUnpickler(file).load()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        reason = str(error).split("\n")[0][:160]
        raise UsageError(f"{path}: refused, not a plain tensor ({reason})") from None
