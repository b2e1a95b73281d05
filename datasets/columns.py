"""Which column of a log is what: as the flags say, else by a published header.

Published formats and plain names of columns are known; nothing else is guessed.
"""

import re
from shlex import quote
from typing import NamedTuple

from datasets.cells import canonical, parse_list
from datasets.tables import Table, bare
from engine.errors import UsageError

ROLES = ("user", "item", "time", "rating", "title")
KNOWN = (  # published headers, as `bare` gives them: role -> column
    {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating"},
    {"user": "user_id", "item": "parent_asin", "time": "timestamp", "rating": "rating"},
    {"user": "reviewerid", "item": "asin", "time": "unixreviewtime", "rating": "overall"},
    {"user": "userid", "item": "movieid", "time": "timestamp", "rating": "rating"},
)
CONTRACT = {"user": "reviewerid", "item": "asin"}
BARE = ("user", "item", "rating", "time")  # MovieLens without a header
NAMES = {name for form in (*KNOWN, CONTRACT) for name in form.values()} - {"rating"}
UNTIMED = {*NAMES, "rating", "overall", "title"} - {form["time"] for form in KNOWN}
ASIN, REVIEWER = r"B\w{6,9}|\d{9}[\dX]", r"A\w{3,20}"
BY_FLAGS = "Name them: --user NAME --item NAME --time NAME (none keeps file order)"
BY_COLUMNS = "Name them: --columns USER,ITEM,TIME (none for no time)"


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
                f"  {name} has 0 and 1: if 0 means that nothing happened, --rating {quote(name)}"
                " --min_rating 1 leaves those rows out"
            )
        elif bare(name) == "title" and bare(columns.item) != "parent_asin":  # a review's there
            print("  --title title reads the titles")
        elif name == columns.rating:
            print(f"  {name} looks like a rating: --min_rating leaves low ones out")
