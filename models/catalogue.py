"""Cross-entropy over the whole catalogue in tiles, without ever holding all logits: kernels and
gradients. LEAVE ALONE.

Legend: B rows (users), N items, D item width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

CPU_TILE, TILE = (256, 2048), (1024, 32768)  # rows x items of logits held at once: 2 and 128 MiB
CPU_WHOLE, WHOLE = 2**20, 2**26  # the same for tiles of whole rows ...
FEWEST_ROWS = 32  # ... which are worth it from so many rows on


def wide(x: Tensor) -> Tensor:
    """At least float32: neither losses nor softmaxes are taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@contextlib.contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Compute in float32, outside autocast. Where autocast was on, products of float32 matrices may
    round their factors to bfloat16 (CPU with units for it) or TF32 (CUDA); results are float32.
    """
    under_autocast = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False), _precision(under_autocast):
        yield


@contextlib.contextmanager
def _precision(medium: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if medium else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def catalogue_cross_entropy(users: Tensor, item_table: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of user vectors against the whole item table, a scalar.

    Equals `F.cross_entropy(users @ item_table.T, target)`, in float32 at least.

    Args:
        users: [B, D]. item_table: [N, D]. target: int64 [B].
    """
    with in_float32(users.device.type):
        users = wide(users)
        item_table = item_table.to(users.dtype)
        whole = CPU_WHOLE if users.device.type == "cpu" else WHOLE
        rows = whole // len(item_table)
        if item_table.requires_grad and torch.is_grad_enabled() and rows >= FEWEST_ROWS:
            return _MeanCrossEntropy.apply(users, item_table, target, rows)
        return _CrossEntropy.apply(users, item_table, target).mean()


def cross_entropy(users: Tensor, item_table: Tensor, target: Tensor | None) -> Tensor:
    """-log softmax(users @ item_table.T) at each row's target, [B].

    Without a target, the log-partition alone.
    """
    return _CrossEntropy.apply(users, item_table, target)


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy for a small trained table: tiles of whole rows, with gradients computed in
    the forward pass. Saves the second computation of the logits, and costs a copy of the table's
    gradient. Two tiles are reused: fresh ones cost as much as a product, in page faults.
    """

    @staticmethod
    def forward(ctx, users: Tensor, item_table: Tensor, target: Tensor, rows: int) -> Tensor:
        user_grad, table_grad = torch.empty_like(users), torch.zeros_like(item_table)
        total = users.new_zeros(())
        tiles = [users.new_empty(min(rows, len(users)), len(item_table)) for _ in range(2)]
        for i in range(0, len(users), rows):
            part, index = users[i : i + rows], target[i : i + rows, None]
            logits, slope = (tile[: len(part)] for tile in tiles)
            torch.mm(part, item_table.T, out=logits)
            torch.log_softmax(logits, 1, out=slope)
            total -= slope.gather(1, index).sum()
            slope.exp_().scatter_add_(1, index, slope.new_full(index.shape, -1.0))
            torch.mm(slope, item_table, out=user_grad[i : i + rows])
            table_grad.addmm_(slope.T, part)
        ctx.grads = user_grad, table_grad
        return total / len(users)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        each = upstream / len(ctx.grads[0])
        return *(grad * each for grad in ctx.grads), None, None


class _CrossEntropy(torch.autograd.Function):
    """-log softmax(users @ item_table.T) at each row's target, in tiles of rows x items.

    With a frozen table one pass suffices: the gradient to a user is the softmax's mean item vector,
    which a running maximum gathers as flash attention does (Dao et al., 2022, with the table as
    keys and values). With a trained table the backward pass computes the tiles again.
    """

    @staticmethod
    def forward(ctx, users: Tensor, item_table: Tensor, target: Tensor | None) -> Tensor:
        frozen = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        log_partition, mean = partition(users, item_table, want_mean=frozen)
        ctx.save_for_backward(users, item_table, target, log_partition, mean)
        ctx.medium = torch.get_float32_matmul_precision() == "medium"
        if target is None:
            return log_partition
        return log_partition - (users * item_table[target]).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        users, item_table, target, log_partition, mean = ctx.saved_tensors
        upstream, table_grad = upstream[:, None], None
        if ctx.needs_input_grad[1]:
            with _precision(ctx.medium):
                mean, table_grad = _table_gradient(users, item_table, log_partition, upstream)
            if target is not None:
                table_grad.index_add_(0, target, users * -upstream)
        user_grad = None
        if ctx.needs_input_grad[0]:
            user_grad = (mean if target is None else mean - item_table[target]) * upstream
        return user_grad, table_grad, None


def partition(
    users: Tensor, item_table: Tensor, want_mean: bool = True
) -> tuple[Tensor, Tensor | None]:
    """logsumexp of users @ item_table.T, [B], and the softmax's mean item [B, D]; no gradient."""
    log_partition, means = [], []
    rows, items = CPU_TILE if users.device.type == "cpu" else TILE
    for part in users.split(rows):
        peak = part.new_full((len(part), 1), -torch.inf)
        mass, mean = torch.zeros_like(peak), torch.zeros_like(part)
        for tile in item_table.split(items):
            logits = part @ tile.T
            higher = torch.maximum(peak, logits.amax(1, keepdim=True))
            weight, decay = logits.sub_(higher).exp_(), peak.sub_(higher).exp_()
            mass.mul_(decay).add_(weight.sum(1, keepdim=True))
            if want_mean:
                mean.mul_(decay).addmm_(weight, tile)
            peak = higher
        log_partition.append(peak.add_(mass.log()).squeeze(1))
        means.append(mean.div_(mass))
    return torch.cat(log_partition), torch.cat(means) if want_mean else None


def _table_gradient(
    users: Tensor, item_table: Tensor, log_partition: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The softmax's mean item vector [B, D], and the gradient to the table [N, D]."""
    mean, table_grad = torch.zeros_like(users), torch.zeros_like(item_table)
    rows, items = CPU_TILE if users.device.type == "cpu" else TILE
    for i in range(0, len(users), rows):
        part, level = users[i : i + rows], log_partition[i : i + rows, None]
        scaled = part * upstream[i : i + rows]
        for j in range(0, len(item_table), items):
            tile = item_table[j : j + items]
            weight = (part @ tile.T).sub_(level).exp_()
            mean[i : i + rows].addmm_(weight, tile)
            table_grad[j : j + items].addmm_(weight.T, scaled)
    return mean, table_grad
