"""Losses as pure functions. B batch, N items, D item dim, H LLM width, E blocks."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["sum", "mean"]
NormForm = Literal["l2", "squared_l2"]
TILES = (256, 2048), (1024, 32768)  # rows x items of logits held at once: 2 MiB in float32 on CPU, 128 MiB elsewhere
WHOLE_ROWS, FEWEST_ROWS = (2**20, 2**26), 32  # the same for tiles of whole rows, worth it from so many rows on


class Output(NamedTuple):
    """What a model says of a batch. user: [B, D], scores are its dot products with the item table; states: [B, E, H],
    last token at the block ends; exits: [B, E - 1, D], the inner exits' user vectors (no rows without exit heads)."""

    user: Tensor
    states: Tensor
    exits: Tensor


def catalogue_cross_entropy(users: Tensor, item_table: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of user vectors [B, D] against the whole item table [N, D]; target int64 [B]. A scalar.

    Equals F.cross_entropy(users @ item_table.T, target) without ever holding the [B, N] logits. Computed in float32 at
    least, outside autocast.
    """
    with torch.autocast(users.device.type, enabled=False):
        users = wide(users)
        item_table = item_table.to(users.dtype)
        whole = WHOLE_ROWS[users.device.type != "cpu"] // len(item_table)
        if item_table.requires_grad and torch.is_grad_enabled() and whole >= FEWEST_ROWS:
            return _MeanSurprise.apply(users, item_table, target, whole)
        return _Surprise.apply(users, item_table, target).mean()


def sampled_cross_entropy(states: Tensor, item_table: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
    """Mean cross-entropy of each target against itself and sampled negatives. A scalar.

    Uniform negatives without a correction of the logits, as in the published SASRec rows with sampled softmax; a user's
    positions share the user's negatives, and a negative that is the target itself does not count.

    Args:
        states: [B, L, D]; item_table: [N, D]; target: int64 [B, L], N where there is none; negatives: int64 [B, K].
    """
    real = target != len(item_table)
    target = target.clamp(max=len(item_table) - 1)
    with torch.autocast(states.device.type, enabled=False):
        states, item_table = wide(states), wide(item_table)
        own = (states * F.embedding(target, item_table)).sum(-1, keepdim=True)  # [B, L, 1]
        drawn = states @ F.embedding(negatives, item_table).transpose(1, 2)  # [B, L, K]
        drawn = drawn.masked_fill(negatives[:, None] == target[..., None], -torch.inf)
        return (torch.cat([own, drawn], dim=-1).logsumexp(-1) - own.squeeze(-1))[real].mean()


class _MeanSurprise(torch.autograd.Function):
    """The mean of `_Surprise` where the table is trained and small: tiles of whole rows, whose gradients are taken on the spot.

    Saves the second computation of the logits and their exponentials; costs a copy of the table's gradient.
    """

    @staticmethod
    def forward(ctx, users: Tensor, item_table: Tensor, target: Tensor, rows: int) -> Tensor:
        user_grad, table_grad, total = torch.empty_like(users), torch.zeros_like(item_table), users.new_zeros(())
        for i in range(0, len(users), rows):
            part, wanted = users[i : i + rows], target[i : i + rows, None]
            logits = part @ item_table.T  # [b, N]
            peak, own = logits.amax(1, keepdim=True), logits.gather(1, wanted)
            weight = logits.sub_(peak).exp_()
            mass = weight.sum(1, keepdim=True)
            total += (peak + mass.log() - own).sum()
            slope = weight.div_(mass * len(users)).scatter_add_(1, wanted, torch.full_like(own, -1 / len(users)))
            torch.mm(slope, item_table, out=user_grad[i : i + rows])
            table_grad.addmm_(slope.T, part)
        ctx.grads = user_grad, table_grad
        return total / len(users)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return *(grad * upstream for grad in ctx.grads), None, None


class _Surprise(torch.autograd.Function):
    """-log softmax(users @ item_table.T) at each row's target, [B]; without a target the log-partition alone.

    Logits are worked off in tiles of rows x items. With a frozen table one pass suffices: the gradient to a user is the
    softmax's mean item vector, which a running maximum gathers as flash attention does (Dao et al., 2022, with the table
    as keys and values). With a trained table the backward pass computes the tiles again.
    """

    @staticmethod
    def forward(ctx, users: Tensor, item_table: Tensor, target: Tensor | None) -> Tensor:
        log_partition, mean = partition(users, item_table, want_mean=ctx.needs_input_grad[0] and not ctx.needs_input_grad[1])
        ctx.save_for_backward(users, item_table, target, log_partition, mean)
        return log_partition if target is None else log_partition - (users * item_table[target]).sum(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        users, item_table, target, log_partition, mean = ctx.saved_tensors
        upstream, table_grad = upstream[:, None], None
        if ctx.needs_input_grad[1]:
            mean, table_grad = _table_gradient(users, item_table, log_partition, upstream)
            if target is not None:
                table_grad.index_add_(0, target, users * -upstream)
        user_grad = None
        if ctx.needs_input_grad[0]:
            user_grad = (mean if target is None else mean - item_table[target]) * upstream
        return user_grad, table_grad, None


def partition(users: Tensor, item_table: Tensor, want_mean: bool = True) -> tuple[Tensor, Tensor | None]:
    """logsumexp of users @ item_table.T, [B], and the softmax's mean item vector, [B, D]; no gradient."""
    log_partition, means = [], []
    rows, items = TILES[users.device.type != "cpu"]
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


def _table_gradient(users: Tensor, item_table: Tensor, log_partition: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax's mean item vector [B, D], and the log-partitions' gradient to the table [N, D]."""
    mean, table_grad = torch.zeros_like(users), torch.zeros_like(item_table)
    rows, items = TILES[users.device.type != "cpu"]
    for i in range(0, len(users), rows):
        part, level = users[i : i + rows], log_partition[i : i + rows, None]
        scaled = part * upstream[i : i + rows]
        for j in range(0, len(item_table), items):
            tile = item_table[j : j + items]
            weight = (part @ tile.T).sub_(level).exp_()
            mean[i : i + rows].addmm_(weight, tile)
            table_grad[j : j + items].addmm_(weight.T, scaled)
    return mean, table_grad


def block_cosine(teacher: Tensor, student: Tensor, reduction: Reduction) -> Tensor:
    """1 - cos(teacher, student) of states [B, E, H]: mean over users, sum or mean over blocks (paper's D_cos)."""
    return _over_blocks(1.0 - F.cosine_similarity(wide(teacher), wide(student), dim=-1), reduction)


def block_distance(teacher: Tensor, student: Tensor, reduction: Reduction, form: NormForm) -> Tensor:
    """L2 distance of states [B, E, H], plain (released code) or squared (paper's D_norm)."""
    difference = wide(teacher) - wide(student)
    squared = difference.square().sum(-1)  # [B, E]
    if form == "squared_l2":
        return _over_blocks(squared, reduction)
    # vector_norm's slope at zero is zero, where sqrt would give NaN: equal states pull nowhere
    return _over_blocks(torch.linalg.vector_norm(difference, dim=-1), reduction)


def exit_supervision(exits: Tensor, item_table: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
    """Catalogue cross-entropy at the inner exits, vectors [B, E - 1, D], summed or averaged over exits (L_ms)."""
    with torch.autocast(exits.device.type, enabled=False):
        users = wide(exits).flatten(0, 1)
        losses = _Surprise.apply(users, item_table.to(users.dtype), target.repeat_interleave(exits.shape[1]))
    return _over_blocks(losses.view(exits.shape[:2]), reduction)


def logit_kl(teacher: Tensor, student: Tensor, item_table: Tensor, temperature: float, reduction: Reduction) -> Tensor:
    """KL(teacher || student) of catalogue softmaxes at a temperature, times temperature squared (Hinton et al., 2015).

    Args:
        teacher, student: user vectors [B, E, D] at E block ends; the teacher's are constants here.
        item_table: [N, D].
    """
    with torch.autocast(teacher.device.type, enabled=False):
        wanted, given = (wide(users).flatten(0, 1) / temperature for users in (teacher.detach(), student))  # [B * E, D]
        table = item_table.to(wanted.dtype)
        # KL = E[wanted . v - given . v] - log Z(wanted) + log Z(given), the mean over the teacher's softmax of items v
        log_partition, mean = partition(wanted, table)
        divergence = ((wanted - given) * mean).sum(1) - log_partition + _Surprise.apply(given, table, None)
    return temperature**2 * _over_blocks(divergence.view(teacher.shape[:2]), reduction)


def wide(x: Tensor) -> Tensor:
    """At least float32: neither losses nor softmaxes are taken in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _over_blocks(values: Tensor, reduction: Reduction) -> Tensor:
    per_block = values.mean(0)  # [E]
    return per_block.sum() if reduction == "sum" else per_block.mean()


def recommendation_loss(
    student: Output, teacher: Output | None, item_table: Tensor, target: Tensor, *, distill_lambda: float = 0.0,
    norm_lambda: float = 0.0, cls_multiple_lambda: float = 0.0, logit_lambda: float = 0.0, temperature: float = 1.0,
    block_reduction: Reduction = "sum", norm_form: NormForm = "l2", train_teacher: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Every part of L = L_ce + lambda1 (1 - D_cos) + lambda2 D_norm + lambda3 L_ms (+ logit KL), unweighted, and `total`.

    A part whose weight is 0 is left out. Without a teacher only `ce` and `exits` remain.

    Args:
        student, teacher: models.llm4rec.Output of the same batch; teacher outputs of an offline teacher carry no gradient.
        target: int64 [B].
        logit_lambda: weight of the KL between catalogue softmaxes, at every block end where both have exits, else at the
            final one.
        train_teacher: online distillation, the teacher's own cross-entropy (and exits) count too.
    """
    parts = {"ce": catalogue_cross_entropy(student.user, item_table, target)}
    weights = {"ce": 1.0}
    if cls_multiple_lambda and student.exits.shape[1]:
        parts["exits"] = exit_supervision(student.exits, item_table, target, block_reduction)
        weights["exits"] = cls_multiple_lambda
    if teacher is not None:
        if distill_lambda:
            parts["align_cos"] = block_cosine(teacher.states, student.states, block_reduction)
            weights["align_cos"] = distill_lambda
        if norm_lambda:
            parts["align_norm"] = block_distance(teacher.states, student.states, block_reduction, norm_form)
            weights["align_norm"] = norm_lambda
        if logit_lambda:
            parts["logit_kl"] = logit_kl(
                _all_exits(teacher, student), _all_exits(student, teacher), item_table, temperature, block_reduction
            )
            weights["logit_kl"] = logit_lambda
        with torch.set_grad_enabled(train_teacher and torch.is_grad_enabled()):
            parts["teacher_ce"] = catalogue_cross_entropy(teacher.user, item_table, target)
        weights["teacher_ce"] = float(train_teacher)
        if train_teacher and cls_multiple_lambda and teacher.exits.shape[1]:
            parts["teacher_exits"] = exit_supervision(teacher.exits, item_table, target, block_reduction)
            weights["teacher_exits"] = cls_multiple_lambda
    parts["total"] = sum(weight * parts[name] for name, weight in weights.items() if weight)
    return parts


def _all_exits(own: Output, other: Output) -> Tensor:
    """User vectors at the block ends where both models predict, [B, E or 1, D]."""
    both = own.exits.shape[1] and own.exits.shape[1] == other.exits.shape[1]
    return torch.cat([own.exits, own.user[:, None]], dim=1) if both else own.user[:, None]
