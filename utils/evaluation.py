"""From user vectors to ranks: sampled and full-catalogue protocols in one pass over the users."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from utils import processes
from utils.errors import RunError
from utils.metrics import summarise

Metrics = dict[str, dict[str, float]]

PROTOCOLS = {"sampled": (5, 10), "full": (5, 10, 20), "full_all": (5, 10, 20)}  # -> cut-offs
NO_SCORE, NO_VECTOR = 0, -1  # in place of a rank
CPU_TILE, TILE = 2**23, 2**26  # scores held at once; larger blocks are slow to allocate on CPU
FEWEST_USERS = 8  # per tile, so that a pass over ten million items serves several users


class EvaluationBatch(Protocol):
    """What one batch of users must carry: the history on the CPU, the rest on one device."""

    history: Tensor  # [B, L] what the model reads; it is packed on the CPU
    target: Tensor  # [B] catalogue index of the true next item
    seen: (
        Tensor  # [B, S] everything the user met before the target; filled up with the target itself
    )
    candidates: Tensor  # [B, K] negatives; filled up with -1


class Ranks(NamedTuple):
    """Rank of each user's target under each protocol, each int64 [U], >= 1."""

    sampled: np.ndarray
    full: np.ndarray
    full_all: np.ndarray

    def metrics(self) -> Metrics:
        return {
            name: summarise(getattr(self, name), cutoffs) for name, cutoffs in PROTOCOLS.items()
        }


@torch.no_grad()
def evaluate(
    encode: Callable[[Tensor], Tensor], item_table: Tensor, batches: Iterable[EvaluationBatch]
) -> Ranks:
    """Rank every user's target: sampled (its candidates), full (history excluded), full_all
    (nothing excluded).

    rank = 1 + number of other ranked items whose score is >= the target's. The target's score is
    read from the same product, so ties count against the model and a constant model scores zero.
    The target is never excluded.

    Args:
        encode: history [B, L] -> user vectors [B, D]; a model in evaluation mode.
        item_table: [N, D], row = catalogue index.
        batches: user batches, in user order.
    Raises:
        RunError: a score is not finite.
    """
    columns = item_table.float().T
    found = [rank_users(encode(batch.history), columns, batch) for batch in batches]
    return collect(found, item_table.device)


def rank_users(users: Tensor, columns: Tensor, batch: EvaluationBatch) -> Tensor:
    """Ranks [3, B] (sampled, full, full_all) of one batch; `collect` checks them.

    Nothing here waits for the device: where the user's vector is not finite the ranks are
    NO_VECTOR, where a score is not NO_SCORE.

    Args:
        users: user vectors [B, D].
        columns: the item table's transpose, float32 [D, N].
    """
    rows = users_per_tile(columns)
    tiles = []
    for i in range(0, len(users), rows):
        part = slice(i, i + rows)
        scores = users[part].float() @ columns  # [b, N]
        tiles.append(
            rank_tile(scores, batch.target[part], batch.seen[part], batch.candidates[part])
        )
    vector = torch.isfinite(users).all(1)
    return torch.cat(tiles, dim=1).masked_fill(~vector, NO_VECTOR)


def users_per_tile(columns: Tensor) -> int:
    """How many users' scores against an item table's transpose [D, N] are held at once."""
    tile = CPU_TILE if columns.device.type == "cpu" else TILE
    return max(FEWEST_USERS, tile // columns.shape[1])


def collect(found: list[Tensor], device: torch.device | str = "cpu") -> Ranks:
    """The ranks of all batches, each [3, B], as one.

    Several processes took every world-th batch each.

    Raises:
        RunError: a user's vector or a score is not finite.
    """
    if processes.world() > 1:
        sizes = processes.gather([part.shape[1] for part in found])
        order = [(i, r) for r, mine in enumerate(sizes) for i in range(len(mine))]
        whole = []
        for i, r in sorted(order):
            own = r == processes.rank()
            whole.append(
                found[i] if own else torch.zeros(3, sizes[r][i], dtype=torch.int64, device=device)
            )
        processes.sum_in_place(whole)
        found = whole
    ranks = torch.cat(found, dim=1).cpu().numpy()
    if (ranks == NO_VECTOR).any():
        user = int((ranks == NO_VECTOR).any(0).argmax())
        raise RunError(
            f"the vector of user {user} is NaN or infinite: the model holds non-finite values"
        )
    if (ranks == NO_SCORE).any():
        raise RunError(
            "a score is NaN or infinite: the model or the item table holds non-finite values"
        )
    return Ranks(*ranks)


def ranker(
    item_table: Tensor,
    splits: dict[str, Any],
    batch_size: int,
    device: torch.device,
    divided: bool = False,
) -> Callable[[Callable], Callable[..., Ranks]]:
    """Binds what every ranking of a run shares.

    Args:
        divided: the model is divided among the processes (see utils.sharding).
    Returns:
        A function of `encoder`, which gives the encode function of the model's present weights. It
        returns a function (split name, at most so many batches) -> Ranks.
    """

    def ranks_by(encoder: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[..., Ranks]:
        def ranks_of(split: str, limit: int | None = None) -> Ranks:
            share = (processes.rank(), processes.world())
            encode = encoder()
            batches = splits[split].batches(batch_size, device, limit, share)
            if divided:
                rounds = -(-splits[split].n_batches(batch_size, limit) // processes.world())
                spare = next(splits[split].batches(1, device, 1)).history
                batches = _in_step(batches, rounds, encode, spare)
            return evaluate(encode, item_table, batches)

        return ranks_of

    return ranks_by


def _in_step(
    batches: Iterable[EvaluationBatch], rounds: int, encode: Callable, spare: Tensor
) -> Iterator[EvaluationBatch]:
    """Yield the batches of this process, then encode `spare` until `rounds` forwards are done: a
    sharded model needs every process in every forward.
    """
    done = 0
    for batch in batches:
        yield batch
        done += 1
    for _ in range(done, rounds):
        encode(spare)


def rank_tile(scores: Tensor, target: Tensor, seen: Tensor, candidates: Tensor) -> Tensor:
    """Ranks [3, b] (sampled, full, full_all) from scores [b, N]; overwrites `scores`."""
    own = scores.gather(1, target[:, None])  # [b, 1]
    finite = torch.isfinite(scores.sum(1))  # a sum shows it 20 times sooner than all terms
    drawn = scores.gather(1, candidates.clamp(min=0))
    sampled = 1 + ((drawn >= own) & (candidates >= 0)).sum(1)
    # Ones and zeros as floats: their sum is many times faster than that of booleans, and exact
    # below 2^24 items. It counts the target itself once.
    ahead = torch.empty_like(scores)
    full_all = torch.ge(scores, own, out=ahead).sum(1)
    scores.scatter_(1, seen, -torch.inf).scatter_(1, target[:, None], own)
    full = torch.ge(scores, own, out=ahead).sum(1)
    ranks = torch.stack([sampled, full.long(), full_all.long()])
    return ranks.masked_fill(~finite, NO_SCORE)
