"""The one fit loop: accumulation, warm-up, clipping, evaluation, best checkpoint, patience, logs."""

import contextlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint
from utils.cli import RunError, UsageError
from utils.evaluation import Ranks
from utils.runlog import MetricsLog

Scheduler = Literal["cosine", "linear", "constant"]


class Fitted(NamedTuple):
    """What a run was: optimizer steps done, step and validation MRR of the best checkpoint, seconds without evaluation."""

    steps: int
    best_step: int
    best_mrr: float
    seconds: float


def fit(
    *,
    module: nn.Module,
    loss_fn: Callable[[np.ndarray], dict[str, Tensor]],
    counts: np.ndarray,
    ranks_of: Callable[[str, int | None], Ranks],
    folder: Path,
    log: MetricsLog,
    meta: dict,
    batch_size: int,
    micro_batch_size: int,
    num_epochs: int,
    max_steps: int,
    learning_rate: float,
    lr_scheduler: Scheduler,
    warmup_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    eval_steps: int,
    save_steps: int,
    patience: int,
    log_steps: int,
    seed: int,
    bf16: bool,
) -> Fitted:
    """Train what in `module` requires a gradient; leave best/ (highest validation MRR) and last/ in `folder`.

    Args:
        loss_fn: sample indices [b] -> parts of the mean loss over the batch's targets, the sum under "total".
        counts: int64 [n], targets of each sample; micro-batches are weighted by it, so accumulation changes nothing.
        ranks_of: (split, at most so many batches) -> ranks; two batches of it are a rehearsal before training.
        meta: stored with every checkpoint.
        max_steps: optimizer steps, -1 for num_epochs whole epochs. eval_steps, save_steps: -1 for every epoch's end.
        patience: evaluations without a better MRR before stopping, 0 for never.
    Raises:
        RunError: the loss, a gradient or a metric is not finite.
    """
    torch.manual_seed(seed)  # dropout's stream starts here, whatever was drawn to make the models
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    per_epoch = math.ceil(len(counts) / batch_size)
    total = max_steps if max_steps > 0 else num_epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(lr_scheduler, warmup_steps, total))
    precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    module.eval()
    ranks_of("valid", 2)
    best_step, best_mrr, waited, seconds = 0, -math.inf, 0, 0.0
    running: dict[str, list[Tensor]] = {}
    started = time.perf_counter()
    module.train()
    bar = tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=1.0)
    for step, rows in enumerate(_batches(len(counts), batch_size, total, seed), start=1):
        parts = _accumulate(loss_fn, rows, counts, micro_batch_size, precision)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf, foreach=True)
        if not math.isfinite(parts["total"]) or not torch.isfinite(norm):
            bar.close()
            raise RunError(_not_finite(step, parts, norm, rows, folder))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in parts.items():
            running.setdefault(name, []).append(value)
        bar.update()
        if step % log_steps == 0 or step == total:
            means = {name: float(torch.stack(values).mean()) for name, values in running.items()}
            running.clear()
            log.add(
                "train",
                step,
                means | {"learning_rate": schedule.get_last_lr()[0], "grad_norm": float(norm), "epoch": step / per_epoch},
            )
            bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
        schedule.step()
        if _due(step, eval_steps, per_epoch, total):
            seconds += time.perf_counter() - started
            module.eval()
            metrics = ranks_of("valid", None).metrics()
            module.train()
            log.add(
                "valid",
                step,
                {f"{protocol}/{name}": value for protocol, values in metrics.items() for name, value in values.items()},
            )
            mrr = metrics["sampled"]["MRR"]
            waited += 1
            if mrr > best_mrr:
                best_step, best_mrr, waited = step, mrr, 0
                checkpoint.save(folder / "best", checkpoint.trained_tensors(module), meta | {"step": step, "valid": metrics})
            tqdm.write(
                f"step {step}: valid MRR {mrr:.4f} HR@10 {metrics['sampled']['HR@10']:.4f} (best {best_mrr:.4f} at step {best_step})"
            )
            started = time.perf_counter()
        stopping = patience and waited >= patience
        if stopping or _due(step, save_steps, per_epoch, total):
            checkpoint.save(folder / "last", checkpoint.trained_tensors(module), meta | {"step": step})
        if stopping:
            tqdm.write(f"stopped at step {step}: {patience} evaluations without a better validation MRR")
            break
    bar.close()
    return Fitted(step, best_step, best_mrr, seconds + time.perf_counter() - started)


def settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a script that `fit` takes by the same name; micro_batch_size None is the whole batch."""
    names = [name for name in inspect.signature(fit).parameters if name in flags and name != "bf16"]
    return {name: flags[name] for name in names} | {"micro_batch_size": flags["micro_batch_size"] or flags["batch_size"]}


def choose_device(device: str) -> torch.device:
    """`auto` is cuda where there is one.

    Raises:
        UsageError: cuda is asked for and there is none, or torchrun started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes (torchrun) are not supported yet; start one")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA device here; use --device=cpu")
    return torch.device(device)


def _batches(n: int, batch_size: int, total: int, seed: int) -> Iterator[np.ndarray]:
    """`total` global batches; epoch e is the permutation drawn from (seed, e), its last batch may be short."""
    step, epoch = 0, 0
    while step < total:
        order = np.random.default_rng((seed, epoch)).permutation(n)
        for i in range(0, n, batch_size):
            yield order[i : i + batch_size]
            step += 1
            if step == total:
                return
        epoch += 1


def _accumulate(loss_fn: Callable, rows: np.ndarray, counts: np.ndarray, micro_batch_size: int, precision) -> dict[str, Tensor]:
    """Gradients of the mean loss over the batch's targets, micro-batch by micro-batch; the parts, detached."""
    whole = counts[rows].sum()
    parts: dict[str, Tensor] = {}
    for i in range(0, len(rows), micro_batch_size):
        micro = rows[i : i + micro_batch_size]
        share = float(counts[micro].sum() / whole)
        with precision:
            losses = loss_fn(micro)
        (losses["total"] * share).backward()
        for name, value in losses.items():
            parts[name] = parts.get(name, 0.0) + value.detach() * share
    return parts


def _schedule(kind: Scheduler, warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear warm-up, then cosine or linear to zero, or constant."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if kind == "constant":
            return 1.0
        left = 1.0 - min(1.0, (step - warmup) / max(1, total - warmup))
        return left if kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

    return factor


def _due(step: int, every: int, per_epoch: int, total: int) -> bool:
    return step == total or step % (every if every > 0 else per_epoch) == 0


def _not_finite(step: int, parts: dict[str, Tensor], norm: Tensor, rows: np.ndarray, folder: Path) -> str:
    shown = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items())
    kept = f"the best checkpoint so far is in {folder / 'best'}" if (folder / "best").is_dir() else "no checkpoint was written yet"
    return (
        f"step {step}: the loss or a gradient is not finite ({shown}, gradient norm {float(norm):.4g}; samples"
        f" {', '.join(map(str, rows[:5]))}, ...); {kept}; lower --learning_rate or lengthen --warmup_steps"
    )
