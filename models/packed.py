"""A batch of histories without padding: which tokens are computed, and on which grids they attend.

Legend: B batch, L item slots, R response tokens, P prompt tokens, S packed tokens (items and
response of all users), W most tokens of a user in a group; b, s: B and S of one group.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

GROUPS = 4  # groups of users whose attention is computed together; the best of 1, 4, 8, 16 on CPU
SMALLEST_GROUP = 32
CPU = torch.device("cpu")
ALIGNED = 16  # bytes; where a tensor may begin in a buffer


class UserGroup(NamedTuple):
    """Neighbouring users whose attention to their own tokens is computed together on a padded grid.

    n_users, n_tokens: b and s.
    grid: [b * W], index into their packed tokens, left-aligned; arbitrary where there is no token.
    packed: [s], index of each of their tokens in the flattened grid.
    seen: [W, P + W], the prompt's and the grid's positions that a grid position attends to.
    absent: [b, 1, 1, W], the positions that a user's last token must not attend to.
    """

    n_users: int
    n_tokens: int
    grid: Tensor
    packed: Tensor
    seen: Tensor
    absent: Tensor

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Their packed tokens [s, ...] -> [b, W, ...]; index_select has the faster backward."""
        return tokens.index_select(0, self.grid).unflatten(0, (self.n_users, -1))

    def off_grid(self, grid: Tensor) -> Tensor:
        """The inverse of `on_grid`, [b, W, ...] -> [s, ...]."""
        return grid.flatten(0, 1).index_select(0, self.packed)


class Packed(NamedTuple):
    """A batch of histories without padding, users sorted by length, and where their tokens stand.

    Everything that depends on the data is worked out here, on the CPU. The forward only indexes: it
    never waits for the device, and can be captured.

    items: [sum of lengths], catalogue indices, user after user.
    back: [B], where each user of the batch stands in the sorted one.
    items_back: [sum of lengths], where each item of the batch, row after row, stands in `items`.
    length: T of the padded layout, P + L + R.
    source: [S], index into [item vectors | response vectors].
    position: [S], position in the padded layout, counted from the prompt's start.
    last: [B], packed index of each user's last token.
    groups: users in order, a few at a time, so that a batch sorted by length pads little.
    """

    items: Tensor
    back: Tensor
    items_back: Tensor
    length: int
    source: Tensor
    position: Tensor
    last: Tensor
    groups: list[UserGroup]

    @classmethod
    def of(
        cls,
        history: Tensor,
        n_items: int,
        n_prompt: int = 0,
        n_response: int = 0,
        device: torch.device = CPU,
    ) -> "Packed":
        """From left-padded catalogue indices [B, L]; n_items is the padding.

        A GPU waits for launches, not for arithmetic: all users are one group there.
        """
        history = history.cpu()
        real = history != n_items
        order = real.sum(1).argsort(stable=True)  # neighbours of similar length pad little
        number = (real.flatten().cumsum(0) - 1).view_as(real)
        history, real, number = history[order], real[order], number[order]
        batch, slots = real.shape
        tail = torch.ones(batch, n_response, dtype=torch.bool)
        token = torch.cat([real, tail], dim=1)  # [B, L + R]
        width = token.sum(1)
        widths = width.tolist()
        n_real = sum(widths) - batch * n_response
        place = (real.flatten().cumsum(0) - 1).view_as(real)
        response = (n_real + torch.arange(n_response)).expand(batch, -1)
        slot = torch.arange(slots + n_response).expand(batch, -1)
        groups = []
        n_groups = GROUPS if device.type == "cpu" else 1
        for part in width.split(max(SMALLEST_GROUP, -(-batch // n_groups))):
            groups.append(_group(part, widths[: len(part)], n_prompt))
            widths = widths[len(part) :]
        packed = cls(
            items=history[real],
            back=order.argsort(),
            items_back=number[real].argsort(),
            length=n_prompt + slots + n_response,
            source=torch.cat([place, response], dim=1)[token],
            position=n_prompt + slot[token],
            last=width.cumsum(0) - 1,
            groups=groups,
        )
        return packed if device.type == "cpu" else in_one_copy(packed, device)


def in_one_copy(value: Any, device: torch.device) -> Any:
    """The tensors in nested tuples and lists on another device. They go there as one buffer, which
    is pinned for a GPU, so that the CPU does not wait.
    """
    tensors = [part for part in tree_leaves(value) if isinstance(part, Tensor)]
    sizes = [-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors]
    pins = torch.accelerator.is_available() and device.type != "cpu"
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pins)
    for part, tensor in zip(buffer.split(sizes), tensors):
        part[: tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    moved = []
    for part, tensor in zip(buffer.to(device, non_blocking=True).split(sizes), tensors):
        moved.append(part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
    left = iter(moved)
    return tree_map_only(Tensor, lambda _: next(left), value)


def _group(width: Tensor, widths: list[int], n_prompt: int) -> UserGroup:
    """The group of users with these numbers of tokens, as a tensor and as Python numbers."""
    column = torch.arange(max(widths))
    first = width.cumsum(0) - width
    grid = (first[:, None] + column).clamp(max=sum(widths) - 1).flatten()
    inside = column < width[:, None]  # [b, W]
    packed = inside.flatten().nonzero().squeeze(1)
    seen = inside.new_ones(len(column), n_prompt + len(column)).tril(n_prompt)
    return UserGroup(len(widths), sum(widths), grid, packed, seen, ~inside[:, None, None])
