"""SASRec (Kang and McAuley, 2018) in the bottleneck form that the released SLMRec trains, or with
the blocks of BSARec (Shin et al., 2024, arXiv 2312.10325).

[B, L] history -> item embeddings -> causal transformer -> [S, D]; a row's last one is the user.

Legend: B batch, L item slots, N items (also the padding index), S items of all histories, D item
width, W block width, h heads, d head width.
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
from models.packed import Packed, UserGroup
from utils.flags import SASRecModel

Norm = Literal["query", "pre", "post"]


class SASRec(nn.Module):
    """Item embedding -> narrow causal transformer -> item space; score = user . item embedding.

    Args:
        n_items: N; index N is the padding.
        max_seq_length: L.
        emb_dim: D.
        hid_dim: W. Where it equals emb_dim there are no projections.
        norm: `query` as released (only the query is normed, and the residual leaves from it), `pre`
            or `post`.
        init_std: standard deviation of item and position embeddings at the start; 1 as released.
        alpha: above 0 the blocks, norms and draws are BSARec's, and this is the share of its
            frequency layer beside attention. It sees a user's later items, so with it only the last
            state of a history may be trained.
        low_frequencies: how many of the lowest frequencies it keeps as they are.
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
        alpha: float = 0.0,
        low_frequencies: int = 3,
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
        shape, layer_norm = (hid_dim, num_heads, dropout), nn.LayerNorm(hid_dim, eps=1e-8)
        if alpha:  # BSARec norms what its blocks read, and not again what they give
            filters = alpha, max_seq_length, low_frequencies
            blocks = [BSARecBlock(*shape, *filters) for _ in range(num_blocks)]
            first_norm, final_norm, self.scale = layer_norm, nn.Identity(), 1.0
        else:
            blocks = [Block(*shape, norm) for _ in range(num_blocks)]
            first_norm, final_norm, self.scale = nn.Identity(), layer_norm, math.sqrt(emb_dim)
        self.blocks = nn.ModuleList(blocks)
        self.first_norm, self.final_norm = first_norm, final_norm
        self.to_item = nn.Identity() if plain else nn.Linear(hid_dim, emb_dim)

    @property
    def item_table(self) -> Tensor:
        """[N, D], row = catalogue index."""
        return self.item_embedding.weight[: self.n_items]

    def states(self, history: Tensor) -> Tensor:
        """Item-space state after every item of left-padded histories [B, L]: [S, D], row after row.

        Padding is not computed: items are packed one after another, and read with one gather.
        """
        packed, x = self._packed_states(history)
        return self.to_item(self.final_norm(x)).index_select(0, packed.items_back)

    def forward(self, history: Tensor) -> Tensor:
        """User vectors [B, D]: the state of the last position."""
        packed, x = self._packed_states(history)
        x = x.index_select(0, packed.last)
        return self.to_item(self.final_norm(x)).index_select(0, packed.back)

    def _packed_states(self, history: Tensor) -> tuple[Packed, Tensor]:
        """The packed batch, and states of the blocks at every packed item, [S, W]."""
        packed = Packed.of(history, self.n_items, device=self.item_embedding.weight.device)
        tokens = PackedTokens(packed.groups)
        x = self._embedded(packed.items, packed.position, history.shape[1])
        for block in self.blocks:
            x = block(x, tokens)
        return packed, x

    def padded_states(self, history: Tensor) -> Tensor:
        """As `states`, [B, L, D], with the padding: the plain form, and the ONNX graph's."""
        length, tokens = history.shape[1], PaddedTokens(history != self.n_items)
        x = self._embedded(history, torch.arange(length, device=history.device), length)
        for block in self.blocks:
            x = block(x, tokens)
        return self.to_item(self.final_norm(x))

    def _embedded(self, items: Tensor, position: Tensor, slots: int) -> Tensor:
        """Items [...] at their positions among the last `slots`, [..., W]."""
        x = self.to_hidden(self.item_embedding(items)) * self.scale
        return self.dropout(self.first_norm(x + self.positions.weight[-slots:][position]))

    def user_encoder(self) -> Callable[[Tensor], Tensor]:
        """History [B, L] -> user vectors [B, D], in evaluation mode."""
        self.eval()
        return torch.no_grad()(self.forward)

    @torch.no_grad()
    def start(self, item_table: Tensor, init_std: float) -> None:
        """Start the items from a table [N, D], scaled to the mean length of drawn ones. Raises
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
        """Take the weights of a run's best checkpoint. Raises UsageError: the checkpoint is missing
        or does not fit.
        """
        weights, _ = checkpoint.load(run.folder / "best")
        checkpoint.restore(self, weights, run.folder / "best")
        return self

    def start_from(self, run: Run) -> None:
        """Take the weights of the run of --init_from. Raises UsageError: it is another model."""
        own, where = self.shape(run), f"--init_from={run.source.folder}: its model has"
        names = [name for name in own if name not in ("dropout", "init_std")]
        checkpoint.refuse_other(own, self.shape(run.source), names, where, "this one")
        length = ["max_seq_length"]
        checkpoint.refuse_other(run.flags, run.source.flags, length, where, "this one")
        self.restore(run.source)

    @staticmethod
    def shape(run: Run) -> dict[str, Any]:
        """The arguments of SASRec beside N and L, as a run's flags say."""
        known = SASRecModel().values()  # a run may be older than a flag
        return {name: run.flags.get(name, default) for name, default in known.items()}

    @classmethod
    def load(cls, run: Run) -> "SASRec":
        """The model of a run's best checkpoint. Raises UsageError: the checkpoint is missing,
        damaged or of another model.
        """
        weights, _ = checkpoint.load(run.folder / "best")
        table = weights.get("item_embedding.weight")
        if table is None:
            raise UsageError(f"{run.folder}/best: no item_embedding.weight; not a SASRec run")
        n_items = len(table) - 1  # the last row is the padding
        model = cls(n_items, run.flags["max_seq_length"], **cls.shape(run))
        checkpoint.restore(model, weights, run.folder / "best")
        return model


class PackedTokens:
    """Users' tokens [S, ...] one after another; they mix on grids of users of similar length."""

    def __init__(self, groups: list[UserGroup]) -> None:
        self.groups, self.sizes = groups, [group.n_tokens for group in groups]

    def attend(self, heads: Tensor, rate: float) -> Tensor:
        """Causal attention of queries, keys and values, [S, 3, h, d] -> [S, h, d]."""
        parts = []
        for group, own in zip(self.groups, heads.split(self.sizes)):
            q, k, v = group.on_grid(own).permute(2, 0, 3, 1, 4)  # each [b, h, width, d]
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
            parts.append(group.off_grid(mixed.transpose(1, 2)))
        return torch.cat(parts)

    def filtered(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Each user's tokens, and zeros where there are none, by `kernel` [L, L]; [S, W]."""
        parts = []
        for group, own in zip(self.groups, x.split(self.sizes)):
            grid = group.on_grid(own).masked_fill(group.absent[:, 0, 0, :, None], 0.0)
            width = grid.shape[1]
            parts.append(group.off_grid(kernel[:width, :width] @ grid))
        return torch.cat(parts)


class PaddedTokens:
    """Users' tokens [B, L, ...] with the padding before them: the plain form of PackedTokens."""

    def __init__(self, real: Tensor) -> None:
        self.real, length = real, real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        # Padding attends to itself: softmax over nothing is NaN.
        itself = torch.eye(length, dtype=torch.bool, device=real.device)
        self.mask = ((causal & real[:, None, :]) | itself)[:, None]  # [B, 1, L, L], may attend

    def attend(self, heads: Tensor, rate: float) -> Tensor:
        """[B, L, 3, h, d] -> [B, L, h, d]."""
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=rate)
        return mixed.transpose(1, 2)

    def filtered(self, x: Tensor, kernel: Tensor) -> Tensor:
        """[B, L, W] -> [B, L, W]; the kernel is circular, so the place of the tokens is free."""
        length = x.shape[1]
        return kernel[:length, :length] @ x.masked_fill(~self.real[..., None], 0.0)


Tokens = PackedTokens | PaddedTokens


class Frequencies(nn.Module):
    """The lowest frequencies of a user's states as they are, the others by a learnt factor.

    The discrete Fourier transform of the L slots, those without an item zero. Setting its higher
    terms to zero and transforming back is one product with a circular [L, L] matrix.
    """

    def __init__(self, width: int, slots: int, n_low: int) -> None:
        super().__init__()
        kept = (torch.arange(slots // 2 + 1) < n_low).double()
        slot, response = torch.arange(slots), torch.fft.irfft(kept, n=slots)
        kernel = response[(slot[:, None] - slot) % slots]
        self.register_buffer("kernel", kernel, persistent=False)
        self.root = nn.Parameter(torch.randn(width))  # of the factor, as in the authors' code

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        low = tokens.filtered(x, self.kernel.to(x.dtype))
        return low + self.root**2 * (x - low)


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

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        if self.norm == "post":
            x = self.attention_norm(x + self.attend(x, x, tokens))
            return self.feed_norm(x + self.feed(x))
        normed = self.attention_norm(x)
        if self.norm == "query":
            x = self.feed_norm(normed + self.attend(normed, x, tokens))
            return x + self.feed(x)
        x = x + self.attend(normed, normed, tokens)
        return x + self.feed(self.feed_norm(x))

    def attend(self, query: Tensor, source: Tensor, tokens: Tokens) -> Tensor:
        """Multi-head attention, [..., W] x [..., W] -> [..., W]."""
        weight = torch.cat([self.key.weight, self.value.weight])
        key_value = F.linear(source, weight, torch.cat([self.key.bias, self.value.bias]))
        heads = torch.cat([self.query(query), key_value], dim=-1)
        heads = heads.unflatten(-1, (3, self.num_heads, -1))
        return self.out(tokens.attend(heads, self.rate if self.training else 0.0).flatten(-2))


class BSARecBlock(Block):
    """The frequency layer beside attention, each with a residual and a norm of its own; a GELU
    network four times as wide. Drawn from a normal distribution, as in the authors' code.
    """

    def __init__(
        self, width: int, num_heads: int, dropout: float, alpha: float, slots: int, n_low: int
    ) -> None:
        super().__init__(width, num_heads, dropout, "post")
        self.alpha, self.dropout = alpha, nn.Dropout(dropout)
        self.frequencies = Frequencies(width, slots, n_low)
        self.frequency_norm = nn.LayerNorm(width, eps=1e-8)
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed = nn.Sequential(wide, nn.GELU(), narrow, self.dropout)
        for linear in (self.query, self.key, self.value, self.out, wide, narrow):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        filtered = self.frequency_norm(x + self.dropout(self.frequencies(x, tokens)))
        attended = self.attention_norm(x + self.dropout(self.attend(x, x, tokens)))
        x = self.alpha * filtered + (1 - self.alpha) * attended
        return self.feed_norm(x + self.feed(x))
