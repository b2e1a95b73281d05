"""The paper's loss, term by term. EDIT HERE.

    L = L_ce + distill_lambda * (1 - cos) + norm_lambda * distance
        + cls_multiple_lambda * L_ms + logit_lambda * logit KL + sasrec_lambda * SASRec KL

The first three weights are the paper's lambda1, lambda2 and lambda3. It calls the cosine D_cos, the
distance D_norm, and the exits' cross-entropy L_ms. The two KL terms are ours.

To add a term: a function here, its weight in `DistillationLoss` of utils/flags.py, and a line in
`recommendation_loss`.

Legend: B batch, E block ends, H LLM width, D item width, N items, L slots, K negatives.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import catalogue
from models.catalogue import wide
from utils.flags import DistillationLoss, Exits, Objective, TeacherLoss

Reduction = Literal["sum", "mean"]


class Output(NamedTuple):
    """What a model computes for a batch.

    user: [B, D]; scores are its dot products with the item table.
    states: [B, E, H], the last token's state at the block ends.
    exits: [B, E - 1, D], user vectors at the inner block ends; [B, 0, D] without exit heads.
    """

    user: Tensor
    states: Tensor
    exits: Tensor


class Scores(NamedTuple):
    """What a model says of every item: user vectors [B, V] times item vectors [N, V]."""

    user: Tensor
    table: Tensor


def recommendation_loss(
    student: Output,
    teacher: Output | None,
    item_table: Tensor,
    target: Tensor,
    loss: Exits,
    train_teacher: bool = False,
    sasrec: Scores | None = None,
    negatives: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every part of the loss, unweighted, and their weighted sum under `total`.

    A part of weight 0 is left out, but for `teacher_ce`, which is logged beside `ce`.

    Args:
        student, teacher: outputs for the same batch. Without a teacher `ce`, `exits` and
            `sasrec_kl` remain.
        item_table: [N, D].
        target: catalogue index of the next item, int64 [B].
        loss: the weights, and how the terms are formed.
        train_teacher: online distillation; the teacher's own cross-entropy (and exits) count too.
        sasrec: item scores of SASRec, or the mean scores of several. The student's softmax over
            items is compared with theirs, so their states need no mapping to each other.
        negatives: int64 [B, K], the negatives of the cross-entropy; None uses the whole
            catalogue. The KL terms are over the whole catalogue in either case.
    """
    parts: dict[str, Tensor] = {}
    weights: dict[str, float] = {}

    def add(name: str, weight: float, term: Callable[..., Tensor], *inputs) -> None:
        if weight:
            parts[name], weights[name] = term(*inputs), weight

    reduction = loss.block_reduction
    exits_weight = loss.cls_multiple_lambda if student.exits.shape[1] else 0.0
    labels = item_table, target, negatives
    add("ce", 1.0, next_item, student.user, *labels)
    add("exits", exits_weight, exit_supervision, student.exits, *labels, reduction)
    if teacher is not None and isinstance(loss, DistillationLoss):
        states = teacher.states, student.states
        add("align_cos", loss.distill_lambda, block_cosine, *states, reduction)
        add("align_norm", loss.norm_lambda, block_distance, *states, reduction, loss.norm_form)
        users = _users_at_ends(teacher, student)
        add(
            "logit_kl", loss.logit_lambda, logit_kl, *users, item_table, loss.temperature, reduction
        )
    if sasrec is not None and isinstance(loss, TeacherLoss):
        users, temperature = (sasrec.user[:, None], student.user[:, None]), loss.sasrec_temperature
        tables = item_table, temperature, "mean", sasrec.table
        add("sasrec_kl", loss.sasrec_lambda, logit_kl, *users, *tables)
    if teacher is not None:
        with torch.set_grad_enabled(train_teacher and torch.is_grad_enabled()):
            parts["teacher_ce"] = next_item(teacher.user, *labels)
        weights["teacher_ce"] = float(train_teacher)  # 0: only logged
        weight = loss.cls_multiple_lambda if train_teacher and teacher.exits.shape[1] else 0.0
        add("teacher_exits", weight, exit_supervision, teacher.exits, *labels, reduction)
    parts["total"] = sum(weight * parts[name] for name, weight in weights.items() if weight)
    return parts


def next_item(
    users: Tensor, item_table: Tensor, target: Tensor, negatives: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of user vectors [B, D] against the whole catalogue, or against the target
    and negatives [B, K]; a scalar.
    """
    if negatives is None:
        return catalogue.catalogue_cross_entropy(users, item_table, target)
    return sampled_cross_entropy(users[:, None], item_table, target[:, None], negatives)


def block_cosine(teacher: Tensor, student: Tensor, reduction: Reduction) -> Tensor:
    """1 - cos(teacher, student) of states [B, E, H]: mean over users, sum or mean over blocks."""
    cosine = F.cosine_similarity(wide(teacher), wide(student), dim=-1)  # [B, E]
    return _over_blocks(1.0 - cosine, reduction)


def block_distance(
    teacher: Tensor, student: Tensor, reduction: Reduction, form: Literal["l2", "squared_l2"]
) -> Tensor:
    """L2 distance of states [B, E, H], plain (released code) or squared (the paper's D_norm)."""
    difference = wide(teacher) - wide(student)
    if form == "squared_l2":
        return _over_blocks(difference.square().sum(-1), reduction)
    # vector_norm's slope at zero is zero, where that of sqrt is NaN
    return _over_blocks(torch.linalg.vector_norm(difference, dim=-1), reduction)


def exit_supervision(
    exits: Tensor,
    item_table: Tensor,
    target: Tensor,
    negatives: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """`next_item` at the inner exits [B, E - 1, D], summed or averaged over exits (the paper's
    L_ms).
    """
    n_exits = exits.shape[1]
    if negatives is not None:
        targets = target[:, None].expand(-1, n_exits)
        mean = sampled_cross_entropy(exits, item_table, targets, negatives)
        return mean * n_exits if reduction == "sum" else mean
    with torch.autocast(exits.device.type, enabled=False):
        users = wide(exits).flatten(0, 1)
        targets = target.repeat_interleave(n_exits)
        losses = catalogue.cross_entropy(users, item_table.to(users.dtype), targets)
    return _over_blocks(losses.view(exits.shape[:2]), reduction)


def logit_kl(
    teacher: Tensor,
    student: Tensor,
    item_table: Tensor,
    temperature: float,
    reduction: Reduction,
    teacher_table: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of catalogue softmaxes, times temperature^2 (Hinton et al., 2015).

    With t, s the user vectors over the temperature, i an item drawn from the teacher's softmax, w
    and v its vectors in either table and Z the partitions:
    KL = E[t . w - s . v] - log Z(t) + log Z(s).

    Args:
        teacher, student: user vectors [B, E, D] at E block ends. The teacher's are constants.
        item_table: [N, D].
        teacher_table: [N, V], where the teacher scores items of its own; its user vectors are
            [B, E, V] then.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        fixed = wide(teacher.detach()).flatten(0, 1) / temperature  # [B * E, D]
        users = wide(student).flatten(0, 1) / temperature
        table = item_table.to(fixed.dtype)
        if teacher_table is None or teacher_table is item_table:
            log_partition, mean = catalogue.partition(fixed, table)
            divergence = ((fixed - users) * mean).sum(1) - log_partition
        else:
            own = teacher_table.to(fixed.dtype)
            both = torch.cat([own, table], dim=1)  # the mean of either table's vectors
            log_partition, mean = catalogue.partition(fixed, own, values=both)
            expected = torch.cat([fixed, -users], dim=1) * mean
            divergence = expected.sum(1) - log_partition
        divergence = divergence + catalogue.cross_entropy(users, table, None)
    return temperature**2 * _over_blocks(divergence.view(teacher.shape[:2]), reduction)


def draw_negatives(
    objective: Objective, n_users: int, n_items: int, device: torch.device
) -> Tensor | None:
    """Negatives for `sampled_cross_entropy`, int64 [B, K], uniform over the catalogue, from torch's
    global generator (as for dropout); None for the whole catalogue.
    """
    if objective.loss == "full":
        return None
    return torch.randint(n_items, (n_users, objective.num_negatives), device=device)


def sampled_cross_entropy(
    states: Tensor, item_table: Tensor, target: Tensor, negatives: Tensor
) -> Tensor:
    """Mean cross-entropy of each target against itself and sampled negatives, a scalar.

    Uniform negatives without a correction of the logits, as in the published SASRec rows with
    sampled softmax. A user's positions share the user's negatives; a negative that is the target
    itself does not count.

    Args:
        states: [B, L, D].
        item_table: [N, D].
        target: int64 [B, L], N where there is none.
        negatives: int64 [B, K].
    """
    real = target != len(item_table)
    target = target.clamp(max=len(item_table) - 1)
    with torch.autocast(states.device.type, enabled=False):
        states, item_table = wide(states), wide(item_table)
        own = (states * F.embedding(target, item_table)).sum(-1, keepdim=True)  # [B, L, 1]
        drawn = states @ F.embedding(negatives, item_table).transpose(1, 2)  # [B, L, K]
        drawn = drawn.masked_fill(negatives[:, None] == target[..., None], -torch.inf)
        losses = torch.cat([own, drawn], dim=-1).logsumexp(-1) - own.squeeze(-1)
        return losses[real].mean()


def _over_blocks(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean over users, then sum or mean over blocks, of values [B, E]."""
    per_block = values.mean(0)
    return per_block.sum() if reduction == "sum" else per_block.mean()


def _users_at_ends(teacher: Output, student: Output) -> tuple[Tensor, Tensor]:
    """Both models' user vectors at every block end where both have exits, else at the final one;
    each [B, E or 1, D].
    """
    if student.exits.shape[1] and student.exits.shape[1] == teacher.exits.shape[1]:
        teacher_users = torch.cat([teacher.exits, teacher.user[:, None]], dim=1)
        return teacher_users, torch.cat([student.exits, student.user[:, None]], dim=1)
    return teacher.user[:, None], student.user[:, None]
