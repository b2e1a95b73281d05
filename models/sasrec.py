"""SASRec (Kang and McAuley, 2018) in the bottleneck form that the released SLMRec trains.

[B, L] history -> item embeddings -> causal transformer -> [B, L, D]; the last one is the user.

Legend: B batch, L item slots, N items (also the padding index), D item width, W block width.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import checkpoint
from engine.errors import UsageError
from engine.run import Run
from utils.flags import SASRecModel

Norm = Literal["query", "pre", "post"]
PARTS = 8  # of similar length, on CPU


class SASRec(nn.Module):
    """Item embedding -> narrow causal transformer -> item space; score = user vector . item
    embedding.

    Args:
        n_items: N; index N is the padding.
        max_seq_length: L.
        emb_dim: D.
        hid_dim: W. Where it equals emb_dim there are no projections.
        norm: `query` as released (only the query is normed, and the residual leaves from it), `pre`
            or `post`.
        init_std: standard deviation of item and position embeddings at the start; 1 as released.
    """

    def __init__(
        self,
        n_items: int,
        max_seq_length: int,
        *,
        emb_dim: int,
        hid_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout: float,
        norm: Norm,
        init_std: float,
    ) -> None:
        super().__init__()
        self.n_items, self.max_seq_length = n_items, max_seq_length
        self.item_embedding = nn.Embedding(n_items + 1, emb_dim, padding_idx=n_items)
        nn.init.normal_(self.item_embedding.weight, std=init_std)
        with torch.no_grad():
            self.item_embedding.weight[n_items].zero_()
        # Without a bottleneck it is SASRec as in its own paper: one space for items and users.
        plain = emb_dim == hid_dim
        self.to_hidden = nn.Identity() if plain else nn.Linear(emb_dim, hid_dim)
        self.positions = nn.Embedding(max_seq_length, hid_dim)
        nn.init.normal_(self.positions.weight, std=init_std)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            [Block(hid_dim, num_heads, dropout, norm) for _ in range(num_blocks)]
        )
        self.final_norm = nn.LayerNorm(hid_dim, eps=1e-8)
        self.to_item = nn.Identity() if plain else nn.Linear(hid_dim, emb_dim)

    @property
    def item_table(self) -> Tensor:
        """[N, D], row = catalogue index."""
        return self.item_embedding.weight[: self.n_items]

    def states(self, history: Tensor) -> Tensor:
        """Item-space state after every position of left-padded histories [B, L] -> [B, L, D];
        padding's is unspecified.

        On CPU users are processed in parts of similar length, so that little padding is computed.
        On a GPU the launches of several parts cost more than their padding.
        """
        device = self.item_embedding.weight.device
        if device.type != "cpu":
            return self.padded_states(history.to(device, non_blocking=True))
        length = (history != self.n_items).sum(1)
        order, parts = length.argsort(stable=True), []
        for rows in order.chunk(PARTS):
            longest = max(1, int(length[rows[-1]]))
            states = self.padded_states(history[rows, -longest:])
            parts.append(F.pad(states, (0, 0, history.shape[1] - longest, 0)))
        return torch.cat(parts)[order.argsort()]

    def padded_states(self, history: Tensor) -> Tensor:
        """As `states`, of all positions, padding too."""
        length = history.shape[1]
        real = history != self.n_items  # [B, L]
        x = self.to_hidden(self.item_embedding(history)) * math.sqrt(
            self.item_embedding.embedding_dim
        )
        x = self.dropout(x + self.positions.weight[-length:])
        causal = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        # Padding attends to itself: softmax over nothing is NaN.
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        mask = (causal & real[:, None, :]) | itself  # [B, L, L], True = may attend
        for block in self.blocks:
            x = block(x, mask[:, None])
        return self.to_item(self.final_norm(x))

    def forward(self, history: Tensor) -> Tensor:
        """User vectors [B, D]: the state of the last position."""
        return self.states(history)[:, -1]

    def user_encoder(self) -> Callable[[Tensor], Tensor]:
        """History [B, L] -> user vectors [B, D], in evaluation mode."""
        self.eval()
        return torch.no_grad()(self.forward)

    @torch.no_grad()
    def start(self, item_table: Tensor, init_std: float) -> None:
        """Start the item embeddings from a table [N, D], scaled to the mean length that drawn ones
        of `init_std` have.

        Raises:
            UsageError: the table has another width.
        """
        weight = self.item_embedding.weight
        if item_table.shape[1] != weight.shape[1]:
            raise UsageError(
                f"--init_table has vectors of {item_table.shape[1]} numbers, --emb_dim is"
                f" {weight.shape[1]}"
            )
        length = init_std * math.sqrt(weight.shape[1])
        scaled = item_table * (length / item_table.norm(dim=1).mean())
        weight[: self.n_items] = scaled.to(weight)

    def restore(self, run: Run) -> "SASRec":
        """Take the weights of a run's best checkpoint.

        Raises:
            UsageError: the checkpoint is missing or does not fit.
        """
        weights, _ = checkpoint.load(run.folder / "best")
        checkpoint.restore(self, weights, run.folder / "best")
        return self

    @staticmethod
    def shape(run: Run) -> dict[str, Any]:
        """The arguments of SASRec beside N and L, as a run's flags say."""
        return {field.name: run.flags[field.name] for field in SASRecModel.fields()}

    @classmethod
    def load(cls, run: Run) -> "SASRec":
        """The model of a run's best checkpoint.

        Raises:
            UsageError: the checkpoint is missing, damaged or of another model.
        """
        weights, _ = checkpoint.load(run.folder / "best")
        table = weights.get("item_embedding.weight")
        if table is None:
            raise UsageError(f"{run.folder}/best: no item_embedding.weight; not a SASRec run")
        n_items = len(table) - 1  # the last row is the padding
        model = cls(n_items, run.flags["max_seq_length"], **cls.shape(run))
        checkpoint.restore(model, weights, run.folder / "best")
        return model


class Block(nn.Module):
    """Causal self-attention and a two-layer ReLU network, each with a residual."""

    def __init__(self, width: int, num_heads: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.norm, self.num_heads, self.rate = norm, num_heads, dropout
        self.attention_norm = nn.LayerNorm(width, eps=1e-8)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.feed_norm = nn.LayerNorm(width, eps=1e-8)
        self.feed = nn.Sequential(
            nn.Linear(width, width),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.attention_norm(x + self.attend(x, x, mask))
            return self.feed_norm(x + self.feed(x))
        normed = self.attention_norm(x)
        if self.norm == "query":
            x = self.feed_norm(normed + self.attend(normed, x, mask))
            return x + self.feed(x)
        x = x + self.attend(normed, normed, mask)
        return x + self.feed(self.feed_norm(x))

    def attend(self, query: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Multi-head attention, [B, L, W] x [B, L, W] -> [B, L, W]; mask [B, 1, L, L]."""
        q, k, v = (
            layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, y in ((self.query, query), (self.key, source), (self.value, source))
        )
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).flatten(2))
