"""Leave-one-out samples, batches without per-sample Python, and evaluation candidates.

Legend: B batch, L item slots (max_seq_length), N items (also the padding index), K candidates, U users.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.candidates import draw
from datasets.interactions import MINIMUM_LENGTH, Interactions

TrainTargets = Literal["last", "all"]
VALID, TEST = 2, 1  # how far the target stands from the end of the user's items; also the key of the split's candidates


@dataclass(frozen=True)
class Samples:
    """Windows (items[end - length : end] -> items[end]) into one packed array of catalogue indices.

    items: int32 [total]; end: int64 [n], the target's position; length: int64 [n], how many items before it belong to
    the user (not yet cut to L); n_items: N, the padding index; max_seq_length: L.
    """

    items: np.ndarray
    end: np.ndarray
    length: np.ndarray
    n_items: int
    max_seq_length: int

    def __len__(self) -> int:
        return len(self.end)

    def histories(self, rows: np.ndarray) -> Tensor:
        """The last L items before the target, padded with N on the left; int64 [B, L]."""
        return self._window(self.end[rows], self.length[rows], self.max_seq_length)

    def targets(self, rows: np.ndarray) -> Tensor:
        """Catalogue index of the next item; int64 [B]."""
        return torch.from_numpy(self.items[self.end[rows]].astype(np.int64))

    def shifted_targets(self, rows: np.ndarray) -> Tensor:
        """The next item at every position of `histories`, N where that is padding; int64 [B, L]."""
        return self._window(self.end[rows] + 1, self.length[rows], self.max_seq_length)

    def counts(self, every_position: bool = True) -> np.ndarray:
        """Number of training targets of each sample, every position or the last one alone; int64 [n]."""
        return np.minimum(self.length, self.max_seq_length if every_position else 1)

    def spread(self, n: int) -> Tensor:
        """The histories of `n` samples (or all) at even distances, to calibrate on; int64 [n, L]."""
        return self.histories(np.unique(np.linspace(0, len(self) - 1, n).astype(np.int64)))

    def _window(self, end: np.ndarray, length: np.ndarray, width: int) -> Tensor:
        back = np.arange(-width, 0)  # [L]
        position = np.maximum(end[:, None] + back, 0)
        inside = -back <= length[:, None]
        window = np.where(inside, self.items[np.minimum(position, len(self.items) - 1)], self.n_items)
        return torch.from_numpy(window.astype(np.int64))


def training_samples(data: Interactions, targets: TrainTargets, max_seq_length: int) -> Samples:
    """items[:-3] -> items[-3] of every user (`last`), or every prefix of items[:-2] to its next item (`all`)."""
    first, final = data.offsets[:-1], data.offsets[1:] - 3
    if targets == "last":
        return Samples(data.items, final, final - first, data.n_items, max_seq_length)
    per_user = final - first
    end = np.repeat(final + 1 - np.cumsum(per_user), per_user) + np.arange(per_user.sum())
    return Samples(data.items, end, end - np.repeat(first, per_user), data.n_items, max_seq_length)


class EvaluationBatch(NamedTuple):
    """See utils.evaluation.EvaluationBatch."""

    history: Tensor
    target: Tensor
    seen: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class EvaluationSplit:
    """items[:-2] -> items[-2] (valid) or items[:-1] -> items[-1] (test) of every user, with its candidates.

    Candidates are `n_candidates` uniform negatives that the user never met, a function of (seed, split, data row)
    alone; where the catalogue has fewer, all of them.
    """

    data: Interactions
    split: int  # VALID or TEST
    max_seq_length: int
    seed: int
    n_candidates: int

    @property
    def samples(self) -> Samples:
        end = self.data.offsets[1:] - self.split
        return Samples(self.data.items, end, end - self.data.offsets[:-1], self.data.n_items, self.max_seq_length)

    def fewest_candidates(self) -> int:
        """The smallest number of candidates any user gets."""
        return min(self.n_candidates, self.data.n_items - int(max(_distinct_per_user(self.data))))

    def candidate_counts(self) -> dict[str, int]:
        """How many candidates were asked for and the fewest a user gets, for results.json."""
        return {"asked": self.n_candidates, "fewest": self.fewest_candidates()}

    def batches(
        self, batch_size: int, device: str | torch.device = "cpu", limit: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Iterator[EvaluationBatch]:
        """All users in order, `batch_size` at a time; at most `limit` batches.

        Args:
            share: (r, n) gives batches r, r + n, r + 2 n, ... alone.
        """
        samples = self.samples
        every = np.arange(len(samples))[: None if limit is None else limit * batch_size]
        for i in range(share[0] * batch_size, len(every), share[1] * batch_size):
            rows = every[i : i + batch_size]
            target = samples.targets(rows)
            seen = samples._window(samples.end[rows], samples.length[rows], int(samples.length[rows].max()))
            batch = (
                samples.histories(rows),
                target,
                torch.where(seen == self.data.n_items, target[:, None], seen),
                torch.from_numpy(self.candidates(rows)),
            )
            yield EvaluationBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def candidates(self, users: np.ndarray) -> np.ndarray:
        """Negatives of the given users (indices into data.users), int64 [B, K], filled up with -1."""
        starts, stops = self.data.offsets[users], self.data.offsets[users + 1]
        owner = np.repeat(np.arange(len(users)), stops - starts)
        position = np.arange(len(owner)) + np.repeat(starts - np.concatenate([[0], np.cumsum(stops - starts)[:-1]]), stops - starts)
        return draw(
            (self.seed, self.split),
            self.data.rows[users],
            owner,
            self.data.items[position],
            self.data.n_items,
            min(self.n_candidates, self.data.n_items),  # more there are not
        )


def prepare(
    data: Interactions, train_targets: TrainTargets, max_seq_length: int, candidate_seed: int, num_candidates: int
) -> tuple[Samples, dict[str, EvaluationSplit]]:
    """The training samples and the evaluation splits `valid` and `test`; prints what they are."""
    samples = training_samples(data, train_targets, max_seq_length)
    splits = {
        name: EvaluationSplit(data, split, max_seq_length, candidate_seed, num_candidates)
        for name, split in (("valid", VALID), ("test", TEST))
    }
    print(describe(data, samples, splits), flush=True)
    return samples, splits


def users_of(data: Interactions, samples: Samples, rows: np.ndarray) -> list[str]:
    """The reviewerID of each sample."""
    return [data.users[i] for i in np.searchsorted(data.offsets, samples.end[rows], side="right") - 1]


def popularity(data: Interactions) -> Tensor:
    """How often each item occurs among the items before every user's validation target; float32 [N]."""
    owner_end = np.repeat(data.offsets[1:] - VALID, np.diff(data.offsets))
    known = data.items[np.arange(len(data.items)) < owner_end]
    return torch.from_numpy(np.bincount(known, minlength=data.n_items).astype(np.float32))


def describe(data: Interactions, samples: Samples, splits: dict[str, EvaluationSplit]) -> str:
    """The domain in a line or two: sizes, what was dropped, candidates where they are fewer than asked for."""
    lines = [f"{data.n_users:,} users, {data.n_items:,} items, {len(data.items):,} interactions; {len(samples):,} training samples"]
    if data.dropped:
        lines.append(f"dropped {data.dropped:,} users with fewer than {MINIMUM_LENGTH} items")
    few = splits["test"].fewest_candidates()
    if few < splits["test"].n_candidates:
        lines.append(f"the catalogue is small: some users have only {few} candidates besides the target, all of them are used")
    return "\n".join(lines)


def _distinct_per_user(data: Interactions) -> np.ndarray:
    owner = np.repeat(np.arange(data.n_users), np.diff(data.offsets))
    pairs = np.unique(owner * np.int64(data.n_items) + data.items)
    return np.bincount(pairs // data.n_items, minlength=data.n_users)
