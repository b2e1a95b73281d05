"""Attention of packed users over [prompt | own tokens], exact. LEAVE ALONE.

A user's own tokens stand on a grid with those of users of similar length. On CPU arithmetic is
dear: all tokens attend to the same prompt, so that part is one dense product of all of them with
its keys. The two parts are joined by their shares of the softmax's mass, whose logarithms are the
levels (as flash attention joins its tiles; Dao et al., 2022). On a GPU launches are dear: the
prompt's keys stand before each user's own, and one call of the library does both.

Legend: S packed tokens of all users, P prompt tokens, h heads, d head width, g heads that share
keys, W widest user of a group; b, s: users and tokens of one group.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from models.catalogue import wide
from models.packed import UserGroup

# cuDNN's would be compiled for every new shape, seconds each; the flash kernel takes no mask
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KeyValue = tuple[Tensor, Tensor]  # keys (rotated) and values, each [P, h_kv, d] or [S, h_kv, d]


@functools.cache
def _compiled(step: Callable) -> Callable:
    return torch.compile(step, dynamic=True)


def compilable(step: Callable) -> Callable:
    """`step`, compiled by torch.compile where its layer's `compiled` is set and gradients are on.

    The rest of a layer is not: compiling it took minutes and gained nothing.
    """

    @functools.wraps(step)
    def call(layer: LlamaDecoderLayer, *inputs):
        fused = getattr(layer, "compiled", False) and torch.is_grad_enabled()
        return (_compiled(step) if fused else step)(layer, *inputs)

    return call


def attend_prompt(layer: LlamaDecoderLayer, query: Tensor, known: KeyValue) -> Tensor:
    """Causal self-attention of the prompt, [P, h, d] -> [P, h, d]."""
    given = query, *(_repeated(layer, t) for t in known)
    q, k, v = (t.transpose(0, 1)[None] for t in given)
    scale = layer.self_attn.scaling
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return mixed[0].transpose(0, 1)


def attend(
    layer: LlamaDecoderLayer, query: Tensor, own: KeyValue, known: KeyValue, groups: list[UserGroup]
) -> Tensor:
    """Causal attention of every own token, [S, h, d] -> [S, h, d].

    On CPU by the library's flash kernel, in float32 at least.

    Args:
        known: keys and values of the prompt.
    """
    if query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # its backward in bfloat16 takes twice as long
            key, value = (_repeated(layer, wide(t)) for t in own)
            given = wide(query), key, value, *map(wide, known), layer.self_attn.scaling, groups
            return _FlashJoined.apply(*given).to(query.dtype)
    return attend_on_grids(layer, query, own, known, groups)


def attend_on_grids(
    layer: LlamaDecoderLayer, query: Tensor, own: KeyValue, known: KeyValue, groups: list[UserGroup]
) -> Tensor:
    """`attend` by one call of the library for each grid, on any device."""
    mixed, heads = [], [tokens.shape[1] for tokens in (query, *own)]
    for group, (grid,) in _grids(groups, torch.cat([query, *own], dim=1)):
        asking, *grids = grid.split(heads, dim=1)
        mixed.append(_packed(_with_prompt(layer, asking, grids, known, group.seen), group))
    return torch.cat(mixed)


def attend_last(
    layer: LlamaDecoderLayer, query: Tensor, own: KeyValue, known: KeyValue, groups: list[UserGroup]
) -> Tensor:
    """Attention of each user's last token, [B, h, d] -> [B, h, d]."""
    if query.device.type != "cpu":
        return attend_last_on_grids(layer, query, own, known, groups)
    mixed, level = [], []
    asking = query[:, :, None].split([group.n_users for group in groups])  # each [b, h, 1, d]
    for part, (group, shared) in zip(asking, _grids(groups, *own)):
        for parts, grid in zip((mixed, level), _softmax(layer, part, *shared, group.absent)):
            parts.append(grid.squeeze(2))
    return _joined(layer, query, known, torch.cat(mixed), torch.cat(level))


def _with_prompt(
    layer: LlamaDecoderLayer, query: Tensor, own: list[Tensor], known: KeyValue, seen: Tensor
) -> Tensor:
    """Attention [b, h, n, d] over [prompt | own tokens] on a grid, `own` keys and values [b, h_kv,
    W, d], where `seen` [..., P + W] is True.
    """
    both = []
    for prompt, part in zip(known, own):
        prompt = prompt.to(part.dtype).transpose(0, 1).expand(len(part), -1, -1, -1)
        both.append(_repeated(layer, torch.cat([prompt, part], dim=2)))
    scale = layer.self_attn.scaling
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(query, *both, attn_mask=seen, scale=scale)


def attend_last_on_grids(
    layer: LlamaDecoderLayer, query: Tensor, own: KeyValue, known: KeyValue, groups: list[UserGroup]
) -> Tensor:
    """`attend_last` by one call of the library for each grid, on any device."""
    mixed = []
    asking = query[:, :, None].split([group.n_users for group in groups])
    for part, (group, grids) in zip(asking, _grids(groups, *own)):
        seen = F.pad(~group.absent, (len(known[0]), 0), value=True)
        mixed.append(_with_prompt(layer, part, grids, known, seen))
    return torch.cat(mixed).squeeze(2)


@compilable
def _joined(
    layer: LlamaDecoderLayer, query: Tensor, known: KeyValue, own: Tensor, own_level: Tensor
) -> Tensor:
    """Attention over [prompt | own tokens] from the own part: tokens [n, h, d] -> [n, h, d]."""
    key, value = (shared.to(query.dtype).transpose(0, 1) for shared in known)  # [h_kv, P, d]
    n, shared = len(query), query.shape[1] // len(key)
    parts = _softmax(layer, _by_keys(query, len(key)), key, value)
    mixed, level = (_by_tokens(t, n, shared) for t in parts)
    return (own + torch.sigmoid(level - own_level) * (mixed - own)).to(query.dtype)


def _by_keys(tokens: Tensor, n_keys: int) -> Tensor:
    """[S, h, d] -> [h_kv, S * g, d]: the queries that read the same keys together."""
    return tokens.unflatten(1, (n_keys, -1)).transpose(0, 1).flatten(1, 2)


def _by_tokens(by_keys: Tensor, n: int, shared: int) -> Tensor:
    """The inverse of `_by_keys`, [h_kv, n * g, ...] -> [n, h, ...]."""
    return by_keys.unflatten(1, (n, shared)).transpose(0, 1).flatten(1, 2)


def _repeated(layer: LlamaDecoderLayer, shared: Tensor) -> Tensor:
    """Keys or values, heads in dimension 1, once for each head that reads them."""
    n = layer.self_attn.num_key_value_groups
    return shared.repeat_interleave(n, dim=1) if n > 1 else shared


def _softmax(
    layer: LlamaDecoderLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    barred: Tensor | None = None,
) -> KeyValue:
    """Softmax attention [..., n, d] and the logarithm of its mass [..., n, 1], in float32 at least.

    Args:
        barred: True where a query must not attend.
    """
    if query.dim() == 4:
        key, value = (_repeated(layer, t) for t in (key, value))
    # scores rounded to half precision would shift the weights by percents
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = wide(query), wide(key), wide(value)
        scores = (query * layer.self_attn.scaling) @ key.transpose(-1, -2)
        if barred is not None:
            scores = scores.masked_fill(barred, -torch.inf)
        peak = scores.detach().amax(-1, keepdim=True)  # a constant: it cancels in the result
        weight = (scores - peak).exp()
        mass = weight.sum(-1, keepdim=True)
        return weight @ value / mass, peak + mass.log()


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _FlashJoined(torch.autograd.Function):
    """Both parts by the library's kernel. Its backward is given the joint output and the joint
    level: each part's weights are those of the whole softmax then, and so are its gradients.
    """

    @staticmethod
    def forward(ctx, query, key, value, prompt_key, prompt_value, scale: float, groups):
        n_keys, shape = prompt_key.shape[1], (len(query), query.shape[1] // prompt_key.shape[1])
        own, own_level = [], []
        for group, grids in _grids(groups, query, key, value):
            mixed, level = _flash(*grids, 0.0, True, scale=scale)
            own.append(_packed(mixed, group))
            own_level.append(_packed(level, group))
        own, own_level = torch.cat(own), torch.cat(own_level)  # [S, h, d], [S, h]
        known = (t.transpose(0, 1)[None] for t in (prompt_key, prompt_value))
        parts = _flash(_by_keys(query, n_keys)[None], *known, 0.0, False, scale=scale)
        mixed, level = (_by_tokens(part[0], *shape) for part in parts)
        joint = torch.lerp(own, mixed, torch.sigmoid(level - own_level)[..., None])
        joint_level = torch.logaddexp(level, own_level)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, joint, joint_level)
        ctx.scale, ctx.groups, ctx.shape = scale, groups, shape
        return joint

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor):
        query, key, value, prompt_key, prompt_value, joint, level = ctx.saved_tensors
        own_slopes = [], [], []
        tensors = slope, query, key, value, joint, level
        for group, grids in _grids(ctx.groups, *tensors):
            grids = [grid.contiguous() for grid in grids]
            absent = group.absent[:, 0]  # [b, 1, W]: a place without a token weighs nothing
            grids[0].masked_fill_(absent[..., None], 0.0)
            grids[5].masked_fill_(absent, torch.inf)
            found = _flash_backward(*grids, 0.0, True, scale=ctx.scale)
            for slopes, grid in zip(own_slopes, found):
                slopes.append(_packed(grid, group))
        own_slopes = [torch.cat(slopes) for slopes in own_slopes]
        by_keys = [_by_keys(t, prompt_key.shape[1])[None] for t in (slope, query, joint)]
        by_keys_level = _by_keys(level[..., None], prompt_key.shape[1])[None, ..., 0]
        known = [t.transpose(0, 1)[None] for t in (prompt_key, prompt_value)]
        given = *by_keys[:2], *known, by_keys[2], by_keys_level
        of_query, *of_prompt = _flash_backward(*given, 0.0, False, scale=ctx.scale)
        own_slopes[0] += _by_tokens(of_query[0], *ctx.shape)
        return *own_slopes, *(t[0].transpose(0, 1) for t in of_prompt), None, None


def _grids(groups: list[UserGroup], *tensors: Tensor) -> Iterator[tuple[UserGroup, list[Tensor]]]:
    """Each group, with its part of every tensor [S, h, ...] on its grid, [b, h, W, ...]."""
    sizes = [group.n_tokens for group in groups]
    for group, *parts in zip(groups, *(t.split(sizes) for t in tensors)):
        yield group, [group.on_grid(part).transpose(1, 2) for part in parts]


def _packed(grid: Tensor, group: UserGroup) -> Tensor:
    """[b, h, W, ...] -> the group's tokens [s, h, ...]."""
    return group.off_grid(grid.transpose(1, 2))
