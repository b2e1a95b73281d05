"""Histories of users from a file: a log by original ids, or lists per user."""

from pathlib import Path

import numpy as np

from datasets.interactions import read_histories
from datasets.items import Finder, Items, listing_of
from datasets.logs import (
    NAMES,
    ROLES,
    UNTIMED,
    canonical,
    choose_columns,
    list_of_items,
    list_of_times,
    original_ids,
    read_log,
)
from datasets.tables import Table, bare, open_table
from engine.errors import UsageError

Histories = dict[str, list[int]]  # user -> catalogue indices


def of_domain(csv_path: Path, names: Items) -> Histories:
    """The domain's own users."""
    rows = read_histories(csv_path)
    return {user: np.searchsorted(names.ids, ids).tolist() for user, ids in rows}


def with_known(own: Histories, csv_path: Path, names: Items, join: bool) -> Histories:
    """The histories, after those that users of the domain have there where `join` says so."""
    stored = {canonical(user): items for user, items in of_domain(csv_path, names).items()}
    there = len(own.keys() & stored.keys())
    if join:
        print(f"{there:,} of {len(own):,} users are users of {csv_path}: their own come first")
        return {user: stored.get(user, []) + items for user, items in own.items()}
    if there:
        print(
            f"{there:,} users are users of {csv_path} too; the history read is the file's alone"
            " (--known join puts their own first)"
        )
    return own


def of_file(
    path: Path, finder: Finder, columns: list[str], time_format: str | None = None
) -> Histories:
    """The users of a file. A log has original ids. A CSV of lists has them too, unless an items.csv
    stands beside it: its numbers are mapped through that.

    Args:
        columns: of user, item and time in a log; empty where their names are published ones.
    Raises:
        UsageError: the file is damaged, a user comes twice, or an item is not known.
    """
    table = open_table(path, columns, NAMES)
    by_name = {name.lower(): name for name in reversed(table.columns)}
    found: dict[str, list[str]] = {}
    if columns or not {"reviewerid", "asin"} <= by_name.keys() or "unixreviewtime" in by_name:
        given = dict(zip(ROLES, columns))  # user, item, time
        if not given and table.header and {bare(name) for name in table.columns} <= UNTIMED:
            given["time"] = "none"
        chosen = choose_columns(table, given, "auto", by_columns=True)
        if chosen.time is None:
            print(f"{path}: no time: items are read in file order")
        more = {"mend": "--unknown skip", "time_format": time_format}
        log, _ = read_log(table, chosen, drop_missing=finder.skip, one_user=True, **more)
        log = log.ordered(None)
        for user, item in zip(log.user, log.item):
            found.setdefault(log.users[user], []).append(log.items[item])
    elif time_format:
        raise UsageError(f"--time_format={time_format}: {path} has lists of items, without times")
    else:
        needed = [by_name[name] for name in ("reviewerid", "asin", "time") if name in by_name]
        found = _lists(path, table, needed)
        if not listing_of(path).is_file():
            finder.refuse_ambiguous([*found.values()], f"--users={path}")
        else:  # its numbers were mapped to original ids
            finder = finder.by_asin()
    source = f"--users={path}"
    return {user: finder.find_all(names, f"{source}: {user}") for user, names in found.items()}


def _lists(path: Path, table: Table, columns: list[str]) -> dict[str, list[str]]:
    """The lists by user, in the order of their times where `columns` has these too."""
    asins = original_ids(path)
    rows: dict[str, int] = {}
    lists: dict[str, list[str]] = {}
    for frame in table.frames(columns):
        for row, name, cell, *time in zip(frame.index, *(frame[column] for column in columns)):
            user = canonical(name)
            if not user:
                raise UsageError(f"--users={path}: row {row}: the user is missing")
            if rows.setdefault(user, row) != row:
                raise UsageError(
                    f"--users={path}: reviewerID {user!r} appears in rows {rows[user]} and {row}"
                )
            items = list_of_items(path, row, cell, asins)
            if time:
                times = list_of_times(path, row, *time, len(items))
                pairs = zip(times, items)
                ordered = sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))
                items = [item for _, item in ordered]
            lists[user] = items
    return lists
