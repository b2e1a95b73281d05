"""A log of interactions: which column is what, its rows, and whether they can be what they seem.

Published formats and plain names of columns are known; nothing else is guessed.
"""

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.cells import clean_title, form_in, parse_list, parsed, title_list, whole
from datasets.filters import Log
from datasets.items import listing_of, read_listing
from datasets.tables import Names, Table, bare, open_table
from engine import cli
from engine.errors import UsageError, one_line

ROLES = ("user", "item", "time", "rating", "title")
KNOWN = (  # published headers, as `bare` gives them: role -> column
    {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating"},
    {"user": "user_id", "item": "parent_asin", "time": "timestamp", "rating": "rating"},
    {"user": "reviewerid", "item": "asin", "time": "unixreviewtime", "rating": "overall"},
    {"user": "userid", "item": "movieid", "time": "timestamp", "rating": "rating"},
)
CONTRACT = {"user": "reviewerid", "item": "asin"}
ITEM_LISTS = (  # lists of items: item and title
    ("asin", "title"),
    ("parent_asin", "title"),
    ("item_id", "title"),
    ("item_id", "movie_title"),
    ("movieid", "title"),
)
BARE = ("user", "item", "rating", "time")  # MovieLens without a header
NAMES = {name for form in (*KNOWN, CONTRACT) for name in form.values()} - {"rating"}
UNTIMED = {*NAMES, "rating", "overall", "title"} - {form["time"] for form in KNOWN}
NOTHING = {"", r"\n", "na", "n/a", "<na>", "nan", "nat", "null", "none", "undefined", "-", "-1"}
NO_VALUE = {form for word in NOTHING - {"-", "-1"} for form in (word, word.upper(), word.title())}
NO_VALUE |= {"NaN", "NaT"}  # of times and ratings
YEAR = re.compile(r"%[YyGFDcxs]")  # in a form of times
ZONE = r"(?:[zZ]|[+-]\d\d:?\d\d|:\d\d(?:\.\d+)?\s*[+-]\d\d)\s*$"
SHAPES = {  # of names that are none
    re.compile(r"-?\d([.,]\d+)?[eE]\+\d+"): (
        "was cut by a spreadsheet or a float; save the ids as text, from their source"
    ),
    re.compile(r"\{.*:.*\}", re.DOTALL): "is an object; write its id alone as text",
}
A_LIST = re.compile(  # in brackets, or several ids, each of which has a digit
    r"(?s)\s*[\[({].*[\])}]\s*|[^\s,|]*\d[^\s,|]*([\s,|]+[^\s,|]*\d[^\s,|]*)+"
)
ASIN, REVIEWER = r"B\w{6,9}|\d{9}[\dX]", r"A\w{3,20}"
EPOCH, APART = 1e8, 100  # times this large count seconds or less; of one unit they are this near
GAP, SINCE = 10, 9e8  # times of two units are so far apart, and the larger ones seconds of 1998 on
UNKNOWN_TIMES = (0, -1, 2**31 - 1)  # where the others are dates
UNDATED = "no times are read; name their column"
BY_FLAGS = "Name them: --user NAME --item NAME --time NAME (none keeps file order)"
BY_COLUMNS = "Name them: --columns USER,ITEM,TIME (none for no time)"
FEW_USERS, LARGE_SHARE = 20, 0.1


class Columns(NamedTuple):
    """The column of each role, by name; None where there is none. lists: items are lists; None
    where a flag says that they are none.
    """

    user: str
    item: str
    time: str | None
    rating: str | None
    title: str | None
    lists: bool | None


def canonical(name: object) -> str:
    """An id as it is written here, in one line; "" where it is missing."""
    text = " ".join(str(name).strip().splitlines()) if name is not None else ""
    text = text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
    return "" if whole(text).lower() in NOTHING else text


def _settled(names: Names) -> np.ndarray:
    """Old code -> new code, int32: where all names are whole numbers, the .0 of a column of floats
    goes. Elsewhere 2.0 may stand beside 2.1.
    """
    old = [*names.codes]
    short = [whole(name) for name in old]
    if short == old or not all(re.fullmatch(r"-?\d+", name) for name in short):
        return np.arange(len(old), dtype=np.int32)
    names.codes = {}
    new = [names.codes.setdefault(name, len(names.codes)) for name in short]
    return np.array(new, dtype=np.int32)


def choose_columns(
    table: Table, given: dict[str, str | None], lists: str, by_columns: bool = False
) -> Columns:
    """Which column is what: as the flags say, else by a published header.

    Args:
        given: role -> the column that a flag names, or None.
        by_columns: the flag is --columns, not one for each role.
    Raises:
        UsageError: a named column is missing, or nothing says which ones to read.
    """
    for role, name in given.items():
        may_be_none = name == "none" and role in ("time", "title")
        if name is not None and name not in table.columns and not may_be_none:
            flag = "columns" if by_columns else role
            raise UsageError(
                f"--{flag}={name}: {table.path} has no such column; it has {table.shown()}"
            )
    known = _known(table, lists, needs_time=given.get("time") is None)
    chosen = {role: given.get(role) or known.get(role) for role in ROLES}
    if lists == "yes" and not chosen["time"]:
        chosen["time"] = "none"
    missing = [role for role in ("user", "item", "time") if not chosen[role]]
    if missing:
        raise UsageError(
            f"{table.path}: which column is the {', the '.join(missing)}? It has {table.shown()}."
            f" {BY_COLUMNS if by_columns else BY_FLAGS}"
        )
    if chosen["user"] == chosen["item"]:
        raise UsageError(f"{table.path}: column {chosen['user']} cannot be both user and item")
    chosen |= {role: None for role in ("time", "title") if chosen[role] == "none"}
    in_lists = lists == "yes" or (lists == "auto" and "lists" in known and not given.get("time"))
    return Columns(**chosen, lists=in_lists or (None if lists == "no" else False))


def _known(table: Table, lists: str, needs_time: bool) -> dict[str, str]:
    """Role -> column of a published form, with "lists" for one of lists; empty for another."""
    by_name = {bare(name): name for name in reversed(table.columns)}
    for form in KNOWN:
        needed = [form[role] for role in ("user", "item", "time") if role != "time" or needs_time]
        if table.header and set(needed) <= by_name.keys():
            found = {role: by_name[name] for role, name in form.items() if name in by_name}
            if form is KNOWN[0] and "title" in by_name:
                found["title"] = by_name["title"]
            return found
    if table.header and set(CONTRACT.values()) <= by_name.keys():
        found = {role: by_name[name] for role, name in CONTRACT.items()}
        cells = table.cells(found["item"])
        several = (len(parse_list(table.path, 2, cell)) > 1 for cell in cells)
        if lists == "yes" or (lists == "auto" and any(several)):
            found |= {name: by_name[name] for name in ("title", "time") if name in by_name}
            return {"time": "none"} | found | {"lists": "yes"}
        return found
    if not table.header and table.separator == " " and lists == "yes":
        return {"user": "1", "item": "2"}
    if not table.header and len(table.columns) == 4:
        first, second, _, last = (table.cells(name) for name in table.columns)
        epochs = all(re.fullmatch(r"\d{9,13}", cell) for cell in last)
        items_first = all(map(re.compile(ASIN).fullmatch, first))
        if epochs and items_first and all(map(re.compile(REVIEWER).fullmatch, second)):
            return dict(zip(("item", "user", "rating", "time"), table.columns))  # Amazon 2018
        users = all(re.fullmatch(rf"\d+|{REVIEWER}", cell) for cell in first)
        return dict(zip(BARE, table.columns)) if epochs and users else {}
    return {}


def report_columns(
    table: Table, columns: Columns, min_rating: float | None, advise: bool = True
) -> None:
    """Print which columns are read as what, which are not, and with `advise` how they could be."""
    print(f"{table.path}: {table.describe()}{'; a list of items per row' if columns.lists else ''}")
    read = {role: name for role, name in columns._asdict().items() if isinstance(name, str)}
    if min_rating is None:
        read.pop("rating", None)
    for role, name in read.items():
        print(f"  {role}: column {name}")
    if columns.time is None:
        print("  no time: items stay in file order")
    unread = [name for name in table.columns if name not in read.values()]
    if unread:
        print(f"  not read: {', '.join(unread)}")
    for name in unread if advise else ():
        cells = {canonical(cell) for cell in table.cells(name)}
        if cells == {"0", "1"}:
            print(
                f"  {name} has 0 and 1: if 0 means that nothing happened, --rating {name}"
                " --min_rating 1 leaves those rows out"
            )
        elif bare(name) == "title":
            print("  --title title reads the titles")
        elif name == columns.rating:
            print(f"  {name} looks like a rating: --min_rating leaves low ones out")


def read_log(
    table: Table,
    columns: Columns,
    min_rating: float | None = None,
    drop: Container[str] = (),
    one_user: bool = False,
    as_they_come: bool = False,
    mend: str = "--drop_missing true leaves them out",
    time_format: str | None = None,
) -> tuple[Log, dict[str, str]]:
    """The interactions of a log, or of lists, in file order, and item -> title; both are judged.

    Args:
        min_rating: lower ones are left out; the columns have a rating then.
        one_user: a log of one user, or of one item, is fine.
        as_they_come: users in the order of the file, not by their names.
        drop: roles (user, item, time, rating) without which a row is left out.
        mend: what to do about rows without another one.
        time_format: of its times, such as %d.%m.%Y; numbers and ISO dates need none.
    Raises:
        UsageError: the file is damaged, a cell is wrong (its row is named), or what was read is no
            log of several users and items.
    """
    _judge_form(columns, time_format or "")
    users, items = Names(canonical), Names(canonical)
    read = [*["time"] * (columns.time is not None), *["rating"] * (min_rating is not None)]
    missing: dict[str, list[int]] = {role: [] for role in ("user", "item", *read)}  # rows
    titles: dict[int, str] = {}  # by code
    given = table, columns, min_rating, time_format
    parts, n_rows, low, dates = _read_rows(*given, users, items, missing, titles)
    of_user, of_item = _settled(users), _settled(items)
    if one_user and users.codes and not n_rows:  # their lists are empty
        return Log([*users.codes], [], *[np.zeros(0, dtype=np.int64)] * 3), {}
    cli.check((n_rows > 0, f"{table.path}: holds no interaction"))
    _judge_missing(table.path, missing, drop, columns, mend)
    user, item, time, rows = (np.concatenate(column) for column in zip(*parts))
    user, item = of_user[user], of_item[item]
    if min_rating is not None:
        print(f"{low:,} interactions rated below {min_rating:g} left out")
    lower = "; lower --min_rating" * (min_rating is not None)
    cli.check((len(user) > 0, f"{table.path}: nothing is left of {n_rows:,} rows{lower}"))
    _judge(table.path, Log([*users.codes], [*items.codes], user, item, time), columns, one_user)
    if columns.time is not None:
        _judge_times(table.path, time, rows, dates)
        print(f"times from {_shown(time.min(), dates)} to {_shown(time.max(), dates)}")
    names, user = ([*users.codes], user) if as_they_come else users.in_order(user)
    ids, item = items.in_order(item)
    named: dict[int, str] = {}
    for code, title in titles.items():
        named[of_item[code]] = named.get(of_item[code]) or title
    return Log(names, ids, user, item, time), {n: named.get(c, "") for n, c in items.codes.items()}


def _read_rows(
    table: Table,
    columns: Columns,
    min_rating: float | None,
    form: str | None,
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
            _refuse_rounded(table.path, frame[getattr(columns, role)], rows, role)
        user, item = users.encode(frame[columns.user]), items.encode(frame[columns.item])
        time, lacks = np.arange(n_rows - len(frame), n_rows), {"user": user < 0, "item": item < 0}
        kept = _whole_rows(frame, rows, columns, lacks, missing)
        frame, user, item, time, rows = (part[kept] for part in (frame, user, item, time, rows))
        if columns.time is not None and len(frame):
            dates = _are_dates(frame[columns.time], form) if dates is None else dates
            time = _times(table.path, frame[columns.time], rows, dates, form, zones)
        if columns.title is not None:
            _add_titles(titles, item, frame[columns.title])
        high = np.ones(len(frame), dtype=bool)
        if min_rating is not None:
            high = _numbers(table.path, frame[columns.rating], rows, "rating") >= min_rating
            low += int((~high).sum())
        parts.append((user[high], item[high], time[high], rows[high]))
    return parts, n_rows, low, dates


def _judge_form(columns: Columns, form: str) -> None:
    """Refuse a form of times that cannot sort, or where none are read."""
    given, hours = f"--time_format={form}", {*re.findall("%.", form)}
    cli.check(
        (columns.time or not form, f"{given}: {UNDATED}"),
        ("%" in form or not form, f"{given}: expected a form such as %d.%m.%Y %H:%M"),
        ("%" not in form or YEAR.search(form), f"{given}: without a year times do not sort"),
        (not {"%H", "%p"} <= hours, f"{given}: %p needs %I, not %H"),
    )


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
            empty = cells.isna() | cells.isin(NO_VALUE) if _are_texts(cells) else cells.isna()
            mask = empty.to_numpy() & kept
        noted += rows[mask].tolist()
        kept &= ~mask
    return kept


def _frames(
    table: Table, columns: Columns, users: Names
) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """An interaction per row, and the row of the file of each. Codes the users of empty lists."""
    asins = _original_ids(table.path) if columns.lists else {}
    for frame in table.frames([name for name in columns if isinstance(name, str)]):
        rows = frame.index.to_numpy()
        if columns.lists:
            users.encode(frame[columns.user])
            frame, rows = _unrolled(table.path, frame, rows, columns, asins)
        yield frame, rows


def read_titles(path: Path, named: list[str], kept: set[str]) -> dict[str, str]:
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
            f" {table.shown()}; --items_columns ITEM,TITLE names others"
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


def _original_ids(path: Path) -> dict[str, str]:
    """Number -> original id, of the items.csv beside a CSV of lists; empty without one."""
    listing = listing_of(path)
    named = read_listing(listing) if listing.is_file() else {}
    return {str(number): asin for number, (asin, _) in sorted(named.items())}


def _times_of(path: Path, row: int, cell: object, n: int) -> list:
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
    lists = []
    for row, cell in zip(rows, frame[columns.item]):
        names = parse_list(path, row, cell)
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
        long[columns.time] = [time for given in cells for time in _times_of(path, *given)]
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


def _refuse_rounded(path: Path, cells: pd.Series, rows: np.ndarray, role: str) -> None:
    """Refuse ids and times that a column of floats rounded to fewer digits than they had."""
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind == "f":
        wrong = (cells.abs() >= 2 ** (np.finfo(cells.dtype).nmant + 1)).to_numpy()
        expected = f"all its digits: {cells.dtype} cut them"
        _refuse(path, wrong, cells, rows, role, expected)


def _numbers(path: Path, cells: pd.Series, rows: np.ndarray, role: str) -> np.ndarray:
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
    _refuse(path, ~np.isfinite(numbers), cells, rows, role, "a number, with a decimal point")
    return numbers


def _are_texts(cells: pd.Series) -> bool:
    return cells.dtype == object or pd.api.types.is_string_dtype(cells)


def _are_dates(cells: pd.Series, form: str | None) -> bool:
    """Whether times are dates rather than numbers; what comes first decides."""
    if form or pd.api.types.is_datetime64_any_dtype(cells):
        return True
    return bool(pd.to_numeric(cells[:1], errors="coerce").isna().all())


def _times(
    path: Path, cells: pd.Series, rows: np.ndarray, dates: bool, form: str | None, zones: list[bool]
) -> np.ndarray:
    """Times that sort: numbers as they are, dates in seconds since 1970.

    Args:
        form: of the dates; ISO 8601 by default.
        zones: see `_judge_zones`.
    """
    texts = _are_texts(cells)
    if not dates:
        numbers = _numbers(path, cells, rows, "time")
        _refuse_rounded(path, cells, rows, "time")
        _refuse(path, np.abs(numbers) >= 2**63, cells, rows, "time", "fewer digits, at most 2^63")
        if texts:
            _refuse(
                path, _are_cut(cells), cells, rows, "time", "all its digits: a spreadsheet cut them"
            )
        whole = pd.to_numeric(cells, errors="coerce")
        return whole.to_numpy() if whole.dtype == np.int64 else numbers
    expected = "a number or a date such as 2024-04-25 08:00:00; --time_format reads other forms"
    expected = f"a time of the form {form}" if form else expected
    if texts:  # not "now"
        without = ~cells.astype(str).str.contains(r"\d").to_numpy()
        _refuse(path, without, cells, rows, "time", expected)
    if not form:
        _judge_zones(path, cells, rows, zones)
    try:
        found = pd.to_datetime(cells, format=form or "ISO8601", utc=True, errors="coerce")
    except ValueError as error:  # not a form of time
        raise UsageError(f"--time_format={form}: {one_line(error)}") from None
    _refuse(path, found.isna().to_numpy(), cells, rows, "time", expected)
    return found.to_numpy("datetime64[us]").astype(np.int64) / 1e6


def _are_cut(cells: pd.Series) -> np.ndarray:
    """Mask of the numbers that have fewer digits than their exponent says, bool [n]."""
    texts = cells.astype(str)
    if not texts.str.contains("e", case=False, regex=False).any():
        return np.zeros(len(texts), dtype=bool)
    parts = texts.str.extract(r"^-?\d[.,]?(\d*)[eE]\+?(\d+)$")
    return (parts[0].str.len() < pd.to_numeric(parts[1])).to_numpy()


def _judge_zones(path: Path, cells: pd.Series, rows: np.ndarray, seen: list[bool]) -> None:
    """Refuse times with a zone beside times without one, in this frame or before."""
    zoned = cells.astype(str).str.contains(ZONE)
    if pd.api.types.is_datetime64_any_dtype(cells):
        zoned[:] = cells.dt.tz is not None
    if not seen:
        seen.append(bool(zoned.iloc[0]))
    other, expected = (zoned != seen[0]).to_numpy(), "a time zone in every row or in none"
    _refuse(path, other, cells, rows, "time", expected)


def _refuse(
    path: Path, wrong: np.ndarray, cells: pd.Series, rows: np.ndarray, role: str, expected: str
) -> None:
    if wrong.any():
        first = int(wrong.argmax())
        shown = str(cells.iloc[first])[:40]
        raise UsageError(f"{path}: row {rows[first]}: the {role} is {shown!r}, expected {expected}")


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


def _judge(path: Path, log: Log, columns: Columns, one_user: bool) -> None:
    """Refuse what is no log of several users and items; say what is unusual."""
    for role, names, codes in (("user", log.users, log.user), ("item", log.items, log.item)):
        for shape, what in SHAPES.items():
            name = next(filter(shape.fullmatch, names), None)
            if name is not None:
                raise UsageError(f"{path}: the {role} {name[:40]!r} {what}")
        if len(np.unique(codes)) == 1 and not one_user:
            raise UsageError(
                f"{path}: one {role} in all, {names[codes[0]][:40]!r}: is column"
                f" {getattr(columns, role)} the {role}? --{role} names another"
            )
    names = log.items if columns.lists is False else []
    lists = [name for name in names if A_LIST.fullmatch(name)]
    if lists and 2 * len(lists) >= len(names):
        shown = lists[0][:40]
        raise UsageError(
            f"{path}: the item {shown!r} looks like a list; --lists yes reads lists, --lists no"
            " takes it as an id"
        )
    counts = np.bincount(log.user)
    most = int(counts.argmax())
    if len(log.users) >= FEW_USERS and counts[most] > LARGE_SHARE * len(log.user):
        print(
            f"the user {log.users[most]!r} has {counts[most]:,} of {len(log.user):,} interactions:"
            " a shared account, or a word for a missing user?"
        )


def _judge_times(path: Path, time: np.ndarray, rows: np.ndarray, dates: bool) -> None:
    """Refuse times that do not sort, and 0, -1, 1970 or a cut number among dates."""
    if not dates:
        _judge_numbers(path, time, rows)
    unknown = np.isin(time, UNKNOWN_TIMES)
    if not dates and np.median(time) >= EPOCH:
        unknown |= time < EPOCH
    others = time[~unknown] if not unknown.all() else time
    if unknown.any() and np.median(others) >= EPOCH:
        first = int(unknown.argmax())
        raise UsageError(
            f"{path}: row {rows[first]}: the time is {time[first]:.0f}, the others are dates"
            f" ({unknown.sum():,} such rows): missing, or cut? remove these rows, or mend their"
            " times"
        )


def _shown(time: float, dates: bool) -> str:
    if dates:
        return str(np.datetime64(int(time), "s")).replace("T", " ")
    return str(time) if isinstance(time, np.integer) else f"{time:.15g}"


def _judge_numbers(path: Path, time: np.ndarray, rows: np.ndarray) -> None:
    """Refuse two units or forms in one column, a clock without a date, days before years."""
    lengths = set((np.log10(np.maximum(np.abs(time), 1)).astype(np.int64) + 1).tolist())
    if 8 in lengths and lengths & {12, 14} and lengths <= {8, 12, 14}:
        raise UsageError(f"{path}: times of 8 and of more digits: days and minutes in one column?")
    first, last = time // 100, time % 100
    in_year = (first >= 1) & (first <= 12) & (last >= 1) & (last <= 31)  # MMDD, which sorts
    clock = time.max() < 2400 and (last < 60).all() and not in_year.all()
    if clock and len(np.unique(time)) > 60:
        raise UsageError(
            f"{path}: times from {time.min():.0f} to {time.max():.0f} look like a clock (HHMM)"
            " without a date; join the date and the time in one column"
        )
    early, late = time[(time > 0) & (time < EPOCH)], time[time >= EPOCH]
    ends = None
    if len(late) and late.max() / late.min() > APART:
        ends = late.min(), late.max()
    elif len(early) and len(late) and np.median(time) < EPOCH:  # most are not dates
        apart = late.min() / early.max() > GAP and late.min() > SINCE
        ends = (early.max(), late.min()) if apart else None
    if ends is not None:
        small, large = (rows[(time == t).argmax()] for t in ends)
        units = "seconds and milliseconds" if ends[0] >= EPOCH else "two units"
        raise UsageError(
            f"{path}: times in rows {small} and {large} are a factor of {ends[1] / ends[0]:,.0f}"
            f" apart: {units} in one column?"
        )
    if not (lengths <= {7, 8} or lengths <= {5, 6}):
        return
    century = 100 if lengths <= {5, 6} else 10_000
    years, months, days = time % century, time // century % 100, time // (100 * century)
    backwards = (months >= 1) & (months <= 31) & (days >= 1) & (days <= 31)
    if century == 100:  # 280524: of days before years the first two digits vary most
        backwards &= (months <= 12) & (len(np.unique(days)) > len(np.unique(years)))
    else:
        backwards &= (years >= 1990) & (years <= 2100)
    if backwards.all():
        raise UsageError(
            f"{path}: times such as {time[0]:.0f} look like days before years and do not sort;"
            " write 2024-04-25 or 20240425"
        )
