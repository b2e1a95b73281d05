"""The CSV contract: `reviewerID`, `asin` = JSON list of item ids in time order, optional `title`
and `time` (lists too); .csv, .gz or .xz.

This is the one place that says what a valid file is. Everything after it works on catalogue indices
0 .. N-1: the rank of an item id among the ids that occur in the file. Ids may start at 0 or at 1
and have gaps without changing any number.
"""

import csv
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from datasets.cells import parsed, title_list
from engine.errors import UsageError
from engine.files import replacing

MINIMUM_LENGTH = 4  # leave-one-out with a training target: at least one item before it
LARGEST_ID = 2**31 - 2
PADDED_SHARE = 0.05  # of lists with a run of item 0 at one end
ALIKE_SHARE = 0.5  # of lists with the same item at one end
FEW_USERS = 10  # a trial file may end alike everywhere


@dataclass(frozen=True)
class Interactions:
    """All users, packed; those that are evaluated first: with at least MINIMUM_LENGTH items.

    users: reviewerID of the evaluated users, [U].
    rows: their data rows in the file (from 0), int64 [U].
    items: catalogue indices, int32, user after user.
    offsets: int64 [U + 1] into `items`.
    short_offsets: int64 [S + 1] into `items`, of the users that are not evaluated.
    item_ids: the ids in the file, ascending, int64 [N].
    sha256: of the uncompressed file, and of the split if it is not leave-one-out.
    moment: of a split by time: each list ends with its first item from here on, which is the test
        target; users without one end before it. None of leave-one-out.
    """

    users: list[str]
    rows: np.ndarray
    items: np.ndarray
    offsets: np.ndarray
    short_offsets: np.ndarray
    item_ids: np.ndarray
    sha256: str
    moment: float | None = None

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_trained(self) -> int:
        """Users that every step may train on."""
        return self.n_users + (self.n_short if self.moment is not None else 0)

    @property
    def n_short(self) -> int:
        """Users that are not evaluated."""
        return len(self.short_offsets) - 1


def read_csv(
    path: str | Path,
    ends_are_items: bool = False,
    split: str | None = None,
    zero_is_item: Callable[[], bool] = lambda: False,
) -> Interactions:
    """Read and check a sequence CSV.

    Args:
        ends_are_items: treat items at the ends of lists that look like padding as real items.
        split: leave_one_out (None too), or time:Q, which cuts all lists at the moment before which
            the share Q of all interactions lies.
        zero_is_item: whether item 0 has a name, so that no run of it is padding; called only where
            there is such a run.
    Raises:
        UsageError: one line naming the file, the row (the header is row 1) and the mend.
    """
    path, by_time = Path(path), (split or "").startswith("time:")
    names: dict[str, int] = {}  # reviewerID -> row
    flat, lengths, times = [], [], []
    content = _content(path)
    for row, cells, ids in _rows(path, content):
        user = cells["reviewerID"]
        if user in names:
            raise UsageError(
                f"{path}: reviewerID {user!r} appears in rows {names[user]} and {row};"
                " expected one row per user"
            )
        if not user.strip():
            raise UsageError(f"{path}: row {row}: reviewerID is empty")
        names[user] = row
        flat.extend(ids)
        lengths.append(len(ids))
        if by_time:
            times.extend(_times(path, row, cells.get("time"), len(ids)))
    if not names:
        raise UsageError(f"{path}: 0 users; the file has a header and no rows")
    if not flat:
        raise UsageError(f"{path}: every user's list is empty")
    ids, length = np.array(flat, dtype=np.int64), np.array(lengths, dtype=np.int64)
    moments = np.array(times) if by_time else None
    sha256 = hashlib.sha256(content).hexdigest()
    data = _packed(path, names, ids, length, sha256, moments, split or "")
    if data.n_items == 1:
        raise UsageError(f"{path}: item {data.item_ids[0]} is the only one; there is no choice")
    if not ends_are_items:
        _check_ends(path, ids, length, zero_is_item)
    return data


def _packed(
    path: Path,
    names: dict[str, int],
    flat: np.ndarray,
    length: np.ndarray,
    sha256: str,
    times: np.ndarray | None,
    split: str,
) -> Interactions:
    """Users' lists of `length` items [U], one after the other in `flat`; times of a split alone."""
    item_ids, items = np.unique(flat, return_inverse=True)
    moment, enough = None, length >= MINIMUM_LENGTH
    needs = f"{MINIMUM_LENGTH} items or more; leave-one-out needs train, valid and test items"
    if times is not None:
        share = Fraction(split.partition(":")[2])
        moment = np.sort(times)[int(share * len(times))].item()
        owner = np.repeat(np.arange(len(length)), length)
        before = np.bincount(owner[times < moment], minlength=len(length))
        enough = (length > before) & (before + 1 >= MINIMUM_LENGTH)
        position = np.arange(len(items)) - (np.cumsum(length) - length)[owner]
        kept = before + enough
        items, length = items[position < kept[owner]], kept
        sha256 = hashlib.sha256(f"{sha256} {split}".encode()).hexdigest()
        needs = f"{MINIMUM_LENGTH - 1} items before time {moment:.15g} and one after (--split)"
    if not enough.any():
        raise UsageError(f"{path}: no user has {needs}")
    of_enough = np.repeat(enough, length)
    offsets = np.concatenate([[0], np.cumsum(length[enough])])
    return Interactions(
        users=[user for user, kept in zip(names, enough) if kept],
        rows=np.fromiter(names.values(), np.int64)[enough] - 2,
        items=np.concatenate([items[of_enough], items[~of_enough]]).astype(np.int32),
        offsets=offsets,
        short_offsets=np.concatenate([[0], np.cumsum(length[~enough])]) + offsets[-1],
        item_ids=item_ids,
        sha256=sha256,
        moment=moment,
    )


def _times(path: Path, row: int, cell: str | None, n: int) -> list[float]:
    """A user's times, one per item, ascending."""
    if cell is None:
        raise UsageError(
            f"{path}: has no column time, which --split=time reads; datasets.convert and"
            " datasets.process write it where a log has times"
        )
    times = _numbers(cell, n)
    if times is None:
        raise UsageError(
            f"{path}: row {row}: time is {cell[:40]!r}, expected a list of {n} numbers"
        )
    if times != sorted(times):
        raise UsageError(
            f"{path}: row {row}: times are not ascending; make the file again in order"
        )
    return times


def _numbers(cell: str, n: int) -> list[float] | None:
    """A list of n finite numbers; None where the cell holds something else."""
    values = parsed(cell)
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    whole = numbers and len(values) == n and all(abs(value) < 2**63 for value in values)  # nor NaN
    return values if whole else None


def _check_ends(
    path: Path, flat: np.ndarray, length: np.ndarray, zero_is_item: Callable[[], bool]
) -> None:
    """Refuse lists of which too many have the same item, or a run of item 0, at an end."""
    length = length[length > 0]
    first, n = np.cumsum(length) - length, len(length)
    ends = {"start": (first, 1), "end": (first + length - 1, -1)}
    mend = "remove it, or say --ends_are_items if it is meant"
    for end, (at, inward) in ends.items():
        beside = flat[np.where(length > 1, at + inward, at)]
        count = int(((flat[at] == 0) & (beside == 0) & (length > 1)).sum())
        if count >= max(3, PADDED_SHARE * n) and not zero_is_item():
            raise UsageError(
                f"{path}: item 0 appears in a run at the {end} of {count} of {n} lists: padding?"
                f" {mend}"
            )
    for end, (at, _) in ends.items():
        item, count = Counter(flat[at].tolist()).most_common(1)[0]
        if n >= FEW_USERS and count > ALIKE_SHARE * n:
            raise UsageError(
                f"{path}: item {item} appears at the {end} of {count} of {n} lists: padding, or a"
                f" marker? {mend}"
            )


def read_histories(
    path: Path, timed: bool = False
) -> Iterator[tuple[str, list[int], list[float] | None]]:
    """(reviewerID, item ids, their times) of every row of a sequence CSV.

    Times are read where `timed`, and None where they are no ascending numbers. Raises UsageError:
    as `read_csv`.
    """
    for _, cells, ids in _rows(path, _content(path)):
        times = _numbers(cells.get("time", ""), len(ids)) if timed else None
        yield cells["reviewerID"], ids, times if times is None or times == sorted(times) else None


def read_titles(path: Path) -> dict[int, str]:
    """Item id -> title, from the CSV's `title` column: lists (JSON or Python) beside the items.

    An item without a title, or a row whose lists differ in length, adds none.
    """
    titles: dict[int, str] = {}
    for _, cells, ids in _rows(path, _content(path)):
        if "title" not in cells:
            break
        for item, title in zip(ids, title_list(cells["title"], len(ids))):
            if title:
                titles.setdefault(item, title)
    return titles


def _content(path: Path) -> bytes:
    """The uncompressed file."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory, expected a CSV file")
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as raw:
            content = raw.read()
        content.decode()
        return content
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start};"
            f" expected a UTF-8 CSV with reviewerID,asin; {_converts(path)}"
        ) from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: damaged {path.suffix} file ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, str], list[int]]]:
    """(row number, cell by column, item ids) of every data row."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    reader = csv.reader(text)
    try:
        names = _columns(path, next(reader, []))
        for row, fields in enumerate(reader, start=2):
            if len(fields) not in (0, len(names)):
                raise UsageError(
                    f"{path}: row {row} has {len(fields)} fields, expected {len(names)};"
                    " quote the list"
                )
            if fields:
                cells = dict(zip(reversed(names), reversed(fields)))  # of equal names the first
                yield row, cells, _item_ids(path, row, cells["asin"])
    except csv.Error as error:
        raise UsageError(f"{path}: not a CSV ({error})") from None


def _converts(path: Path) -> str:
    """What to do with a file that is another kind of log."""
    return f"python -m datasets.convert --input {path} --domain_type NAME makes one"


def _columns(path: Path, header: list[str]) -> list[str]:
    """The names of the columns, after it is clear that the needed ones are there once."""
    if not header:
        raise UsageError(f"{path} is empty; expected a header with reviewerID,asin")
    names = [name.strip() for name in header]
    missing = [name for name in ("reviewerID", "asin") if name not in names]
    for name in ("reviewerID", "asin", "time"):
        if names.count(name) > 1:
            raise UsageError(f"{path}: column {name} appears {names.count(name)} times")
    if not missing:
        return names
    raise UsageError(
        f"{path}: missing column {', '.join(missing)};"
        f" found {', '.join(map(repr, names))[:100]}; {_converts(path)}"
    )


def _item_ids(path: Path, row: int, cell: str) -> list[int]:
    try:
        ids = json.loads(cell)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list):
        raise UsageError(
            f"{path}: row {row}: asin is {cell[:40]!r}, expected a JSON list of whole numbers such"
            f" as [1, 2, 3], or [] where there are none; {_converts(path)}"
        )
    for position, item in enumerate(ids):
        if type(item) is not int or not 0 <= item <= LARGEST_ID:
            raise UsageError(
                f"{path}: row {row}: element {position} of asin is {str(item)[:40]!r}"
                f" ({type(item).__name__}), expected a whole number from 0 to {LARGEST_ID};"
                f" {_converts(path)}"
            )
    return ids


def write_csv(path: str | Path, rows: Iterable[tuple], dated: bool = False) -> None:
    """Write a sequence CSV (JSON lists, \\n line ends) atomically; the same input gives the same
    bytes.

    Args:
        rows: user, items, their titles and their times.
        dated: whether the times are written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["reviewerID", "asin", "title", *["time"] * dated])
        for user, *lists in rows:
            cells = (json.dumps(each, ensure_ascii=False) for each in lists[: 2 + dated])
            writer.writerow([user, *cells])
