"""A log of interactions: its rows, or lists of items, and whether they can be what they seem."""

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets import values
from datasets.cells import (
    NOTHING,
    canonical,
    clean_title,
    form_in,
    parse_list,
    parsed,
    splitter,
    title_list,
    whole,
)
from datasets.columns import Columns
from datasets.domain import SUFFIXES
from datasets.filters import Log
from datasets.items import listing_of, read_listing
from datasets.tables import Table, bare, open_table
from engine import cli
from engine.errors import UsageError

ITEM_LISTS = (  # lists of items: item and title
    ("asin", "title"),
    ("parent_asin", "title"),
    ("item_id", "title"),
    ("item_id", "movie_title"),
    ("movieid", "title"),
)
NO_VALUE = {form for word in NOTHING - {"-", "-1"} for form in (word, word.upper(), word.title())}
NO_VALUE |= {"NaN", "NaT"}  # of times and ratings
SHAPES = {  # of names that are none
    re.compile(r"-?\d([.,]\d+)?[eE]\+\d+"): (
        "was cut by a spreadsheet or a float; save the ids as text, from their source"
    ),
    re.compile(r"\{.*:.*\}", re.DOTALL): "is an object; write its id alone as text",
}
A_LIST = re.compile(  # in brackets, or several ids, each of which has a digit
    r"(?s)\s*[\[({].*[\])}]\s*|[^\s,|]*\d[^\s,|]*([\s,|]+[^\s,|]*\d[^\s,|]*)+"
)
FEW_USERS, LARGE_SHARE = 20, 0.1


class Advice(NamedTuple):
    """How the command that reads a log mends it: a row that lacks something, a column that is not
    what it seems, items that look like lists, times of another form, another list of items.
    """

    missing: str = "--drop_missing true leaves them out"
    column: str = "--{role} names another"
    lists: str = "--lists yes reads lists, --lists no takes it as an id"
    time: str = "--time_format reads other forms"
    titles: str = "--items_columns ITEM,TITLE names others"


class Names:
    """Codes of ids, in the order in which they come; -1 for a missing one."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def encode(self, cells: pd.Series) -> np.ndarray:
        """int32 [n], a code per cell."""
        coded, distinct = pd.factorize(cells.astype(object), use_na_sentinel=False)
        names, codes = map(canonical, distinct), self.codes
        own = [codes.setdefault(name, len(codes)) if name else -1 for name in names]
        return np.array(own, dtype=np.int32)[coded]

    def settled(self, in_order: bool) -> tuple[list[str], np.ndarray]:
        """The ids, sorted where `in_order`, and the place of each code among them, int32.

        Where all are whole numbers they are sorted as such, and the .0 of a column of floats goes.
        Elsewhere 2.0 may stand beside 2.1.
        """
        names = [whole(name) for name in self.codes]
        numbers = all(re.fullmatch(r"-?[0-9]{1,4000}", name) for name in names)
        names = names if numbers else [*self.codes]
        ids = list(dict.fromkeys(names))
        if in_order:
            ids.sort(key=(lambda name: (int(name), name)) if numbers else None)
        place = {name: i for i, name in enumerate(ids)}
        return ids, np.array([place[name] for name in names], dtype=np.int32)


def read_log(
    table: Table,
    columns: Columns,
    min_rating: float | None = None,
    drop: Container[str] = (),
    new_events: bool = False,
    advice: Advice = Advice(),
    time_format: str | None = None,
) -> tuple[Log, dict[str, str]]:
    """The interactions of a log, or of lists, in file order, and item -> title; both are judged.

    Args:
        min_rating: lower ones are left out; the columns have a rating then.
        new_events: of users to serve: one user or one item is fine, and users stay in the order of
            the file.
        drop: roles (user, item, time, rating) without which a row is left out.
        advice: of the command that reads it.
        time_format: of its times, such as %d.%m.%Y; numbers and ISO dates need none.
    Raises:
        UsageError: the file is damaged, a cell is wrong (its row is named), or what was read is no
            log of several users and items.
    """
    values.judge_form(time_format or "", columns.time is not None)
    users, items = Names(), Names()
    read = [*["time"] * (columns.time is not None), *["rating"] * (min_rating is not None)]
    missing: dict[str, list[int]] = {role: [] for role in ("user", "item", *read)}  # rows
    titles: dict[int, str] = {}  # by code
    given = table, columns, min_rating, time_format, advice.time
    parts, n_rows, low, dates = _read_rows(*given, users, items, missing, titles)
    names, of_user = users.settled(in_order=not new_events)
    ids, of_item = items.settled(in_order=True)
    if new_events and names and not n_rows:  # their lists are empty
        return Log(names, [], *[np.zeros(0, dtype=np.int64)] * 3), {}
    cli.check((n_rows > 0, f"{table.path}: holds no interaction"))
    _judge_missing(table.path, missing, drop, columns, advice.missing)
    user, item, time, rows = (np.concatenate(column) for column in zip(*parts))
    log = Log(names, ids, of_user[user], of_item[item], time)
    if min_rating is not None:
        print(f"{low:,} interactions rated below {min_rating:g} left out")
    lower = "; lower --min_rating" * (min_rating is not None)
    cli.check((len(user) > 0, f"{table.path}: nothing is left of {n_rows:,} rows{lower}"))
    _judge(table, log, columns, new_events, advice)
    if columns.time is not None:
        values.judge_times(table.path, time, rows, dates)
        first, last = (values.shown_time(end, dates) for end in (time.min(), time.max()))
        print(f"times from {first} to {last}")
    named: dict[int, str] = {}
    for code, title in titles.items():
        named[of_item[code]] = named.get(of_item[code]) or title
    return log, {name: named.get(code, "") for code, name in enumerate(ids)}


def _read_rows(
    table: Table,
    columns: Columns,
    min_rating: float | None,
    form: str | None,
    mend: str,
    users: Names,
    items: Names,
    missing: dict[str, list[int]],
    titles: dict[int, str],
) -> tuple[list[tuple[np.ndarray, ...]], int, int, bool | None]:
    """Codes, times and rows of what is kept, frame after frame; how many rows there are, and how
    many are rated too low; whether times are dates. Fills in the last four arguments.
    """
    parts, zones = [], []
    low, n_rows, dates = 0, 0, None
    for frame, rows in _frames(table, columns, users):
        n_rows += len(frame)
        for role in ("user", "item"):
            values.refuse_rounded(table.path, frame[getattr(columns, role)], rows, role)
        user, item = users.encode(frame[columns.user]), items.encode(frame[columns.item])
        time, lacks = np.arange(n_rows - len(frame), n_rows), {"user": user < 0, "item": item < 0}
        kept = _whole_rows(frame, rows, columns, lacks, missing)
        frame, user, item, time, rows = (part[kept] for part in (frame, user, item, time, rows))
        if columns.time is not None and len(frame):
            dates = values.are_dates(frame[columns.time], form) if dates is None else dates
            time = values.times_of(table.path, frame[columns.time], rows, dates, form, zones, mend)
        if columns.title is not None:
            _add_titles(titles, item, frame[columns.title])
        high = np.ones(len(frame), dtype=bool)
        if min_rating is not None:
            high = (
                values.numbers_of(table.path, frame[columns.rating], rows, "rating") >= min_rating
            )
            low += int((~high).sum())
        parts.append((user[high], item[high], time[high], rows[high]))
    return parts, n_rows, low, dates


def _whole_rows(
    frame: pd.DataFrame, rows: np.ndarray, columns: Columns, lacks: dict, missing: dict
) -> np.ndarray:
    """Mask of the rows that have all that is read; the others are noted in `missing`, by role.

    Args:
        lacks: role -> mask of the rows without it, of user and item.
    """
    kept = ~(lacks["user"] | lacks["item"])
    for role, noted in missing.items():
        mask = lacks.get(role)
        if mask is None:
            cells = frame[getattr(columns, role)]
            empty = cells.isna() | cells.isin(NO_VALUE) if values.are_texts(cells) else cells.isna()
            mask = empty.to_numpy() & kept
        noted += rows[mask].tolist()
        kept &= ~mask
    return kept


def _frames(
    table: Table, columns: Columns, users: Names
) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """An interaction per row, and the row of the file of each. Codes the users of empty lists."""
    asins = original_ids(table.path) if columns.lists else {}
    for frame in table.frames([name for name in columns if isinstance(name, str)]):
        rows = frame.index.to_numpy()
        if columns.lists:
            users.encode(frame[columns.user])
            frame, rows = _unrolled(table.path, frame, rows, columns, asins)
        yield frame, rows


def read_titles(
    path: Path, named: list[str], kept: set[str], advice: Advice = Advice()
) -> dict[str, str]:
    """Item -> title, of a list of items; of an item's rows the first with a title counts.

    Args:
        named: its columns of items and titles; empty where they have known names.
    Raises:
        UsageError: which columns are item and title is not known, or no item is in `kept`.
    """
    table = open_table(path, named, {name for pair in ITEM_LISTS for name in pair})
    by_name = {bare(name): name for name in reversed(table.columns)}
    pairs = [(by_name[a], by_name[b]) for a, b in ITEM_LISTS if {a, b} <= by_name.keys()]
    if not table.header and table.separator == "::":  # MovieLens' movies.dat
        pairs += [(table.columns[0], table.columns[1])]
    known = {names: sum(_as_in(kept, c) in kept for c in table.cells(names[0])) for names in pairs}
    pair = tuple(named) or max(pairs, key=known.get, default=())
    if not pair or not (table.kind == "json" or set(pair) <= set(table.columns)):
        raise UsageError(
            f"{path}: expected the columns {' and '.join(named or ('item_id', 'title'))}, it has"
            f" {table.shown()}; {advice.titles}"
        )
    titles: dict[str, str] = {}
    name = ""
    for frame in table.frames([*pair]):
        for cell, text in zip(frame[pair[0]], frame[pair[1]]):
            name = _as_in(kept, cell)
            if name in kept:
                titles[name] = titles.get(name) or clean_title(text)
    if not titles:
        raise UsageError(
            f"{path}: none of its items is in the log: {name!r} there, {min(kept)!r} here"
        )
    return {name: title for name, title in titles.items() if title}


def _as_in(kept: set[str], cell: object) -> str:
    """An id as the log writes it."""
    name = canonical(cell)
    return form_in(kept, name) or name


def _add_titles(titles: dict[int, str], items: np.ndarray, cells: pd.Series) -> None:
    """The first title of each item counts."""
    for code, cell in zip(items.tolist(), cells):
        if not titles.get(code):
            titles[code] = clean_title(cell)


def original_ids(path: Path) -> dict[str, str]:
    """Number -> original id, of the items.csv beside a domain's CSV; empty where it names none."""
    listing = listing_of(path)
    beside = path.name.endswith(SUFFIXES) and listing.is_file()
    named = read_listing(listing) if beside else {}
    found = {str(number): asin for number, (asin, _) in sorted(named.items())}
    return found if any(found.values()) else {}


def _list_of_times(path: Path, row: int, cell: object, n: int) -> list:
    """A list of n times. Raises UsageError: the cell holds something else."""
    times = parsed(cell) if isinstance(cell, str) else None
    known = isinstance(times, list) and all(
        type(time) in (int, float, str) and time == time for time in times
    )
    if not known or len(times) != n:
        raise UsageError(
            f"{path}: row {row}: expected a list of {n} times, found {str(cell)[:40]!r}"
        )
    return times


def _unrolled(
    path: Path, frame: pd.DataFrame, rows: np.ndarray, columns: Columns, asins: dict[str, str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """A row per item of lists; the row of the file of each."""
    lists, split = [], splitter(frame[columns.item])
    for row, cell in zip(rows, frame[columns.item]):
        names = parse_list(path, row, cell, split)
        foreign = [name for name in names if asins and not asins.get(name)]
        if foreign:
            raise UsageError(f"{path}: row {row}: {listing_of(path)} names no item {foreign[0]!r}")
        lists.append([asins.get(name, name) for name in names])
    _refuse_repeated(path, frame[columns.user], rows, lists)
    lengths = np.array([len(items) for items in lists], dtype=np.int64)
    filled = lengths > 0
    frame, rows, lengths = frame[filled], rows[filled], lengths[filled]
    owner = np.repeat(np.arange(len(frame)), lengths)
    long = frame.iloc[owner].reset_index(drop=True)
    long[columns.item] = [item for items in lists for item in items]
    if columns.time is not None and frame[columns.time].astype(str).str.startswith("[").all():
        cells = zip(rows, frame[columns.time], lengths)
        long[columns.time] = [time for given in cells for time in _list_of_times(path, *given)]
    if columns.title is not None:
        cells = zip(frame[columns.title], lengths)
        long[columns.title] = [t for cell, n in cells for t in title_list(cell, n) or [""] * n]
    return long, rows[owner]


def _refuse_repeated(path: Path, users: pd.Series, rows: np.ndarray, lists: list) -> None:
    """Refuse rows that hold a user's earlier list again (MIND's), or a window that moves by one."""
    before, pairs, again = {}, 0, []
    for user, row, items in zip(users, rows, lists):
        last = before.get(user, [])
        before[user] = items
        if len(last) > 1:
            pairs += 1
            grown = last in (items[: len(last)], items[-len(last) :])
            moved = len(last) > 2 and last[1:] == items[: len(last) - 1]
            again += [row] if grown or moved else []
    if again and 2 * len(again) >= pairs:
        raise UsageError(
            f"{path}: row {again[0]} repeats the list of the user's row before ({len(again):,} such"
            " rows): joined, their items would count twice; keep one row per user, with the whole"
            " history"
        )


def _judge_missing(
    path: Path, missing: dict, drop: Container[str], columns: Columns, mend: str
) -> None:
    for role, rows in missing.items():
        if rows and role not in drop:
            raise UsageError(
                f"{path}: row {rows[0]}: the {role} is missing (column {getattr(columns, role)},"
                f" {len(rows):,} rows; empty, NA, null{', -1' * (role in ('user', 'item'))} and the"
                f" like count as missing); {mend}"
            )
        if rows:
            print(f"{len(rows):,} rows without {role} left out")


def _judge(table: Table, log: Log, columns: Columns, new_events: bool, advice: Advice) -> None:
    """Refuse what is no log of several users and items; say what is unusual."""
    path, typed = table.path, table.kind in ("json", "parquet")
    for role, names, codes in (("user", log.users, log.user), ("item", log.items, log.item)):
        for shape, what in SHAPES.items():
            name = next(filter(shape.fullmatch, names), None)
            if name is not None:
                raise UsageError(f"{path}: the {role} {name[:40]!r} {what}")
        if len(np.unique(codes)) == 1 and not new_events:
            raise UsageError(
                f"{path}: one {role} in all, {names[codes[0]][:40]!r}: is column"
                f" {getattr(columns, role)} the {role}? {advice.column.format(role=role)}"
            )
    names = log.items if columns.lists is False else []
    lists = [name for name in names if A_LIST.fullmatch(name)]
    arrays = [name for name in lists if typed and isinstance(parsed(name), list)]
    if arrays or (lists and 2 * len(lists) >= len(names)):
        shown = (arrays or lists)[0][:40]
        raise UsageError(f"{path}: the item {shown!r} looks like a list; {advice.lists}")
    counts = np.bincount(log.user)
    most = int(counts.argmax())
    if len(log.users) >= FEW_USERS and counts[most] > LARGE_SHARE * len(log.user):
        print(
            f"the user {log.users[most]!r} has {counts[most]:,} of {len(log.user):,} interactions:"
            " a shared account, or a word for a missing user?"
        )
