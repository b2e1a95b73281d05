"""Top-k lists for bare histories, from any model that gives user vectors.

Legend: B batch, L item slots, N items (also the padding index), D item width, k list length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.sequences import some_histories
from models.sasrec import SASRec
from serving.served import Served
from utils.evaluation import score_spreads, users_per_tile


@dataclass(frozen=True)
class Recommender:
    """A model in evaluation mode, and what it recommends from.

    encode: histories int64 [B, L], padded with N on the left -> user vectors [B, D].
    item_table: [N, D]; a score is the product of a user vector and a row.
    popularity: float [N], the scores where there is no history.
    max_seq_length: L, how many of the last items are read.
    """

    encode: Callable[[Tensor], Tensor]
    item_table: Tensor
    popularity: Tensor
    max_seq_length: int

    def user_encoder(self) -> Callable[[Tensor], Tensor]:
        return self.encode

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int,
        exclude: Literal["seen", "none"] = "seen",
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best items of each history, the best first; equal scores in item order.

        Args:
            histories: catalogue indices (0 .. N-1) in time order, of any length. Without any item
                the list is by popularity.
            exclude: `seen` leaves out every item of the history, `none` nothing.
            allowed: bool [N], the items that may be recommended; all by default.
        Returns:
            items int64 [n, k] and scores float32 [n, k]; -1 and -inf where no item is left.
        """
        found = [(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))]
        if not len(histories):
            return found[0]
        vectors = self.encode(self._padded(histories)).float()
        columns = self.item_table.float().T
        rows = users_per_tile(columns)
        for start in range(0, len(histories), rows):
            part = histories[start : start + rows]
            score = vectors[start : start + rows] @ columns  # [b, N]
            empty = [i for i, history in enumerate(part) if not len(history)]
            score[empty] = self.popularity.to(score)
            if allowed is not None:
                score[:, ~allowed] = -torch.inf
            if exclude == "seen":
                owner = [i for i, history in enumerate(part) for _ in history]
                seen = [item for history in part for item in history]
                score[owner, seen] = -torch.inf
            found.append([part.cpu() for part in top_k(score, k)])
        return tuple(map(torch.cat, zip(*found)))

    @torch.no_grad()
    def similar(self, item: int, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k items nearest to an item: by the cosine of item vectors without their mean, which
        holds what all items share, popularity above all.

        Returns:
            items int64 [1, k] and cosines float32 [1, k]; -1 and -inf where no item is left.
        """
        vectors = self.item_table.float()
        vectors = F.normalize(vectors - vectors.mean(0), dim=1)
        cosine = (vectors[item] @ vectors.T)[None]
        cosine[0, item] = -torch.inf
        if allowed is not None:
            cosine[:, ~allowed] = -torch.inf
        return tuple(found.cpu() for found in top_k(cosine, k))

    def _padded(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """The last L items of each, int64 [n, L]; an empty one reads item 0 and is not used."""
        padded = torch.full((len(histories), self.max_seq_length), len(self.item_table))
        for row, history in zip(padded, histories):
            last = torch.as_tensor(history[-self.max_seq_length :], dtype=torch.int64)
            row[len(row) - max(1, len(last)) :] = last if len(last) else 0
        return padded


def summed(models: Sequence[Recommender], scales: Sequence[float]) -> Recommender:
    """The sum of several models' scores, each over its scale: vectors one after another, items too.

    Args:
        models: over the same items.
        scales: the standard deviation of each model's scores (utils.evaluation.score_spreads); a
            sum of raw scores follows the louder model.
    """

    def encode(history: Tensor) -> Tensor:
        parts = [model.encode(history[:, -model.max_seq_length :]).float() for model in models]
        return torch.cat(parts, dim=1)

    tables = [model.item_table.float() / scale for model, scale in zip(models, scales)]
    table = torch.cat(tables, dim=1)
    longest = max(model.max_seq_length for model in models)
    return Recommender(encode, table, models[0].popularity, longest)


def open_runs(runs: Sequence[Served], item_ids: np.ndarray, device: torch.device) -> Recommender:
    """The recommender of one finished run, or of the sum of several runs' scores.

    Args:
        item_ids: what to recommend from, ascending.
    Raises:
        UsageError: a checkpoint is missing.
    """
    models = []
    for served in runs:
        table, slots = served.item_table(item_ids), served.run.flags["max_seq_length"]
        if table is None:
            model = SASRec.load(served.run)
        else:
            from models.llm4rec import LLM4Rec  # transformers takes longer than a list of SASRec's

            model = LLM4Rec.load(served.run, table.to(device), served.run.bf16)
        model, counts = model.to(device), served.popularity(item_ids)
        models.append(Recommender(model.user_encoder(), model.item_table, counts, slots))
    if not models[1:]:
        return models[0]
    data = runs[0].inputs.data
    place = np.append(np.searchsorted(item_ids, data.item_ids), len(item_ids))  # the padding's too
    histories = torch.from_numpy(place)[some_histories(data, models)]
    return summed(models, score_spreads(models, histories))


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores [B, N], equal ones in column order; -1 for -inf.

    Returns:
        columns int64 [B, k] and values [B, k].
    """
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # topk takes equal values in any order, and of those that equal the last one it takes any
    for row in (values.diff(dim=1) == 0).any(1).nonzero().flatten().tolist():
        columns[row] = scores[row].sort(descending=True, stable=True).indices[: values.shape[1]]
    values, columns = values[:, :k], columns[:, :k]
    columns = columns.masked_fill(values == -torch.inf, -1)
    missing = 0, k - values.shape[1]
    return F.pad(columns, missing, value=-1), F.pad(values, missing, value=-torch.inf)
