"""A pruned LLaMA decoder that reads [prompt | items | response] and returns last-token states, without the waste.

The result equals the plain Hugging Face forward over [prompt | left-padded items | response] (benchmarks/plain.py,
tests/test_parity.py) because only work whose result is not used, or is the same for every user, is left out:

* the prompt is the same for all and attention is causal, so its keys and values are computed once a step (with
  gradient) or, in inference, once for good;
* padded item slots are not computed: the linear layers see only real tokens, packed one after another, and positions
  stay those of the padded layout;
* in the last layer only the last token needs a query, an output projection and an MLP.

With LoRA dropout > 0 the prompt's dropout mask is therefore shared by the batch; the expectation is unchanged.

Legend: B batch, L item slots, R response tokens, P prompt tokens, S packed suffix tokens (items and response of all
users), T all tokens computed (P + S, or S where the prompt is known), W widest suffix of a group, H width, h heads, d head
width, E blocks; b, s: B and S of one group.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, apply_rotary_pos_emb

from models.losses import wide

GROUPS, SMALLEST_GROUP = 4, 32  # attention in about four groups of users; measured best on CPU among 1, 4, 8, 16
KeyValue = tuple[Tensor, Tensor]  # keys (rotated) and values of the prompt in one layer, each [P, h_kv, d]


class Group(NamedTuple):
    """Neighbouring users whose attention to their own tokens is computed together on a padded grid.

    n_users, n_tokens: b and s; grid [b * W]: index into their packed tokens, left-aligned, arbitrary where there is no
    token; packed [s]: index of each of their tokens in the flattened grid; later [W, W] and absent [b, 1, 1, W]: what a
    grid position, and a user's last token, must not look at.
    """

    n_users: int
    n_tokens: int
    grid: Tensor
    packed: Tensor
    later: Tensor
    absent: Tensor


class Layout(NamedTuple):
    """Where the packed suffix tokens stand; made once per batch.

    source [S]: index into [item vectors | response vectors]; position [S]: in the padded layout, counted from the
    prompt's start; last [B]: packed index of each user's last token; groups: users in order, a few at a time, so that
    a batch sorted by length pads little.
    """

    source: Tensor
    position: Tensor
    last: Tensor
    groups: list[Group]

    @classmethod
    def of(cls, real: Tensor, n_prompt: int, n_response: int) -> "Layout":
        """From real [B, L] (True = an item), left-padded."""
        batch, slots = real.shape
        device = real.device
        tail = torch.ones(batch, n_response, dtype=torch.bool, device=device)
        token = torch.cat([real, tail], dim=1)  # [B, L + R]
        width = token.sum(1)
        last = width.cumsum(0) - 1
        widths = width.tolist()  # the one wait for the device
        n_items = sum(widths) - batch * n_response
        items = (real.flatten().cumsum(0) - 1).view_as(real)
        response = (n_items + torch.arange(n_response, device=device)).expand(batch, -1)
        source = torch.cat([items, response], dim=1)[token]
        position = n_prompt + torch.arange(slots + n_response, device=device).expand(batch, -1)[token]
        groups = []
        for part in width.split(max(SMALLEST_GROUP, -(-batch // GROUPS))):
            n_users, mine = len(part), widths[: len(part)]
            widths = widths[len(part) :]
            column = torch.arange(max(mine), device=device)
            first = part.cumsum(0) - part
            grid = (first[:, None] + column).clamp(max=sum(mine) - 1).flatten()
            inside = column < part[:, None]  # [b, W]
            later = inside.new_ones(len(column), len(column)).triu(1)
            groups.append(Group(n_users, sum(mine), grid, inside.flatten().nonzero().squeeze(1), later, ~inside[:, None, None]))
        return cls(source, position, last, groups)


class Decoder(nn.Module):
    """The kept layers of a LLaMA and the token ids of its prompt.

    Args:
        llama: embeddings, kept layers and final norm.
        prompt_ids, response_ids: what stands before and after the items, at least one token each.
        n_blocks: E, must divide the number of layers; states are returned at the end of every block.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        llama: LlamaModel,
        prompt_ids: list[int],
        response_ids: list[int],
        n_blocks: int,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.llama = llama
        self.n_layers, self.n_blocks = len(llama.layers), n_blocks
        if self.n_layers % n_blocks:
            raise ValueError(f"{n_blocks} blocks do not divide {self.n_layers} layers")
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids), persistent=False)
        self.register_buffer("response_ids", torch.tensor(response_ids), persistent=False)

    def forward(self, items: Tensor, real: Tensor, prompt: list[KeyValue] | None = None) -> Tensor:
        """Last-token states at the E block ends, [B, E, H]: inner ones raw, the last one after the final norm.

        Args:
            items: vectors of the real items, user after user, [sum of lengths, H].
            real: bool [B, L], where they stand in the left-padded layout.
            prompt: what `prompt_states` returned, to skip the prompt's own computation (inference).
        """
        n_prompt, n_response = len(self.prompt_ids), len(self.response_ids)
        layout = Layout.of(real, n_prompt, n_response)
        response = self.llama.embed_tokens(self.response_ids)
        x = torch.cat([items, response.to(items.dtype)]).index_select(0, layout.source)  # [S, H]
        position = layout.position
        if prompt is None:  # the prompt's tokens go first in the same packed product
            x = torch.cat([self.llama.embed_tokens(self.prompt_ids).to(x.dtype), x])
            position = torch.cat([torch.arange(n_prompt, device=x.device), position])
        rotation = self._rotation(x, n_prompt + real.shape[1] + n_response, position)
        states = []
        for i, layer in enumerate(self.llama.layers):
            known = None if prompt is None else prompt[i]
            if i + 1 == self.n_layers:
                states.append(self.llama.norm(self._run(_last_layer, layer, x, rotation, layout, known)))
            else:
                x = self._run(_inner_layer, layer, x, rotation, layout, known)
                if (i + 1) % (self.n_layers // self.n_blocks) == 0:
                    states.append(x.index_select(0, layout.last + (0 if known is not None else n_prompt)))
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def prompt_states(self) -> list[KeyValue]:
        """Keys and values of the prompt in every layer, for inference with the present weights."""
        x = self.llama.embed_tokens(self.prompt_ids)
        rotation = self._rotation(x, len(x), torch.arange(len(x), device=x.device))
        states = []
        for i, layer in enumerate(self.llama.layers):
            query, key, value = _project(layer, layer.input_layernorm(x), rotation)
            states.append((key, value))
            if i + 1 < self.n_layers:
                x = _feed(layer, x, _attend_prompt(layer, query, key, value))
        return states

    def _rotation(self, x: Tensor, length: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of the packed tokens, each [T, d]; computed for the padded length, as the plain form."""
        every = torch.arange(length, device=x.device)[None]
        cos, sin = self.llama.rotary_emb(x, position_ids=every)
        return cos[0, position], sin[0, position]

    def _run(self, step: Callable, layer: LlamaDecoderLayer, *inputs) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(step, layer, *inputs, use_reentrant=False)
        return step(layer, *inputs)


def _inner_layer(layer: LlamaDecoderLayer, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout, known: KeyValue | None) -> Tensor:
    """One layer over all packed tokens [T, H] -> [T, H]; T = P + S, or S where the prompt is known."""
    n_prompt = len(x) - len(layout.source)
    own_sizes = [group.n_tokens for group in layout.groups]
    # split, not slices: the gradient of a slice is a tensor of zeros around it, that of a split one cat
    (prompt_query, *query), (prompt_key, *key), (prompt_value, *value) = (
        t.split([n_prompt, *own_sizes]) for t in _project(layer, layer.input_layernorm(x), rotation)
    )
    mixed, own, level = [], [], []
    if known is None:
        known = prompt_key, prompt_value
        mixed.append(_attend_prompt(layer, prompt_query, *known))
    for group, *tokens in zip(layout.groups, query, key, value):
        grids = _attend(layer, *(_gridded(t, group) for t in tokens), group.later)
        for parts, grid in zip((own, level), grids):  # [b, h, W, d] and [b, h, W, 1] -> [s, h, d] and [s, h, 1]
            parts.append(grid.transpose(1, 2).flatten(0, 1).index_select(0, group.packed))
    mixed.append(_joined(layer, torch.cat(query), known, torch.cat(own), torch.cat(level)))
    return _feed(layer, x, torch.cat(mixed).flatten(1))


def _last_layer(layer: LlamaDecoderLayer, x: Tensor, rotation: tuple[Tensor, Tensor], layout: Layout, known: KeyValue | None) -> Tensor:
    """The last layer for the last token alone: packed [T, H] -> [B, H]; keys and values still come from all tokens."""
    normed = layer.input_layernorm(x)
    n_prompt = len(x) - len(layout.source)
    last = layout.last + n_prompt
    (prompt_key, *key), (prompt_value, *value) = (
        t.split([n_prompt, *(group.n_tokens for group in layout.groups)]) for t in _keys_values(layer, normed, rotation)
    )
    query = _heads(layer, layer.self_attn.q_proj(normed.index_select(0, last)))
    query = _rotated(query, (rotation[0][last], rotation[1][last]))  # [B, h, d]
    if known is None:
        known = prompt_key, prompt_value
    own, level = [], []
    for group, queries, *tokens in zip(layout.groups, query.split([group.n_users for group in layout.groups]), key, value):
        grids = _attend(layer, queries[:, :, None], *(_gridded(t, group) for t in tokens), group.absent)
        for parts, grid in zip((own, level), grids):
            parts.append(grid.squeeze(2))  # [b, h, 1, d] -> [b, h, d]
    return _feed(layer, x.index_select(0, last), _joined(layer, query, known, torch.cat(own), torch.cat(level)).flatten(1))


def _heads(layer: LlamaDecoderLayer, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, layer.self_attn.head_dim))  # [T, h, d]


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [T, h, d] turned by their positions; the library's function takes both at once."""
    return apply_rotary_pos_emb(x, x[:, :0], *rotation)[0]


def _keys_values(layer: LlamaDecoderLayer, normed: Tensor, rotation: tuple[Tensor, Tensor]) -> KeyValue:
    key = _rotated(_heads(layer, layer.self_attn.k_proj(normed)), rotation)
    return key, _heads(layer, layer.self_attn.v_proj(normed))


def _project(layer: LlamaDecoderLayer, normed: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query = _rotated(_heads(layer, layer.self_attn.q_proj(normed)), rotation)
    return query, *_keys_values(layer, normed, rotation)


def _attend_prompt(layer: LlamaDecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal self-attention of the prompt, [P, h, d] -> [P, h, d]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    k, v = (t.repeat_interleave(layer.self_attn.num_key_value_groups, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.self_attn.scaling)[0].transpose(0, 1)


def _joined(layer: LlamaDecoderLayer, query: Tensor, known: KeyValue, own: Tensor, own_level: Tensor) -> Tensor:
    """Attention over [prompt | own tokens] from its two parts: tokens [n, h, d] -> [n, h, d].

    All tokens look at the same prompt, so that part is one dense product of all of them with its keys; each part is
    weighted by its share of the softmax's mass, whose logarithms are the levels (as flash attention joins its tiles).
    """
    key, value = (shared.to(query.dtype).transpose(0, 1) for shared in known)  # [h_kv, P, d]
    grouped = query.unflatten(1, (len(key), -1)).transpose(0, 1)  # [h_kv, n, h / h_kv, d]
    mixed, level = _attend(layer, grouped.flatten(1, 2), key, value)
    mixed, level = (t.unflatten(1, grouped.shape[1:3]).transpose(0, 1).flatten(1, 2) for t in (mixed, level))  # [n, h, d], [n, h, 1]
    return (own + torch.sigmoid(level - own_level) * (mixed - own)).to(query.dtype)


def _gridded(own: Tensor, group: Group) -> Tensor:
    """Packed [s, h, d] -> padded [b, h, W, d]. index_select: its backward is faster than indexing's."""
    return own.index_select(0, group.grid).view(len(group.absent), -1, *own.shape[1:]).transpose(1, 2)


def _attend(layer: LlamaDecoderLayer, query: Tensor, key: Tensor, value: Tensor, barred: Tensor | None = None) -> KeyValue:
    """Softmax attention [..., n, d] and the logarithm of its mass [..., n, 1], in float32 at least; where `barred`, no look."""
    if query.dim() == 4 and (shared := layer.self_attn.num_key_value_groups) > 1:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    with torch.autocast(query.device.type, enabled=False):  # scores rounded to half precision would shift the weights by percents
        query, key, value = wide(query), wide(key), wide(value)
        scores = (query * layer.self_attn.scaling) @ key.transpose(-1, -2)
        if barred is not None:
            scores = scores.masked_fill(barred, -torch.inf)
        peak = scores.detach().amax(-1, keepdim=True)  # a constant: it leaves the result, and so the gradient
        weight = (scores - peak).exp()
        mass = weight.sum(-1, keepdim=True)
        return weight @ value / mass, peak + mass.log()


def _feed(layer: LlamaDecoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """Output projection of the mixed values [T, h * d], residual, MLP, residual."""
    x = x + layer.self_attn.o_proj(mixed.flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))
