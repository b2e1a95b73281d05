"""The paper's loss, one function per term. EDIT HERE; the scripts add them up.

    L = L_ce + distill_lambda * (1 - cos) + norm_lambda * distance
        + cls_multiple_lambda * L_ms + logit_lambda * logit KL + sasrec_lambda * SASRec KL

The first three weights are the paper's lambda1, lambda2 and lambda3. It calls the cosine D_cos, the
distance D_norm, and the exits' cross-entropy L_ms. The two KL terms are ours.

To add a term: a function here; its weight and two lines in distill.py.

Legend: B batch, E block ends, H LLM width, D item width, N items, L slots, K negatives, S positions
of all users.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models import catalogue
from models.catalogue import in_float32, wide

Reduction = Literal["sum", "mean"]
Parts = dict[str, tuple[float, Tensor]]  # name -> weight, value


class Output(NamedTuple):
    """What a model computes for a batch.

    user: [B, D]; scores are its dot products with the item table.
    states: [B, E, H], the last token's state at the block ends.
    exits: [B, E - 1, D], user vectors at the inner block ends; [B, 0, D] without exit heads.
    """

    user: Tensor
    states: Tensor
    exits: Tensor


def weighted_sum(parts: Parts) -> dict[str, Tensor]:
    """Every part, unweighted, and their weighted sum, `total`; a part of weight 0 is logged."""
    total = sum(weight * value for weight, value in parts.values() if weight)
    return {name: value for name, (_, value) in parts.items()} | {"total": total}


def next_item(users: Tensor, item_table: Tensor, target: Tensor) -> Tensor:
    """L_ce: mean cross-entropy of user vectors [B, D] against the whole catalogue, a scalar."""
    return catalogue.catalogue_cross_entropy(users, item_table, target)


def block_cosine(teacher: Tensor, student: Tensor, reduction: Reduction) -> Tensor:
    """D_cos: 1 - cos(teacher, student) of states [B, E, H]; mean over users, then over blocks."""
    cosine = F.cosine_similarity(wide(teacher), wide(student), dim=-1)  # [B, E]
    return _over_blocks(1.0 - cosine, reduction)


def block_distance(
    teacher: Tensor, student: Tensor, reduction: Reduction, form: Literal["l2", "squared_l2"]
) -> Tensor:
    """D_norm: L2 distance of states [B, E, H], plain (released code) or squared (the paper)."""
    difference = wide(teacher) - wide(student)
    if form == "squared_l2":
        return _over_blocks(difference.square().sum(-1), reduction)
    # vector_norm's slope at zero is zero, where that of sqrt is NaN
    return _over_blocks(torch.linalg.vector_norm(difference, dim=-1), reduction)


def exit_supervision(
    exits: Tensor, item_table: Tensor, target: Tensor, reduction: Reduction
) -> Tensor:
    """L_ms: `next_item` at the inner exits [B, E - 1, D], summed or averaged over exits."""
    with in_float32(exits.device.type):
        users = wide(exits).flatten(0, 1)
        targets = target.repeat_interleave(exits.shape[1])
        losses = catalogue.cross_entropy(users, item_table.to(users.dtype), targets)
    return _over_blocks(losses.view(exits.shape[:2]), reduction)


def logit_kl(
    teacher: Output, student: Output, item_table: Tensor, temperature: float, reduction: Reduction
) -> Tensor:
    """`user_kl` at every block end where both have exits, else at the final one."""
    if student.exits.shape[1] and student.exits.shape[1] == teacher.exits.shape[1]:
        ends = [torch.cat([m.exits, m.user[:, None]], dim=1) for m in (teacher, student)]
    else:
        ends = [teacher.user[:, None], student.user[:, None]]
    return user_kl(*ends, item_table, temperature, reduction)


def user_kl(
    teacher: Tensor,
    student: Tensor,
    item_table: Tensor,
    temperature: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher || student) of catalogue softmaxes, times temperature^2 (Hinton et al., 2015).

    With t, s the user vectors over the temperature, v the mean item vector of the teacher's softmax
    and Z the partitions: KL = (t - s) . v - log Z(t) + log Z(s).

    Args:
        teacher, student: user vectors [B, D], or [B, E, D] at E block ends. The teacher's are
            constants.
        item_table: [N, D].
    """
    shape = teacher.shape[:-1] if teacher.dim() == 3 else (len(teacher), 1)
    with in_float32(teacher.device.type):
        fixed = wide(teacher.detach()).reshape(-1, teacher.shape[-1]) / temperature  # [B * E, D]
        users = wide(student).reshape(-1, student.shape[-1]) / temperature
        table = item_table.to(fixed.dtype)
        log_partition, mean = catalogue.partition(fixed, table)
        divergence = ((fixed - users) * mean).sum(1) - log_partition
        divergence = divergence + catalogue.cross_entropy(users, table, None)
    return temperature**2 * _over_blocks(divergence.view(shape), reduction)


def of_teacher(
    teacher: Output, item_table: Tensor, target: Tensor, reduction: Reduction, weight: float | None
) -> Parts:
    """The teacher's own cross-entropy: logged beside the student's, or part of the loss online.

    Args:
        weight: of its exits where it is trained; None where it is frozen.
    """
    if weight is None:
        with torch.no_grad():
            return {"teacher_ce": (0.0, next_item(teacher.user, item_table, target))}
    parts = {"teacher_ce": (1.0, next_item(teacher.user, item_table, target))}
    if weight and teacher.exits.shape[1]:
        exits = exit_supervision(teacher.exits, item_table, target, reduction)
        parts["teacher_exits"] = weight, exits
    return parts


def sampled_cross_entropy(
    states: Tensor, item_table: Tensor, target: Tensor, negatives: Tensor, lengths: list[int]
) -> Tensor:
    """Mean cross-entropy of each target against itself and sampled negatives, a scalar.

    Uniform negatives without a correction of the logits, as in the published SASRec rows with
    sampled softmax. A user's positions share the user's negatives; a negative that is the target
    itself does not count.

    Args:
        states: [S, D], user after user.
        item_table: [N, D].
        target: int64 [S].
        negatives: int64 [B, K].
        lengths: how many of the S are each user's, [B].
    """
    states = pad_sequence(states.split(lengths), batch_first=True)  # [B, L, D]
    target = pad_sequence(target.split(lengths), batch_first=True, padding_value=-1)
    real, target = target >= 0, target.clamp(min=0)
    with in_float32(states.device.type):
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
