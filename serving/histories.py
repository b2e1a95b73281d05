"""Histories of users from a file: a log by original ids, or lists per user."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.cells import canonical, form_in
from datasets.columns import NAMES, ROLES, UNTIMED, choose_columns, report_columns
from datasets.interactions import read_histories
from datasets.items import Finder, Items
from datasets.logs import Advice, original_ids, read_log
from datasets.tables import bare, open_table
from datasets.values import APART, EPOCH
from engine import cli

DATED = re.compile(r"time|date|stamp|^ts$|_at$")  # a log's column
ADVICE = Advice(
    "--unknown skip leaves them out",
    "--columns names others",
    "write an item per row, or lists under reviewerID,asin",
)


class History(NamedTuple):
    """A user's items, as catalogue indices, and their times, ascending; None without any."""

    items: list[int]
    times: list[float] | None = None


Histories = dict[str, History]


def of_domain(csv_path: Path, names: Items, timed: bool = False) -> Histories:
    """The domain's own users; with the times of their items where asked."""
    found = {}
    for user, ids, times in read_histories(csv_path, timed):
        found[user] = History(np.searchsorted(names.ids, ids).tolist(), times)
    return found


def with_known(own: Histories, csv_path: Path, names: Items, join: bool) -> Histories:
    """The histories, joined with those that users of the domain have there where `join` says so."""
    domain = of_domain(csv_path, names, timed=join).items()
    stored = {canonical(user): history for user, history in domain}
    known = {user: form_in(stored, user) for user in own}
    there = [user for user, name in known.items() if name is not None]
    if join:
        print(f"{len(there):,} of {len(own):,} users are users of {csv_path}: events are joined")
        pairs = {user: (stored[known[user]], own[user]) for user in there}
        joined = own | {user: join_by_time(*pair) for user, pair in pairs.items()}
        n_events = sum(len(one.items) + len(other.items) for one, other in pairs.values())
        again = n_events - sum(len(joined[user].items) for user in there)
        untimed = sum(joined[user].times is None for user in there)
        if again:
            print(f"{again:,} events are in both, and counted once")
        if untimed:
            print(
                f"{untimed:,} users whose times in the file and in the domain are of two units, or"
                " missing: the file's events come last"
            )
        return joined
    if there:
        print(
            f"{len(there):,} users are users of {csv_path} too; the history read is the file's"
            " alone, and items that they met before may be recommended (--known join adds these)"
        )
    return own


def join_by_time(known: History, new: History) -> History:
    """Both, by their times; of equal events (item and time) one. Without times, or where those of
    the two differ in their unit, `new` comes last.
    """
    last = [max(history.times or [0]) for history in (known, new)]
    one_unit = (last[0] >= EPOCH) == (last[1] >= EPOCH) and max(last) <= APART * min(last)
    if not (known.times and new.times and one_unit):
        return History(known.items + new.items)
    events, there = [*zip(known.times, known.items)], {*zip(known.times, known.items)}
    events += [event for event in zip(new.times, new.items) if event not in there]
    events.sort(key=lambda event: event[0])  # stable
    return History([item for _, item in events], [time for time, _ in events])


def of_file(
    path: Path,
    finder: Finder,
    columns: list[str],
    time_format: str | None = None,
    min_rating: float | None = None,
) -> Histories:
    """The users of a file. A log has original ids. A CSV of lists has them too, unless an items.csv
    stands beside it: its numbers are mapped through that.

    Args:
        columns: of user, item, time and maybe rating in a log; empty where they have known names.
        time_format, min_rating: see `read_log`.
    Raises:
        UsageError: the file is damaged, or an item is not known.
    """
    table = open_table(path, columns, NAMES)
    names = {bare(name) for name in table.columns}
    dated = any(map(DATED.search, names - {"time"}))  # lists of times are of ours
    in_lists = not columns and {"reviewerid", "asin"} <= names and not dated
    given = dict(zip(ROLES, columns))
    if not given and table.header and names <= UNTIMED:
        given["time"] = "none"
    chosen = choose_columns(table, given, "yes" if in_lists else "auto", by_columns=True)
    rated = min_rating is None or chosen.rating
    cli.check((rated, f"--min_rating={min_rating}: name the rating as the fourth of --columns"))
    report_columns(table, chosen, min_rating, advise=False)
    options = {"new_events": True, "advice": ADVICE}
    drop = ROLES if finder.skip else ()
    log, _ = read_log(table, chosen, min_rating, drop, time_format=time_format, **options)
    log = log.ordered(None)
    found: dict[str, list[tuple[str, float]]] = {user: [] for user in log.users}
    for user, item, time in zip(log.user, log.item, log.time.tolist()):
        found[log.users[user]].append((log.items[item], time))
    mapped = chosen.lists and original_ids(path)
    if chosen.lists and not mapped:
        finder.refuse_ambiguous([[log.items[i] for i in set(log.item)]], f"--users={path}")
    elif mapped:  # its numbers were mapped to original ids
        finder = finder.by_asin()
    histories = {}
    for user, events in found.items():
        source = f"--users={path}: {user}"
        kept = [(i, time) for name, time in events for i in finder.find_all([name], source)]
        times = [time for _, time in kept] if chosen.time is not None else None
        histories[user] = History([item for item, _ in kept], times)
    return histories
