"""Losses as pure functions. B batch, N items, D item dim, H LLM width, E blocks."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["sum", "mean"]
NormForm = Literal["l2", "squared_l2"]
TILE = 2**24  # logits held at once (64 MiB in float32)


class Output(NamedTuple):
    """What a model says of a batch. user: [B, D], scores are its dot products with the item table; states: [B, E, H],
    last token at the block ends; exits: [B, E - 1, D], the inner exits' user vectors (no rows without exit heads)."""

    user: Tensor
    states: Tensor
    exits: Tensor


def catalogue_cross_entropy(users: Tensor, item_table: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of user vectors [B, D] against the whole item table [N, D]; target int64 [B]. A scalar.

    Equals F.cross_entropy(users @ item_table.T, target) without holding the [B, N] logits: rows are worked off in
    tiles and their gradients taken on the spot, the softmax being at hand. Computed in float32 at least, outside autocast.
    """
    with torch.autocast(users.device.type, enabled=False):
        users = _wide(users)
        return _CatalogueCrossEntropy.apply(users, item_table.to(users.dtype), target)


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users: Tensor, item_table: Tensor, target: Tensor) -> Tensor:
        want_users, want_table, _ = ctx.needs_input_grad
        user_grad = torch.empty_like(users) if want_users else None
        table_grad = torch.zeros_like(item_table) if want_table else None
        total = users.new_zeros(())
        rows = max(1, TILE // len(item_table))
        for i in range(0, len(users), rows):
            part, wanted = users[i : i + rows], target[i : i + rows, None]
            logits = part @ item_table.T  # [b, N]
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if want_users or want_table:  # softmax - one hot, in place of the logits
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0)).div_(len(users))
                if want_users:
                    torch.mm(slope, item_table, out=user_grad[i : i + rows])
                if want_table:
                    table_grad.addmm_(slope.T, part)
        ctx.grads = user_grad, table_grad
        return total / len(users)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return *(None if grad is None else grad * upstream for grad in ctx.grads), None


def block_cosine(teacher: Tensor, student: Tensor, reduction: Reduction) -> Tensor:
    """1 - cos(teacher, student) of states [B, E, H]: mean over users, sum or mean over blocks (paper's D_cos)."""
    return _over_blocks(1.0 - F.cosine_similarity(_wide(teacher), _wide(student), dim=-1), reduction)


def block_distance(teacher: Tensor, student: Tensor, reduction: Reduction, form: NormForm) -> Tensor:
    """L2 distance of states [B, E, H], plain (released code) or squared (paper's D_norm)."""
    difference = _wide(teacher) - _wide(student)
    squared = difference.square().sum(-1)  # [B, E]
    if form == "squared_l2":
        return _over_blocks(squared, reduction)
    # vector_norm's slope at zero is zero, where sqrt would give NaN: equal states pull nowhere
    return _over_blocks(torch.linalg.vector_norm(difference, dim=-1), reduction)


def exit_supervision(exits: Tensor, item_table: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
    """Catalogue cross-entropy at the inner exits, vectors [B, E - 1, D], summed or averaged over exits (L_ms)."""
    losses = torch.stack([catalogue_cross_entropy(exits[:, k], item_table, target) for k in range(exits.shape[1])])
    return losses.sum() if reduction == "sum" else losses.mean()


def logit_kl(teacher: Tensor, student: Tensor, item_table: Tensor, temperature: float, reduction: Reduction) -> Tensor:
    """KL(teacher || student) of catalogue softmaxes at a temperature, times temperature squared (Hinton et al., 2015).

    Args:
        teacher, student: user vectors [B, E, D] at E block ends; the teacher's are constants here.
        item_table: [N, D].
    """
    table = _wide(item_table).T / temperature
    with torch.autocast(teacher.device.type, enabled=False):
        wanted = F.log_softmax(_wide(teacher.detach()) @ table, dim=-1)  # [B, E, N]
        given = F.log_softmax(_wide(student) @ table, dim=-1)
        divergence = (wanted.exp() * (wanted - given)).sum(-1)
    return temperature**2 * _over_blocks(divergence, reduction)


def _wide(x: Tensor) -> Tensor:
    """At least float32: losses are not taken in half precision."""
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
