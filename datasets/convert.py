"""Any interaction log -> data/<domain>.csv and data/<domain>.items.csv.

    python -m datasets.convert --input ratings.csv --domain_type shop
    python -m datasets.convert --input log.parquet --domain_type shop --user buyer --time bought_at
    python -m datasets.convert --input ml-100k.inter --items ml-100k.item --domain_type ml \
        --min_rating 4 --min_user 5 --min_item 5
    python -m datasets.convert --input lists.csv --domain_type shop        # a list per user

Reads (user, item, time[, rating][, title]) as CSV, with semicolons or tabs, parquet, JSON lines,
RecBole's .inter, MovieLens, Amazon 2014 to 2023; a list of items per user; "user item item ..." and
"user item" text. Plain, gzip or xz. The log is read as a stream: about 16 bytes per interaction and
the names of users and items stay in memory. Each user's items are sorted by time. Users and items
are sorted by their ids, so that the same log in another format gives the same files.
"""

import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets import logs, process
from datasets.columns import (
    KNOWN,
    LIST,
    Columns,
    canonical,
    choose_columns,
    common,
    holds_lists,
    named,
    parse_list,
    title_list,
)
from datasets.domain import canonical_domain
from datasets.interactions import MINIMUM_LENGTH
from datasets.items import listing_of
from datasets.logs import Form
from datasets.process import (
    Reviews,
    clean_title,
    may_write,
    occurring,
    often,
    print_counts,
    print_ties,
    tie_order,
    write_domain,
)
from engine import cli
from engine.cli import NonNegativeInt, PositiveInt, flag
from engine.errors import UsageError
from engine.files import check_writable


class _Names:
    """Codes of names, in the order in which they come."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def encode(self, values: pa.Array) -> np.ndarray:
        """int32 [n]; -1 where a value is empty."""
        coded = values.dictionary_encode()
        own = [self.code(name) for name in coded.dictionary.to_pylist()]
        places = coded.indices.fill_null(len(own)).to_numpy()
        return np.array([*own, -1], dtype=np.int32)[places]

    def code(self, name: str) -> int:
        name = canonical(name)
        return self.codes.setdefault(name, len(self.codes)) if name else -1


class _Log:
    """What is collected of a log, batch by batch."""

    def __init__(self, path: Path, min_rating: float | None) -> None:
        self.path, self.min_rating = path, min_rating
        self.users, self.items = _Names(), _Names()
        self.user, self.item, self.time = [], [], []
        self.title_of: dict[int, str] = {}
        self.dates: bool | None = None  # whether times are dates; the first one decides
        self.low = self.n = 0

    def add(self, rows: np.ndarray, batch: dict[str, pa.Array]) -> None:
        """Take the columns of a batch, by role.

        Args:
            rows: the row of the file that each value is from, for messages.
        """
        user = self._codes(self.users, batch["user"], "user", rows)
        item = self._codes(self.items, batch["item"], "item", rows)
        if "time" in batch:
            time = self._times(batch["time"], rows)
        else:
            time = np.arange(self.n, self.n + len(user))
        self.n += len(user)
        if "title" in batch:
            self._titles(item, batch["title"])
        if self.min_rating is not None:
            kept = self._numbers(batch["rating"], "rating", rows) >= self.min_rating
            self.low += int((~kept).sum())
            user, item, time = user[kept], item[kept], time[kept]
        self.user.append(user)
        self.item.append(item)
        self.time.append(time)

    def _codes(self, names: _Names, values: pa.Array, role: str, rows: np.ndarray) -> np.ndarray:
        codes = names.encode(values)
        empty = np.flatnonzero(codes < 0)
        if len(empty):
            raise UsageError(f"{self.path}: row {rows[empty[0]]}: the {role} is empty")
        return codes

    def refuse_lists(self) -> None:
        """Refuse items that are lists, in a log that has none."""
        found = [name for name in self.items.codes if name[0] in "[(" and LIST.fullmatch(name)]
        if found:
            raise UsageError(
                f"{self.path}: the item {found[0][:40]!r} looks like a list; --lists yes reads"
                " lists, --lists no takes it as an id"
            )

    def _numbers(self, values: pa.Array, role: str, rows: np.ndarray) -> np.ndarray:
        numbers = logs.numbers(values)
        self._refuse(np.isnan(numbers), values, role, rows, "a number")
        return numbers

    def _times(self, values: pa.Array, rows: np.ndarray) -> np.ndarray:
        if self.dates is None:
            self.dates = logs.are_dates(values)
        times, wrong = logs.times(values, self.dates)
        self._refuse(wrong, values, "time", rows, "a number or a date such as 2024-04-25 08:00:00")
        return times

    def _refuse(
        self, wrong: np.ndarray, values: pa.Array, role: str, rows: np.ndarray, expected: str
    ) -> None:
        places = np.flatnonzero(wrong)
        if len(places):
            value = values[int(places[0])].as_py()
            raise UsageError(
                f"{self.path}: row {rows[places[0]]}: the {role} is {str(value)[:40]!r},"
                f" expected {expected}"
            )

    def _titles(self, item: np.ndarray, titles: pa.Array) -> None:
        filled = np.flatnonzero(pc.utf8_length(titles.fill_null("")).to_numpy())
        new, first = np.unique(item[filled], return_index=True)
        for code, place in zip(new.tolist(), filled[first].tolist()):
            if not self.title_of.get(code):
                self.title_of[code] = clean_title(titles[place].as_py())

    def reviews(self) -> Reviews:
        """Everything, in file order; users and items are coded in the order of their ids."""
        columns = (np.concatenate(parts) for parts in (self.user, self.item, self.time))
        user, item, time = columns
        users, user = _sorted_codes(self.users.codes, user)
        items, item = _sorted_codes(self.items.codes, item)
        return Reviews(users, items, user, item, time)

    def titles(self) -> dict[str, str]:
        """Item -> title."""
        names = list(self.items.codes)
        return {names[code]: title for code, title in self.title_of.items()}


def _sorted_codes(codes: dict[str, int], column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The names in order, whole numbers by value, and the column with their new codes."""
    names = sorted(codes, key=_order(codes))
    new = np.empty(len(codes), dtype=np.int32)
    new[[codes[name] for name in names]] = np.arange(len(codes), dtype=np.int32)
    return names, new[column]


def _order(names: Iterable[str]) -> Callable[[str], tuple[int, str]] | None:
    """The key to sort ids by: whole numbers by value, else None for text."""
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return (lambda name: (int(name), name)) if numbers else None


def report_columns(
    form: Form, columns: Columns, given: dict[str, str | None], lists: bool
) -> Columns:
    """Print what was understood of a log, and give the columns that are read.

    Args:
        given: role -> the column that a flag names.
        lists: whether lines are lists of items. Their times and ratings are not read.
    Raises:
        UsageError: a flag names the time or the rating of lists.
    """
    unread = [name for name in (columns.time, columns.rating) if lists and name]
    refused = [f"--{role}={name}" for role, name in given.items() if name in unread]
    cli.check(
        (
            not refused,
            f"{', '.join(refused)}: lines of {form.path} are lists of items, which stay in their"
            " order and have no ratings; --lists=no reads them as single items",
        )
    )
    if lists:
        columns = columns._replace(time=None, rating=None)
    print(f"{form.path}: {form.describe()}{'; a list of items per line' if lists else ''}")
    for role, name in columns.present().items():
        print(f"  {role}: {form.where(name)}{logs.unit(form, name) if role == 'time' else ''}")
    for name in unread:
        print(f"  {name} is not read: lines are lists")
    if columns.time is None:
        print("  no time: items stay in file order")
    return columns


def read_log(form: Form, columns: Columns, min_rating: float | None, lists: bool) -> _Log:
    """Stream a log of interactions, or of lists.

    Args:
        lists: a line has a user's list.
    Raises:
        UsageError: the file is damaged, or a line is wrong; its row is named.
    """
    log = _Log(form.path, min_rating)
    present = columns.present()
    for row, batch in logs.batches(form, list(present.values())):
        by_role = {role: batch[name] for role, name in present.items()}
        rows = np.arange(row, row + len(by_role["user"]))
        log.add(*(_unrolled(form.path, rows, by_role) if lists else (rows, by_role)))
    if not log.n:
        raise UsageError(f"{form.path}: holds no interaction")
    return log


def _unrolled(
    path: Path, rows: np.ndarray, batch: dict[str, pa.Array]
) -> tuple[np.ndarray, dict[str, pa.Array]]:
    """The lists of all lines as one batch, an item per value, and the row of each."""
    lists = [
        parse_list(path, row, cell or "") for row, cell in zip(rows, batch["item"].to_pylist())
    ]
    lengths = [len(items) for items in lists]
    owner = np.repeat(np.arange(len(lists)), lengths)
    arrays = {
        "user": batch["user"].take(pa.array(owner)),
        "item": pa.array(chain.from_iterable(lists), pa.string()),
    }
    if "title" in batch:
        cells = zip(batch["title"].to_pylist(), lengths)
        titles = (title_list(cell, n) or [""] * n for cell, n in cells)
        arrays["title"] = pa.array(chain.from_iterable(titles), pa.string())
    return rows[owner], arrays


def read_titles(form: Form, columns: tuple[str | None, str | None], wanted: set[str]) -> dict:
    """Item -> title, of a list of items.

    Raises:
        UsageError: which columns are item and title is not known.
    """
    if form.kind == "json" and not form.columns:  # Amazon's metadata of 2014: Python literals
        return process.read_titles(form.path, wanted)[0]
    by_name = named(form)
    chosen = []
    for role, name in zip(("item", "title"), columns):
        if role == "item" and {"item_id", "asin", "title"} == set(by_name):  # our own items.csv
            name = by_name["asin"]
        place = None if form.header else next(iter(form.columns[len(chosen) :]), None)
        own = name if name in form.columns else None
        chosen.append(own or common(by_name, role) or place)
    if None in chosen:
        raise UsageError(
            f"--items={form.path}: expected columns such as item_id and title,"
            f" found {form.shown()}; name them with --item and --title"
        )
    item, title = chosen
    titles: dict[str, str] = {}
    for _, batch in logs.batches(form, [item, title]):
        for name, text in zip(batch[item].to_pylist(), batch[title].to_pylist()):
            name = canonical(name)
            if name in wanted:
                titles[name] = titles.get(name) or clean_title(text)
    return titles


def look_at_items(path: Path) -> Form:
    """The form of a list of items; without a common column name it has no header."""
    form = logs.look(path, KNOWN)
    if form.kind != "table" or KNOWN & named(form).keys():
        return form
    return logs.look(path, KNOWN, header=False)


def filter_log(
    log: Reviews,
    ties: np.ndarray | None,
    dedup: bool,
    min_user: int,
    min_item: int,
    min_length: int,
) -> Reviews:
    """Sort by user and time; then drop repeats, rare users and items, and short sequences, until
    nothing changes. Prints a line after every filter.

    Args:
        ties: int64 [n], the order of a user's interactions of equal time; None is file order.
    """
    keys = (log.time, log.user) if ties is None else (ties, log.time, log.user)
    order = np.lexsort(keys)  # stable
    log = log._replace(user=log.user[order], item=log.item[order], time=log.time[order])
    if dedup:
        pairs = log.user.astype(np.int64) * len(log.items) + log.item
        first = np.sort(np.unique(pairs, return_index=True)[1])
        log = log.keep(first)
        print_counts("repeats of an item dropped", log)
    rules = [
        ("users", "user", min_user),
        ("items", "item", min_item),
        ("lists", "user", min_length),
    ]
    changes = True
    while changes:
        changes = False
        for what, column, least in rules:
            kept = often(getattr(log, column), least)
            if kept.all():
                continue
            log, changes = log.keep(kept), True
            print_counts(f"{what} with >= {least} interactions", log)
            if not len(log.user):
                flags = {"users": "min_user", "items": "min_item", "lists": "min_length"}
                raise UsageError(
                    f"nothing is left after '{what} with >= {least}'; lower --{flags[what]}"
                )
    return log


@cli.command
def main(
    *,
    input: str = flag(help="the log"),
    domain_type: str = flag(help="name of the domain, and so of the files written"),
    items: str | None = flag(None, "a list of items with titles, where the log has none"),
    user: str | None = flag(None, "name of the user column; without a header its number, from 1"),
    item: str | None = flag(None, "the same of the item column"),
    time: str | None = flag(None, "the same of the time column"),
    rating: str | None = flag(None, "the same of the rating column"),
    title: str | None = flag(None, "the same of the title column, of the log or of --items"),
    header: Literal["auto", "yes", "no"] = flag("auto", "whether the first line names columns"),
    lists: Literal["auto", "yes", "no"] = flag("auto", "whether a line has a user's list of items"),
    min_rating: float | None = flag(None, "lowest rating kept; by default ratings are not read"),
    min_user: PositiveInt = flag(1, "fewest interactions of a user"),
    min_item: PositiveInt = flag(1, "fewest interactions of an item"),
    min_length: PositiveInt = flag(1, "shortest list, after the other filters"),
    dedup: bool = flag(False, "of a user's repeats of an item keep the first"),
    ties: Literal["file", "hash"] = flag(
        "file", "interactions of one user and time: in file order, or by a hash of user and item"
    ),
    tie_seed: NonNegativeInt = flag(0, "seed of that hash"),
    output_dir: str = flag("data", "where the files go"),
    overwrite: bool = flag(False, "replace the domain's files"),
) -> None:
    """Turn any log of interactions into a domain's sequences."""
    path = Path(output_dir) / f"{canonical_domain(domain_type)}.csv"
    listing = listing_of(path)
    targets = {path.resolve(), listing.resolve()}
    check_writable(Path(output_dir), "--output_dir")
    cli.check(
        (Path(input).is_file(), f"--input={input}: file not found"),
        (items is None or Path(items).is_file(), f"--items={items}: file not found"),
        may_write(path, overwrite),
        (Path(input).resolve() not in targets, f"--input={input} is the file to be written"),
        (not items or Path(items).resolve() not in targets, f"--items={items} would be replaced"),
        (not path.is_dir() and not listing.is_dir(), f"{path} or {listing} is a folder"),
    )
    choices = {"yes": True, "no": False, "auto": None}
    form = logs.look(Path(input), KNOWN, choices[header], choices[lists])
    given = {"user": user, "item": item, "time": time, "rating": rating, "title": title}
    listed = None if items is None else look_at_items(Path(items))
    if listed is not None and title not in form.columns:
        given["title"] = None  # it is the list's
        known = title is None or title in listed.columns
        cli.check((known, f"--title={title}: neither {input} nor {items} has such a column"))
    columns = choose_columns(form, given)
    in_lists = choices[lists] if lists != "auto" else holds_lists(form, columns)
    columns = report_columns(form, columns, given, in_lists)
    cli.check(
        (
            min_rating is None or columns.rating is not None,
            f"--min_rating={min_rating}: {input} has no rating; name it with --rating",
        )
    )
    if min_rating is None:
        columns = columns._replace(rating=None)
    log = read_log(form, columns, min_rating, in_lists)
    if not in_lists and lists == "auto":
        log.refuse_lists()
    whole = log.reviews()
    if min_rating is not None:
        print(f"{log.low:,} interactions rated below {min_rating:g} left out")
    if not len(whole.user):
        raise UsageError(f"nothing is left of {log.n:,} interactions; lower --min_rating")
    print_counts("read", whole)
    by_hash = tie_order(whole, tie_seed) if ties == "hash" else None
    kept = filter_log(whole, by_hash, dedup, min_user, min_item, min_length)
    if columns.time is not None:
        print_ties(kept, "interactions", ties, tie_seed)
    titles, wanted = log.titles(), occurring(kept)
    if listed is not None:
        titles |= read_titles(listed, (item, title), wanted)
    write_domain(kept, titles, path, _order(kept.items))
    lengths = np.bincount(kept.user)
    short = int(((lengths > 0) & (lengths < MINIMUM_LENGTH)).sum())
    if short:
        print(f"{short:,} users have fewer than {MINIMUM_LENGTH} items: they are not evaluated")
    print(f"titles: {sum(bool(titles.get(name)) for name in wanted):,} items have one")
    print(f"wrote {path} and {listing}")


if __name__ == "__main__":
    cli.run(main)
