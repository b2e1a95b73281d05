"""What items are called: their ids in the CSV, their original ids and their titles."""

import csv
import difflib
import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from datasets.cells import forms
from datasets.interactions import LARGEST_ID, read_titles
from engine.errors import UsageError
from engine.files import replacing

Name = Literal["auto", "id", "asin", "title"]
COLUMNS = ["item_id", "asin", "title"]


def listing_of(csv_path: Path) -> Path:
    """<domain>.items.csv beside <domain>.csv, which may be compressed."""
    plain = Path(csv_path.name.removesuffix(".gz").removesuffix(".xz"))
    return csv_path.with_name(f"{plain.stem}.items.csv")


class Items(NamedTuple):
    """By catalogue index: id in the CSV (int64 [N]), original id and title ("" where unknown)."""

    ids: np.ndarray
    asins: list[str]
    titles: list[str]

    @classmethod
    def of(cls, csv_path: Path, item_ids: np.ndarray, others: bool = False) -> "Items":
        """From <domain>.items.csv beside the CSV; without it the titles stand in the CSV itself.

        Args:
            others: also the items of items.csv that are not among `item_ids`.
        Raises:
            UsageError: items.csv is damaged.
        """
        listing = listing_of(csv_path)
        if listing.is_file():
            return cls.read(listing, item_ids, others)
        titles = read_titles(csv_path)
        return cls(item_ids, [""] * len(item_ids), [titles.get(i, "") for i in item_ids.tolist()])

    @classmethod
    def read(cls, listing: Path, item_ids: np.ndarray, others: bool = False) -> "Items":
        """From an items.csv; ids that are not in it have no names. Raises UsageError: it is
        damaged.
        """
        named = read_listing(listing)
        if others:
            item_ids = np.union1d(item_ids, np.array([*named], dtype=np.int64))
        names = [named.get(item, ("", "")) for item in item_ids.tolist()]
        return cls(item_ids, [asin for asin, _ in names], [title for _, title in names])

    def write(self, listing: Path) -> None:
        """Write an items.csv, in catalogue order."""
        with replacing(listing) as partial, open(partial, "w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(zip(self.ids.tolist(), self.asins, self.titles))

    def sha256(self) -> str:
        """Of the ids and the original ids: what a number means. Titles may change."""
        lines = [f"{item},{asin}" for item, asin in zip(self.ids.tolist(), self.asins)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def show(self, index: int) -> str:
        """An item for people: its title, else its original id, else its id."""
        return self.titles[index] or self.asins[index] or f"item {self.ids[index]}"

    def name(self, index: int) -> str:
        """What the item is called by: its original id, else its id."""
        return self.asins[index] or str(self.ids[index])


def read_listing(listing: Path) -> dict[int, tuple[str, str]]:
    """Id in the CSV -> original id and title."""
    named: dict[int, tuple[str, str]] = {}
    number = 0
    try:
        with open(listing, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if number == 1:
                    columns = [[name.strip() for name in row].index(name) for name in COLUMNS]
                elif row:
                    item, asin, title = (row[column] for column in columns)
                    if not 0 <= int(item) <= LARGEST_ID or int(item) in named:
                        raise ValueError
                    named[int(item)] = asin, title
    except (ValueError, IndexError, csv.Error):
        raise UsageError(
            f"{listing}: row {number}: expected item_id,asin,title with whole ids, each once, in"
            " UTF-8"
        ) from None
    return named


class Finder:
    """Finds items by original id, id or title; `auto` tries in this order.

    Where items have original ids, `auto` takes no id of the CSV. Of equal names the first item
    counts. Titles are compared without case.

    Args:
        skip: leave out unknown items instead of refusing them.
    Attributes:
        unknown: names of the items that were left out.
    """

    def __init__(self, items: Items, by: Name, skip: bool = False) -> None:
        every: dict[str, dict] = {
            "asin": _first(items.asins),
            "id": {item: index for index, item in enumerate(items.ids.tolist())},
            "title": _first([title.casefold() for title in items.titles]),
        }
        self.items, self.skip, self.unknown = items, skip, []
        self.own = every["id"]
        if every["asin"] and by == "auto":
            every.pop("id")
        self.tables = every if by == "auto" else {by: every[by]}

    def by_asin(self) -> "Finder":
        """A finder by original ids alone that shares `unknown`."""
        finder = Finder(self.items, "asin", skip=self.skip)
        finder.unknown = self.unknown
        return finder

    def refuse_ambiguous(self, lists: list[list[str]], source: str) -> None:
        """Refuse numbers that are original ids, and ids of other items in the run's own CSV. Raises
        UsageError: nothing says which of both is meant.
        """
        if len(self.tables) != 2:  # one rule alone, or no original ids
            return
        asins = self.tables["asin"]
        names = {name.strip() for names in lists for name in names}
        both = all(n.isdigit() and n in asins and int(n) in self.own for n in names)
        other = next((n for n in sorted(names) if both and asins[n] != self.own[int(n)]), None)
        if other is not None:
            raise UsageError(
                f"{source}: {other} is the original id of one item, and in the run's CSV the id of"
                " another; say --by asin or --by id"
            )

    def find(self, name: str, source: str, mend: str = "") -> int:
        """The catalogue index of an item.

        Args:
            source: what named it, for messages. mend: what else can be done.
        Raises:
            UsageError: there is no such item; a near one is offered.
        """
        index = self._index(name.strip())
        if index is None:
            raise UsageError(f"{source}: {name.strip()[:60]!r} is no item{self._near(name)}{mend}")
        return index

    def find_all(self, names: list[str], source: str) -> list[int]:
        """The indices of several items; unknown ones are left out where the finder skips."""
        if not self.skip:
            return [self.find(n, source, "; --unknown skip leaves it out") for n in names]
        found = [(name, self._index(name.strip())) for name in names]
        self.unknown += [name for name, index in found if index is None]
        return [index for _, index in found if index is not None]

    def find_joined(self, parts: list[str], source: str) -> list[int]:
        """The indices of items whose names may hold commas, from parts that were split there."""
        found, start = [], 0
        while start < len(parts):
            ends, name = range(len(parts), start + 1, -1), parts[start]
            joined = [(end, comma.join(parts[start:end])) for end in ends for comma in (", ", ",")]
            named = [(end, text) for end, text in joined if self._index(text) is not None]
            start, name = named[0] if named else (start + 1, name)
            found.append(self.find(name, source))
        return found

    def all_called(self, index: int, name: str) -> list[int]:
        """The items that share the title `name` with item `index`; it alone for an id."""
        title = name.strip().casefold()
        if self.items.titles[index].casefold() != title or self.items.asins[index] == name.strip():
            return [index]
        return [i for i, other in enumerate(self.items.titles) if other.casefold() == title]

    def _index(self, name: str) -> int | None:
        for kind, table in self.tables.items():
            for form in forms(name):
                key: object = form.casefold() if kind == "title" else form
                if kind == "id":
                    key = int(form) if form.isascii() and form.isdigit() else None
                if key in table:
                    return table[key]
        return None

    def _near(self, name: str) -> str:
        """A hint: an item with a name like this one, or what ids there are."""
        items, folded, names = self.items, name.strip().casefold(), {}
        for asin, title, item in zip(items.asins, items.titles, items.ids.tolist()):
            known_as = asin if asin and "asin" in self.tables else f"id {item}"
            if "title" in self.tables and title:
                names.setdefault(title.casefold(), f"{title!r} ({known_as})")
            if "asin" in self.tables and asin:
                names[asin.casefold()] = f"{asin!r}{f' ({title})' * bool(title)}"
        padded = [a for a in self.tables.get("asin", []) if a.lstrip("0") == folded.lstrip("0")]
        if padded:
            return f"; did you mean {padded[0]!r}, with the zeros that a spreadsheet takes away?"
        near = [] if folded.isdigit() else difflib.get_close_matches(folded, names, n=1)
        if near:
            return f"; did you mean {names[near[0]]}?"
        if "id" in self.tables:
            return f"; ids run from {items.ids[0]} to {items.ids[-1]}"
        own = folded.isascii() and folded.isdigit() and int(folded) in self.own
        way = " (--by id takes ids of the run's CSV)" * own
        return f"; original ids are such as {', '.join([*self.tables.get('asin', [])][:3])}{way}"


def _first(names: list[str]) -> dict[str, int]:
    table: dict[str, int] = {}
    for index, name in enumerate(names):
        if name:
            table.setdefault(name, index)
    return table


def read_items(path: Path, finder: Finder, flag: str) -> list[int]:
    """Catalogue indices of a file with one item per line; a title names all items that have it.
    Raises UsageError: the file is missing or empty, or a line names no item.
    """
    if not path.is_file():
        raise UsageError(f"{flag}={path}: file not found; it takes a file with an item per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{flag}={path}: not UTF-8 text, expected an item per line") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            for index in finder.find_all([line], f"{flag}={path}: line {number}"):
                found += finder.all_called(index, line)
    if not found and not finder.unknown:
        raise UsageError(f"{flag}={path}: names no item")
    return found
