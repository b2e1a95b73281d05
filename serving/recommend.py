"""The top items for a history, from any finished run.

    python -m serving.recommend --history 12,99,1033   # demo domain, its best run: a few seconds
    python -m serving.recommend --history '["Warm lamp 21"]' --k 5                       # by title
    python -m serving.recommend --user U00012                                 # one of its users
    python -m serving.recommend --similar 99                                  # items like this one
    python -m serving.recommend --domain_type cloth --model sasrec --history 12,99
    python -m serving.recommend --domain_type cloth --users all --output recs.parquet
    python -m serving.recommend --model runs/a --users histories.csv --output recs.csv --k 20
    python -m serving.recommend --model student,runs/b --history 12,99       # the sum of scores
    python -m serving.recommend --model runs/b --unseen true --history 12    # items without a user

Items are named by their original ids or titles, both from <domain>.items.csv. Where that has none,
and with `--by id`, they are named by their ids in the domain's CSV. Without a history, items are
ranked by popularity. As a function:

    from serving.recommend import recommend
    items, scores = recommend([[12, 99], [1033]], k=10, domain_type="cloth")
"""

import difflib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.items import Finder, Items, listing_of, read_items
from engine import cli, processes
from engine.cli import Group, PositiveInt, flag
from engine.errors import UsageError
from engine.files import check_writable
from serving.served import Served, ServedFiles, is_export, read_all

if TYPE_CHECKING:
    import torch

    from serving.recommender import Recommender

SUFFIXES = (".csv", ".jsonl", ".parquet")  # of files of lists
SHOWN = 20  # items of a history on the screen
LINE = "  {rank:>4}  {score:>9}  {id:>10}  {title}"


class Asked(Group):
    """Whose list: one history on the screen, or those of many users into a file"""

    history: list[str] = flag([], "items in time order, the last one most recent")
    user: str | None = flag(None, "a user of the domain, by reviewerID")
    users: str | None = flag(
        None, "all, a log by original ids, or a CSV with reviewerID and asin (item lists)"
    )
    columns: list[str] = flag(
        [],
        "user, item and time (and rating) of the log of --users, where their names are not known",
        needs="users",
    )
    time_format: str | None = flag(
        None, "of its dates, as datasets.convert takes it", needs="users"
    )
    min_rating: float | None = flag(None, "lowest rating of that log that counts", needs="users")
    similar: str | None = flag(None, "an item: the items whose vectors are nearest to its own")
    known: Literal["log", "join"] = flag(
        "log",
        "history of a user of --users whom the domain has: the log's alone, or joined with its own",
        needs="users",
    )
    output: str | None = flag(None, "the file of --users: .parquet, .csv or .jsonl")
    overwrite: bool = flag(False, "replace the file of --output")

    @property
    def one_of_users(self) -> bool:
        """Whether --users names one user: `--users 196`, where there is no such file."""
        return not (self.users in (None, "all") or self.output or Path(self.users).exists())

    @property
    def name(self) -> str | None:
        """The one user who is named."""
        return self.users if self.one_of_users else self.user

    @property
    def target(self) -> Path | None:
        """The file that is written; a link stays one."""
        return Path(self.output).resolve() if self.output else None

    def problems(self, flags: dict[str, Any]) -> list[str]:
        target = self.target
        users, output = None if self.one_of_users else self.users, f"--output={self.output}"
        sources = ("history", "user", "users", "similar")
        given = [source for source in sources if getattr(self, source)]
        rules = [
            (len(given) < 2, f"--{' and --'.join(given)}: give one of them"),
            (not users or target, "--users needs --output, the file of the lists"),
            (
                len(self.columns) in (0, 3, 4),
                "--columns: expected user, item, time (or none), rating",
            ),
            (not target or users, "--output is of --users; one history is shown"),
            (users in (None, "all") or Path(users).exists(), f"--users={users}: file not found"),
        ]
        if target is not None:
            read = [flags[name] for name in ("users", "allow", "deny", "data_path")]
            read = [Path(name).resolve() for name in read if name]
            run = is_export(target.parent) or (target.parent / "config.json").is_file()
            rules += [
                (target not in read, f"{output} is a file that is read"),
                (target.parent not in read, f"{output} is in a folder that is read"),
                (not run, f"{output} is in the folder of a run or an export"),
                (not target.is_dir(), f"{output} is a folder"),
                (target.suffix in SUFFIXES, f"{output}: must end in {', '.join(SUFFIXES)}"),
                (
                    self.overwrite or not target.exists(),
                    f"{output}: already exists; --overwrite true replaces it",
                ),
            ]
        return [message for holds, message in rules if not holds]


class Offered(Group):
    """What is recommended"""

    k: PositiveInt = flag(10, "length of a list")
    by: Literal["auto", "id", "asin", "title"] = flag(
        "auto",
        "what names an item: its original id, its title, or its id in the CSV (auto: where there "
        "are no original ones)",
    )
    exclude: Literal["seen", "none"] = flag("seen", "leave out the items of the history")
    allow: str | None = flag(None, "a file of items, one per line: only these are recommended")
    deny: str | None = flag(None, "a file of items that are never recommended")
    unseen: bool = flag(False, "also items that the data lacks, where the table has vectors")
    unknown: Literal["refuse", "skip"] = flag(
        "refuse", "items of --users and --allow that are not known: skip leaves them out"
    )


class Opened(NamedTuple):
    """What lists are made with.

    allowed: bool [N], the items that may be recommended; None for all.
    """

    recommender: "Recommender"
    names: Items
    runs: list[Served]
    allowed: "torch.Tensor | None"


def recommend(
    histories: Sequence[Sequence[int]],
    k: int = 10,
    *,
    by: Literal["id", "asin", "title", "auto"] = "id",
    exclude: Literal["seen", "none"] = "seen",
    device: str = "auto",
    **files,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best items of each history, the best first; equal scores in item order.

    Every call reads the model. `open_model` reads it once for many.

    Args:
        histories: items in time order; n lists of any length.
        by: what names an item: its id in the domain's CSV, or as `--by` on the command line.
        exclude: `seen` leaves out the items of the history, `none` nothing.
        device: auto, cpu or cuda.
        files: domain_type, data_path, item_table, model, as on the command line.
    Returns:
        item ids int64 [n, k] and scores float32 [n, k]; -1 and -inf where no item is left.
    Raises:
        UsageError: a file is missing, or an id is unknown.
    """
    recommender, names = open_model(read_all(ServedFiles(**files)), device)
    finder = Finder(names, by)
    rows = [[finder.find(str(item), "histories") for item in history] for history in histories]
    items, scores = recommender.recommend(rows, k, exclude)
    found = items.numpy()
    return np.where(found >= 0, names.ids[found], -1), scores.numpy()


def open_model(
    runs: list[Served], device: str, unseen: bool = False
) -> tuple["Recommender", Items]:
    """The recommender of one run, or of the sum of several, and what its items are called."""
    item_ids = reduce(np.intersect1d, [served.item_ids(unseen) for served in runs])
    cli.check(
        (
            not unseen or len(item_ids) > runs[0].inputs.data.n_items,
            "--unseen: no vectors for items that the data lacks; python -m experiments.titles"
            " gives them to the items of <domain>.items.csv",
        )
    )

    from serving.recommender import open_runs  # imported late: bad flags fail at once

    model = open_runs(runs, item_ids, processes.choose_device(device))
    return model, runs[0].names(item_ids)


def allowed_items(names: Items, offered: Offered) -> "torch.Tensor | None":
    """bool [N], the items that may be recommended; None for all. A denied one may be unknown."""
    import torch

    allow, deny = offered.allow, offered.deny
    if allow is None and deny is None:
        return None
    allowed = torch.full((len(names.ids),), allow is None)
    for source, path in (("--allow", allow), ("--deny", deny)):
        if path is not None:
            skips = source == "--deny" or offered.unknown == "skip"
            finder = Finder(names, offered.by, skip=skips)
            allowed[read_items(Path(path), finder, source)] = source == "--allow"
            _report_unknown(finder, source)
    cli.check((bool(allowed.any()), "--allow and --deny leave no item to recommend"))
    return allowed


def history_of(user: str, served: Served, names: Items, flag: str) -> list[int]:
    """The catalogue indices of a user of the domain, whom `flag` names. Raises UsageError: there is
    no such user.
    """
    from serving.histories import of_domain

    csv_path = served.inputs.csv_path
    own = of_domain(csv_path, names)
    near = [] if user.isdigit() else difflib.get_close_matches(user, own, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    file = "no such file, and " if flag == "users" else ""
    cli.check((user in own, f"--{flag}={user}: {file}{csv_path} has no such user{hint}"))
    return own[user].items


def _report_unknown(finder: Finder, source: str) -> None:
    if finder.unknown:
        shown = ", ".join(dict.fromkeys(finder.unknown[:3]))
        print(f"{source}: {len(finder.unknown):,} unknown items skipped, such as {shown}")


def show(
    heading: str, history: list[int], items: list[int], scores: list[float], names: Items
) -> None:
    """One history and its list, as a table."""
    print(heading)
    if len(history) > SHOWN:
        print(f"  the last {SHOWN} are")
    for item in history[-SHOWN:]:
        print(LINE.format(rank="", score="", id=names.name(item), title=names.show(item)))
    print(f"top {len(items)}")
    for rank, (item, score) in enumerate(zip(items, scores), start=1):
        shown = {"id": names.name(item), "title": names.show(item)}
        print(LINE.format(rank=rank, score=f"{score:.4f}", **shown))


@cli.command
def main(
    *,
    files: ServedFiles,
    asked: Asked,
    offered: Offered,
    batch_size: PositiveInt = flag(512, "users per forward pass"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
) -> list[dict] | None:
    """Recommend for one history, on the screen, or for many, into a file."""
    if asked.target is not None:
        check_writable(asked.target.parent, "--output")
    runs = read_all(files)
    for inputs in (served.inputs for served in runs):
        of_run = [inputs.csv_path, listing_of(inputs.csv_path), inputs.table_path]
        if asked.target in [path.resolve() for path in of_run if path]:
            raise UsageError(f"--output={asked.output} is a file that the run was made from")
    recommender, names = open_model(runs, device, offered.unseen)
    opened = Opened(recommender, names, runs, allowed_items(names, offered))
    if asked.target is None:
        return one_list(opened, asked, offered)
    write_lists(opened, asked, offered, batch_size)
    return None


def one_list(opened: Opened, asked: Asked, offered: Offered) -> list[dict]:
    """One history's list, shown on the screen."""
    recommender, names, runs, allowed = opened
    finder, k = Finder(names, offered.by), offered.k
    if asked.similar is not None:
        own = [finder.find(asked.similar, "--similar")]
        items, scores = recommender.similar(own[0], k, allowed)
        heading = "items like"
    else:
        own = finder.find_joined(asked.history, "--history")
        if asked.name is not None:
            own = history_of(asked.name, runs[0], names, "users" if asked.one_of_users else "user")
        items, scores = recommender.recommend([own], k, offered.exclude, allowed)
        heading = f"history, {len(own)} items" if own else "no history: by popularity"
    typed = [asked.similar] if asked.similar else [names.titles[i] for i in own]
    for item, name in zip(own, typed):
        same = finder.all_called(item, name) if name in [asked.similar, *asked.history] else []
        if same[1:]:
            others = ", ".join(names.name(i) for i in same)
            print(f"{name!r} is the title of {others}; {names.name(item)} is taken")
    there = int((items[0] >= 0).sum())
    if not there:
        print("no item is left: the history, --allow and --deny take all of them")
    best, values = items[0, :there].tolist(), scores[0, :there].tolist()
    show(heading, own, best, values, names)
    shown = [(int(names.ids[item]), names.titles[item]) for item in best]
    return [{"item_id": i, "title": t, "score": s} for (i, t), s in zip(shown, values)]


def write_lists(opened: Opened, asked: Asked, offered: Offered, batch_size: int) -> None:
    """The lists of all users of the domain, or of a file, into the file of --output."""
    from serving import histories
    from serving.lists import as_table, writing

    recommender, names, runs, allowed = opened
    if asked.users == "all":
        lists = histories.of_domain(runs[0].inputs.csv_path, names)
    else:
        finder = Finder(names, offered.by, skip=offered.unknown == "skip")
        options = asked.columns, asked.time_format, asked.min_rating
        lists = histories.of_file(Path(asked.users), finder, *options)
        _report_unknown(finder, "--users")
        if finder.unknown and not any(history.items for history in lists.values()):
            raise UsageError(f"--users={asked.users}: none of its items is known here")
        lists = histories.with_known(lists, runs[0].inputs.csv_path, names, asked.known == "join")
    who, own = [*lists], [history.items for history in lists.values()]
    with writing(asked.target) as write, tqdm(total=len(who), unit="user", mininterval=1) as bar:
        for start in range(0, len(who), batch_size):
            part = slice(start, start + batch_size)
            items, scores = recommender.recommend(own[part], offered.k, offered.exclude, allowed)
            write(as_table(who[part], items.numpy(), scores.numpy(), names))
            bar.update(len(who[part]))
    empty = own.count([])
    if empty:
        print(f"{empty:,} users without history: by popularity")
    if offered.exclude == "seen":
        print("items of the histories read are left out (--exclude none keeps them)")
    if asked.min_rating is not None:
        print("items of the file that are rated lower may be recommended")
    print(f"wrote {asked.output}: up to {offered.k} items for each of {len(who):,} users")


if __name__ == "__main__":
    cli.run(main)
