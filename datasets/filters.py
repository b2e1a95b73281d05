"""The interactions of a log in columns: sorting, filtering, and a domain's files made of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from datasets.domain import SUFFIXES
from datasets.interactions import write_csv
from datasets.items import Items, listing_of
from engine.errors import UsageError
from engine.files import replacing


class Log(NamedTuple):
    """Interactions in file order: codes user, item int32 [n] into names; time [n], seconds."""

    users: list[str]
    items: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray

    def keep(self, mask: np.ndarray) -> "Log":
        return self._replace(user=self.user[mask], item=self.item[mask], time=self.time[mask])

    def repeated(self, *columns: str) -> np.ndarray:
        """Mask of the rows that an earlier one equals in these columns, bool [n]."""
        return pd.DataFrame({name: getattr(self, name) for name in columns}).duplicated().to_numpy()

    def as_met(self) -> "Log":
        """Users in the order of their first rows; those without one are left out."""
        user, met = pd.factorize(self.user)
        return self._replace(users=[self.users[code] for code in met], user=user.astype(np.int32))

    def ordered(self, ties: np.ndarray | None, by_time: bool = True) -> "Log":
        """By user, then by time, then by `ties` (int64 [n]; None is file order)."""
        keys = [self.time, self.user] if by_time else [self.user]
        return self.keep(np.lexsort(keys if ties is None else [ties, *keys]))


def print_counts(stage: str, log: Log) -> None:
    """One line: the stage and how many users, items and interactions are left."""
    users, items = (len(np.unique(codes)) for codes in (log.user, log.item))
    rows = len(log.user)
    print(f"{stage:34s} {users:>11,} users {items:>10,} items {rows:>12,} interactions")


def keep(log: Log, mask: np.ndarray, stage: str, flag: str) -> Log:
    """The rows of a mask. Prints what is left.

    Args:
        flag: the one that loosens the filter.
    Raises:
        UsageError: nothing is left.
    """
    left = log.keep(mask)
    print_counts(stage, left)
    if not len(left.user):
        raise UsageError(f"nothing is left of {len(log.user):,} after '{stage}'; lower --{flag}")
    return left


def often(codes: np.ndarray, least: int) -> np.ndarray:
    """Mask of the rows whose code occurs at least `least` times."""
    return np.bincount(codes)[codes] >= least


def occurring(log: Log) -> set[str]:
    """The items that are left."""
    return {log.items[code] for code in np.unique(log.item)}


def tie_order(log: Log, seed: int) -> np.ndarray:
    """An order that says nothing about item or file, int64 [n]: a hash of (seed, user, item)."""
    users = np.array([_hashed(f"{seed} {name}") for name in log.users], dtype=np.uint64)
    items = np.array([_hashed(f"{seed} {name}") for name in log.items], dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = users[log.user] * np.uint64(0x9E3779B97F4A7C15) ^ items[log.item]
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
    return (mixed >> np.uint64(1)).astype(np.int64)


def _hashed(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def print_ties(log: Log, what: str, ties: Literal["hash", "file"], tie_seed: int) -> None:
    """One line: the share of a user's neighbouring reviews of equal time, and their order."""
    same_user = log.user[1:] == log.user[:-1]
    same_time = log.time[1:] == log.time[:-1]
    share = float((same_user & same_time).sum() / max(1, same_user.sum()))
    how = f"by a hash with --tie_seed={tie_seed}" if ties == "hash" else "in file order"
    print(f"{share:.1%} of a user's neighbouring {what} share a time: {how}")


def write_domain(log: Log, titles: dict[str, str], path: str | Path, dated: bool = True) -> None:
    """Write <domain>.csv and, beside it, <domain>.items.csv (item_id, asin, title).

    Items are numbered from 0 in the order of their codes.

    Args:
        dated: whether the reviews have times, which are written then.
    """
    path = Path(path)
    kept, number = np.unique(log.item, return_inverse=True)
    asins = [log.items[code] for code in kept]
    bounds = np.flatnonzero(np.diff(log.user, prepend=-1, append=-1))
    names = [titles.get(asin, "") for asin in asins]
    whole = np.array_equal(log.time, np.floor(log.time))
    time = log.time.astype(np.int64) if whole else log.time

    def rows() -> Iterator[tuple[str, list, list, list]]:
        for a, b in zip(bounds[:-1], bounds[1:]):
            items = number[a:b].tolist()
            shown = [names[item] for item in items]
            yield log.users[log.user[a]], items, shown, time[a:b].tolist()

    with replacing(path) as lists, replacing(listing_of(path)) as listing:  # both, or none
        write_csv(lists, rows(), dated)
        Items(np.arange(len(asins)), asins, names).write(listing)
    print(f"titles: {sum(map(bool, names)):,} of {len(names):,} items have one")
    print(f"wrote {path} and {listing_of(path)}")


def may_write(path: Path, overwrite: bool) -> tuple[bool, str]:
    """A rule for `cli.check`: no file of the domain stands where `write_domain` would write."""
    names = [*(path.with_suffix(suffix) for suffix in SUFFIXES), listing_of(path)]
    there = [name for name in names if name.exists()]
    named = there[0] if there else path
    return overwrite or not there, f"{named} already exists; --overwrite replaces it"
