"""Leave-one-out samples, batches without per-sample Python, and evaluation candidates.

Legend: B batch, L item slots (max_seq_length), N items (also the padding index), K candidates, U
    users, n samples, S items of some samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.candidates import draw
from datasets.interactions import MINIMUM_LENGTH, Interactions
from utils.evaluation import Batch
from utils.flags import Evaluation

TrainTargets = Literal["last", "all"]
CUT_SHARE, TRAINING_SHARE = 0.2, 0.2  # of users and of interactions: reported from there
FEW_USERS = 30  # evaluated: reported
SOME_USERS = 512  # whose scores tell how loud a model is
VALID, TEST = 2, 1  # the target's place from the end of the user's items; also a key of candidates


class TrainBatch(NamedTuple):
    """Some samples: their indices, histories [B, L] on the CPU, where the model packs them, and
    targets on the device: [B], or [S] with a target after every item, row after row.

    lengths: how many targets each sample has. step: the optimizer step, from 1.
    """

    indices: np.ndarray
    history: Tensor
    target: Tensor
    lengths: list[int]
    step: int = 0


@dataclass(frozen=True)
class Samples:
    """Windows (items[end - length : end] -> items[end]) into one packed array of catalogue indices.

    data: the users' items.
    end: int64 [n], the target's position.
    length: int64 [n], how many items before it belong to the user (not yet cut to L).
    max_seq_length: L.
    every_position: each position of a window is a training target, not the last one alone.
    """

    data: Interactions
    end: np.ndarray
    length: np.ndarray
    max_seq_length: int
    every_position: bool = False

    def __len__(self) -> int:
        return len(self.end)

    def batch(self, indices: np.ndarray, device: torch.device, step: int = 0) -> TrainBatch:
        """What a training step reads of these samples."""
        target, lengths = self.targets(indices), [1] * len(indices)
        if self.every_position:
            padded = self.shifted_targets(indices)
            target, lengths = padded[padded != self.data.n_items], self.counts()[indices].tolist()
        return TrainBatch(indices, self.histories(indices), target.to(device), lengths, step)

    def histories(self, indices: np.ndarray) -> Tensor:
        """The last L items before the target, padded with N on the left; int64 [B, L]."""
        return self.windows(self.end[indices], self.length[indices], self.max_seq_length)

    def targets(self, indices: np.ndarray) -> Tensor:
        """Catalogue index of the next item; int64 [B]."""
        return torch.from_numpy(self.data.items[self.end[indices]].astype(np.int64))

    def shifted_targets(self, indices: np.ndarray) -> Tensor:
        """The next item at every position of `histories`, N where that is padding; int64 [B, L]."""
        return self.windows(self.end[indices] + 1, self.length[indices], self.max_seq_length)

    def lengths(self) -> np.ndarray:
        """Number of items in each history; int64 [n]."""
        return np.minimum(self.length, self.max_seq_length)

    def counts(self) -> np.ndarray:
        """Number of training targets of each sample; int64 [n]."""
        return self.lengths() if self.every_position else np.minimum(self.length, 1)

    def users(self, indices: np.ndarray) -> list[str]:
        """The reviewerID of each sample."""
        owner = np.searchsorted(self.data.offsets, self.end[indices], side="right") - 1
        names = self.data.users
        return [names[user] if user < len(names) else "a short user" for user in owner]

    def evenly(self, n: int) -> np.ndarray:
        """Indices of `n` samples (or all) at even distances."""
        return np.unique(np.linspace(0, len(self) - 1, n).astype(np.int64))

    def windows(self, end: np.ndarray, length: np.ndarray, width: int) -> Tensor:
        """items[end - width : end] of each row, padded with N beyond `length`; int64 [B, width]."""
        items = self.data.items
        back = np.arange(-width, 0)
        position = np.maximum(end[:, None] + back, 0)
        inside = -back <= length[:, None]
        window = np.where(inside, items[np.minimum(position, len(items) - 1)], self.data.n_items)
        return torch.from_numpy(window.astype(np.int64))


def training_samples(
    data: Interactions, targets: TrainTargets, max_seq_length: int, every_position: bool = False
) -> Samples:
    """items[:-3] -> items[-3] of every user (`last`), or every prefix of items[:-2] (`all`).

    Users that are not evaluated train with all their items: of a split by time, and where every
    position is a target.
    """
    first, final = data.offsets[:-1], data.offsets[1:] - 3  # the last target
    if every_position or data.moment is not None:
        longer = np.diff(data.short_offsets) >= 2
        first = np.concatenate([first, data.short_offsets[:-1][longer]])
        final = np.concatenate([final, data.short_offsets[1:][longer] - 1])
    if targets == "all":
        per_user = final - first
        final = np.repeat(final + 1 - np.cumsum(per_user), per_user) + np.arange(per_user.sum())
        first = np.repeat(first, per_user)
    return Samples(data, final, final - first, max_seq_length, every_position)


def some_histories(data: Interactions, models: list[Any]) -> Tensor:
    """Of SOME_USERS users, as long as the longest that a model reads (`max_seq_length`)."""
    samples = training_samples(data, "last", max(model.max_seq_length for model in models))
    return samples.histories(samples.evenly(SOME_USERS))


@dataclass(frozen=True)
class EvaluationSplit:
    """items[:-2] -> items[-2] (valid) or items[:-1] -> items[-1] (test) of every user, with its
    candidates.

    Candidates are `n_candidates` uniform negatives that the user never met, a function of (seed,
    split, data row) alone. Where the catalogue has fewer, all of them.
    """

    data: Interactions
    split: int  # VALID or TEST
    max_seq_length: int
    seed: int
    n_candidates: int

    @property
    def samples(self) -> Samples:
        end = self.data.offsets[1:] - self.split
        return Samples(self.data, end, end - self.data.offsets[:-1], self.max_seq_length)

    @cached_property
    def never_met(self) -> np.ndarray:
        """How many items each user never meets, int64 [U]."""
        data = self.data
        owner = np.repeat(np.arange(data.n_users), np.diff(data.offsets))
        pairs = np.unique(owner * np.int64(data.n_items) + data.items[: data.offsets[-1]])
        return data.n_items - np.bincount(pairs // data.n_items)

    def fewest_candidates(self) -> int:
        """The smallest number of candidates that any user gets."""
        return min(self.n_candidates, int(self.never_met.min()))

    def targets(self) -> np.ndarray:
        """Catalogue index of every user's target, int64 [U]."""
        return self.samples.targets(np.arange(len(self.samples))).numpy()

    def popularity(self) -> np.ndarray:
        """How often each item occurs before the users' validation targets, int64 [N]."""
        return popularity(self.data)

    def repeated(self) -> np.ndarray:
        """Whether the user had met the target before, bool [U]."""
        data = self.data
        owner = np.repeat(np.arange(data.n_users), np.diff(data.offsets))
        place, end = np.arange(len(owner)), self.samples.end[owner]
        again = (data.items[: len(owner)] == data.items[end]) & (place < end)
        return np.bincount(owner[again], minlength=data.n_users) > 0

    def n_batches(self, batch_size: int, limit: int | None = None) -> int:
        """Of all users, at most `limit`."""
        every = -(-len(self.samples) // batch_size)
        return every if limit is None else min(every, limit)

    def batches(
        self,
        batch_size: int,
        device: str | torch.device = "cpu",
        limit: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """All users in order, `batch_size` at a time; at most `limit` batches.

        Args:
            share: (r, n) gives batches r, r + n, r + 2 n, ... alone.
        """
        samples = self.samples
        every = np.arange(len(samples))
        for i in range(share[0], self.n_batches(batch_size, limit), share[1]):
            users = every[i * batch_size : (i + 1) * batch_size]
            target = samples.targets(users)
            longest = int(samples.length[users].max())
            seen = samples.windows(samples.end[users], samples.length[users], longest)
            seen = torch.where(seen == self.data.n_items, target[:, None], seen)
            given = target, seen, torch.from_numpy(self.candidates(users))
            moved = (tensor.to(device, non_blocking=True) for tensor in given)
            yield Batch(samples.histories(users), *moved)

    def candidates(self, users: np.ndarray) -> np.ndarray:
        """Negatives of users (indices into data.users), int64 [B, K], filled up with -1."""
        data = self.data
        starts, lengths = data.offsets[users], data.offsets[users + 1] - data.offsets[users]
        owner = np.repeat(np.arange(len(users)), lengths)
        before = np.cumsum(lengths) - lengths
        position = np.arange(len(owner)) + np.repeat(starts - before, lengths)
        return draw(
            (self.seed, self.split),
            data.rows[users],
            owner,
            data.items[position],
            data.n_items,
            min(self.n_candidates, data.n_items),
        )


def evaluation_splits(
    data: Interactions, max_seq_length: int, evaluation: Evaluation
) -> dict[str, EvaluationSplit]:
    """`valid` and `test`."""
    protocol = max_seq_length, evaluation.candidate_seed, evaluation.num_candidates
    return {
        "valid": EvaluationSplit(data, VALID, *protocol),
        "test": EvaluationSplit(data, TEST, *protocol),
    }


def popularity(data: Interactions) -> np.ndarray:
    """How often each item occurs before the users' validation targets; int64 [N]."""
    known_until = np.repeat(data.offsets[1:] - VALID, np.diff(data.offsets))
    known = np.ones(len(data.items), dtype=bool)  # of short users all
    known[: data.offsets[-1]] = np.arange(data.offsets[-1]) < known_until
    return np.bincount(data.items[known], minlength=data.n_items)


def describe(data: Interactions, samples: Samples, splits: dict[str, EvaluationSplit]) -> str:
    """The domain in a line or two: sizes, what was dropped, candidates where there are too few."""
    n = data.offsets[-1] if data.moment is None else len(data.items)
    lines = [
        f"{data.n_trained:,} users, {data.n_items:,} items, {n:,} interactions;"
        f" {len(samples):,} training samples"
    ]
    if data.moment is not None:
        lines.append(
            f"test targets from time {data.moment:.15g} on, of {data.n_users:,} users; what they"
            " meet later is not used"
        )
    known = np.diff(data.offsets) - 1  # before the test target
    slots = samples.max_seq_length
    if (known > slots).mean() > CUT_SHARE:
        lines.append(
            f"histories of {(known > slots).mean():.0%} of the users are cut: the median has"
            f" {np.median(known):.0f} items, {slots} are read (--max_seq_length)"
        )
    share = samples.counts().sum() / max(1, data.offsets[-1] - 2 * data.n_users)
    if share < TRAINING_SHARE and not samples.every_position:
        lines.append(
            f"{share:.0%} of the interactions before validation are training targets;"
            " --train_targets all takes every one"
        )
    if data.n_short and data.moment is None:
        used = "popularity and training use" if samples.every_position else "popularity uses"
        lines.append(
            f"not evaluated: {data.n_short:,} users with fewer than {MINIMUM_LENGTH} items; {used}"
            " their items"
        )
    elif data.n_short:
        lines.append(
            f"not evaluated: {data.n_short:,} users with fewer than {MINIMUM_LENGTH - 1} items"
            " before that time, or none after it; popularity and training use what is before"
        )
    if data.moment is not None:
        new = splits["test"].popularity()[splits["test"].targets()] == 0
        if new.any():
            lines.append(f"{new.mean():.1%} of the test targets occur nowhere in training")
    if data.n_users < FEW_USERS:
        lines.append(f"only {data.n_users} users are evaluated: their figures say little")
    without = int((splits["test"].never_met == 0).sum())
    if without:
        lines.append(f"{without:,} users meet every item: their targets rank first with any model")
    few = splits["test"].fewest_candidates()
    if few < splits["test"].n_candidates:
        lines.append(
            f"the catalogue is small: some users have only {few} candidates besides the target,"
            " all of them are used"
        )
    return "\n".join(lines)
