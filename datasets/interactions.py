"""The CSV contract: `reviewerID`, `asin` = JSON list of item ids in time order, optional `title`
and `time` (lists too); .csv, .gz or .xz.

This is the one place that says what a valid file is. Everything after it works on catalogue indices
0 .. N-1: the rank of an item id among the ids that occur in the file. Ids may start at 0 or at 1
and have gaps without changing any number.
"""

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from datasets.cells import parsed
from engine.errors import UsageError
from engine.files import Watched, replacing

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
    path: str | Path, ends_are_items: bool = False, split: str | None = None
) -> Interactions:
    """Read and check a sequence CSV.

    Args:
        ends_are_items: treat items at the ends of lists that look like padding as real items.
        split: leave_one_out (None too), or time:Q, which cuts all lists at the moment before which
            the share Q of all interactions lies.
    Raises:
        UsageError: one line naming the file, the row (the header is row 1) and the mend.
    """
    path, by_time = Path(path), (split or "").startswith("time:")
    names: dict[str, int] = {}  # reviewerID -> row
    flat, lengths, times = [], [], []
    ends = _Ends()
    digest = hashlib.sha256()
    for row, user, ids, cell in _rows(path, digest):
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
        ends.look(ids)
        if by_time:
            times.extend(_times(path, row, cell, len(ids)))
    if not names:
        raise UsageError(f"{path}: 0 users; the file has a header and no rows")
    if not flat:
        raise UsageError(f"{path}: every user's list is empty")
    length, moments = np.array(lengths, dtype=np.int64), np.array(times) if by_time else None
    data = _packed(path, names, flat, length, digest.hexdigest(), moments, split or "")
    if data.n_items == 1:
        raise UsageError(f"{path}: item {data.item_ids[0]} is the only one; there is no choice")
    if not ends_are_items:
        ends.check(path)
    return data


def _packed(
    path: Path,
    names: dict[str, int],
    flat: list[int],
    length: np.ndarray,
    sha256: str,
    times: np.ndarray | None = None,
    split: str = "",
) -> Interactions:
    """Users' lists of `length` items [U], one after the other in `flat`, as Interactions.

    Args:
        times: of all items, where the lists are split by time; None of leave-one-out.
    Raises:
        UsageError: nobody can be evaluated.
    """
    item_ids, items = np.unique(np.array(flat, dtype=np.int64), return_inverse=True)
    moment, enough, needs = None, length >= MINIMUM_LENGTH, f"{MINIMUM_LENGTH} items or more"
    if times is not None:
        moment, before = _before(times, length, Fraction(split.partition(":")[2]))
        enough = (length > before) & (before + 1 >= MINIMUM_LENGTH)
        position = np.arange(len(items)) - np.repeat(np.cumsum(length) - length, length)
        kept = before + enough
        items, length = items[position < np.repeat(kept, length)], kept
        sha256 = hashlib.sha256(f"{sha256} {split}".encode()).hexdigest()
        needs = f"{MINIMUM_LENGTH - 1} items before time {moment:.15g} and one after (--split)"
    if not enough.any():
        raise UsageError(
            f"{path}: no user has {needs}; leave-one-out needs train, valid and test items"
        )
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


def _before(times: np.ndarray, length: np.ndarray, share: Fraction) -> tuple[float, np.ndarray]:
    """The moment before which a share of all times lies, and how many of each user's are before it,
    int64 [U].
    """
    moment = np.sort(times)[int(share * len(times))].item()
    owner = np.repeat(np.arange(len(length)), length)
    return moment, np.bincount(owner[times < moment], minlength=len(length))


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63  # NaN is not


def _times(path: Path, row: int, cell: str | None, n: int) -> list[float]:
    """A user's times, one per item, ascending."""
    if cell is None:
        raise UsageError(
            f"{path}: has no column time, which --split=time reads; datasets.convert and"
            " datasets.process write it where a log has times"
        )
    times = parsed(cell)
    numbers = isinstance(times, list) and all(map(_is_time, times))
    if not numbers or len(times) != n:
        raise UsageError(
            f"{path}: row {row}: time is {cell[:40]!r}, expected a list of {n} numbers"
        )
    if times != sorted(times):
        raise UsageError(
            f"{path}: row {row}: times are not ascending, so --split=time has no meaning; make the"
            " file again with items in time order"
        )
    return times


class _Ends:
    """Counts the items at the ends of lists, to detect padding and markers."""

    def __init__(self) -> None:
        self.runs = {"start": 0, "end": 0}  # lists with a run of item 0
        self.items = {"start": Counter(), "end": Counter()}
        self.lists = 0

    def look(self, ids: list[int]) -> None:
        if not ids:
            return
        self.lists += 1
        for end, pair in (("start", ids[:2]), ("end", ids[:-3:-1])):
            self.runs[end] += pair == [0, 0]
            self.items[end][pair[0]] += 1

    def check(self, path: Path) -> None:
        """Raise UsageError where too many lists end alike."""
        mend = "remove it, or say --ends_are_items if it is meant"
        for end, count in self.runs.items():
            if count >= max(3, PADDED_SHARE * self.lists):
                raise UsageError(
                    f"{path}: item 0 appears in a run at the {end} of {count} of {self.lists}"
                    f" lists: padding? {mend}"
                )
        for end, counts in self.items.items():
            item, count = counts.most_common(1)[0]
            if self.lists >= FEW_USERS and count > ALIKE_SHARE * self.lists:
                raise UsageError(
                    f"{path}: item {item} appears at the {end} of {count} of {self.lists} lists:"
                    f" padding, or a marker? {mend}"
                )


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a plain, gzip or xz file for reading, by its suffix."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rb")


def read_histories(path: Path) -> Iterator[tuple[str, list[int]]]:
    """(reviewerID, item ids) of every row of a sequence CSV.

    Raises:
        UsageError: as `read_csv`.
    """
    for _, user, ids, _ in _rows(path, hashlib.sha256()):
        yield user, ids


def read_titles(path: Path) -> dict[int, str]:
    """Item id -> title, from the CSV's `title` column: lists (JSON or Python) beside the items.

    An item without a title, or a row whose lists differ in length, adds none.
    """
    titles: dict[int, str] = {}
    for row, header, fields in _records(path, hashlib.sha256()):
        names = [name.strip() for name in header]
        if "title" not in names:
            return {}
        ids = _item_ids(path, row, fields[names.index("asin")])
        shown = parsed(fields[names.index("title")])
        if isinstance(shown, list) and len(shown) == len(ids):
            for item, title in zip(ids, shown):
                if isinstance(title, str) and title and item not in titles:
                    titles[item] = title
    return titles


def _rows(path: Path, digest) -> Iterator[tuple[int, str, list[int], str | None]]:
    """(row number, reviewerID, item ids, the text of the times) of every data row."""
    columns = None
    for row, header, fields in _records(path, digest):
        if columns is None:
            columns = _columns(path, header)
            names = [name.strip() for name in header]
            _refuse_twice(path, names, "time")
            time = names.index("time") if "time" in names else None
        user, items = (fields[column] for column in columns)
        times = None if time is None else fields[time]
        yield row, user, _item_ids(path, row, items), times


def _records(path: Path, digest) -> Iterator[tuple[int, list[str], list[str]]]:
    """(row number, header, fields) of every data row."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory, expected a CSV file")
    csv.field_size_limit(2**31 - 1)
    try:
        with open_bytes(path) as raw:
            buffered = io.BufferedReader(Watched(raw, digest.update), 2**20)
            text = io.TextIOWrapper(buffered, encoding="utf-8-sig", newline="")
            yield from _parse(path, text)
    except UnicodeDecodeError:
        raise UsageError(
            f"{path}: not UTF-8 at byte {_first_bad_byte(path)}{_looks_like(path)};"
            f" expected a UTF-8 CSV with reviewerID,asin; {_converts(path)}"
        ) from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: damaged {path.suffix} file ({error})") from None
    except csv.Error as error:
        raise UsageError(f"{path}: not a CSV ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None


def _converts(path: Path) -> str:
    """What to do with a file that is another kind of log."""
    return f"python -m datasets.convert --input {path} --domain_type NAME makes one"


def _looks_like(path: Path) -> str:
    with open_bytes(path) as raw:
        start = raw.read(4)
    if start[:2] == b"\x1f\x8b":
        return ", it looks like gzip without .gz"
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return ", it looks like UTF-16"
    return ", it looks like parquet" if start == b"PAR1" else ""


def _first_bad_byte(path: Path) -> int:
    """Offset of the first byte that is not UTF-8, in the uncompressed file."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(path) as raw:
        while block := raw.read(2**20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            offset += len(block)
    return offset


def _parse(path: Path, text: io.TextIOBase) -> Iterator[tuple[int, list[str], list[str]]]:
    reader = csv.reader(text)
    header = next(reader, None)
    if not header:
        raise UsageError(f"{path} is empty; expected a header with reviewerID,asin")
    _columns(path, header)
    for row, fields in enumerate(reader, start=2):
        if not fields:
            continue
        if len(fields) != len(header):
            raise UsageError(
                f"{path}: row {row} has {len(fields)} fields, expected {len(header)};"
                " quote the list"
            )
        yield row, header, fields


def _columns(path: Path, header: list[str]) -> tuple[int, int]:
    names = [name.strip() for name in header]
    missing = [name for name in ("reviewerID", "asin") if name not in names]
    for name in ("reviewerID", "asin"):
        _refuse_twice(path, names, name)
    if not missing:
        return names.index("reviewerID"), names.index("asin")
    for separator in (";", "\t"):
        if len(names) == 1 and separator in names[0]:
            raise UsageError(
                f"{path} looks {separator!r}-separated; expected commas; {_converts(path)}"
            )
    near = {name: difflib.get_close_matches(name, names, n=1, cutoff=0.4) for name in missing}
    hints = [f"; is {match[0]!r} meant as {name}?" for name, match in near.items() if match]
    raise UsageError(
        f"{path}: missing column {', '.join(missing)};"
        f" found {', '.join(names)[:100]}{''.join(hints)}; {_converts(path)}"
    )


def _refuse_twice(path: Path, names: list[str], name: str) -> None:
    if names.count(name) > 1:
        raise UsageError(f"{path}: column {name} appears {names.count(name)} times")


def _item_ids(path: Path, row: int, cell: str) -> list[int]:
    if not cell.strip():
        raise UsageError(f"{path}: row {row}: asin is empty; a user without items is written []")
    try:
        ids = json.loads(cell)
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path}: row {row}: asin is not a valid JSON list ({cell[:40]!r});"
            f" use JSON such as [1, 2, 3]; {_converts(path)}"
        ) from None
    if not isinstance(ids, list):
        raise UsageError(
            f"{path}: row {row}: asin is {cell[:40]!r}, expected a list of whole numbers"
        )
    for position, item in enumerate(ids):
        if type(item) is not int:
            raise UsageError(
                f"{path}: row {row}: element {position} of asin is {str(item)[:40]!r}"
                f" ({type(item).__name__}), expected a whole number; {_converts(path)}"
            )
        if not 0 <= item <= LARGEST_ID:
            bound = f"{item} < 0" if item < 0 else f"{str(item)[:20]} > {LARGEST_ID}"
            raise UsageError(
                f"{path}: row {row}: item id {bound}; ids run from 0 to the number of items"
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
