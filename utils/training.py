"""The one fit loop: accumulation, warm-up, clipping, evaluation, best checkpoint, patience, logs."""

import contextlib
import inspect
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint, distributed
from utils.cli import RunError, Stopped, UsageError
from utils.evaluation import Ranks
from utils.metrics_log import MetricsLog

Scheduler = Literal["cosine", "linear", "constant"]
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
RANK_STRIDE = 1_000_003  # processes draw dropout from seeds so far apart


class Fitted(NamedTuple):
    """What a run was: optimizer steps done, step and validation MRR of the best checkpoint, seconds without evaluation."""

    steps: int
    best_step: int
    best_mrr: float
    seconds: float


@dataclass
class Progress:
    """Where a run stands after a step; with tensors, optimizer and random generators all that going on needs.

    waited: evaluations since the best; running: values of the loss's parts since the last log line.
    """

    step: int = 0
    best_step: int = 0
    best_mrr: float = -math.inf
    waited: int = 0
    running: dict[str, list[float]] = field(default_factory=dict)


def fit(
    *,
    module: nn.Module,
    loss_fn: Callable[[np.ndarray], dict[str, Tensor]],
    counts: np.ndarray,
    users_of: Callable[[np.ndarray], list[str]],
    ranks_of: Callable[[str, int | None], Ranks],
    folder: Path,
    log: MetricsLog,
    meta: dict,
    resume: bool,
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

    A run that was stopped goes on from its newest checkpoint as if it had not been. SIGTERM or SIGINT let the step finish,
    save last/ and end the run.

    Args:
        loss_fn: sample indices [b] -> parts of the mean loss over the batch's targets, the sum under "total".
        counts: int64 [n], targets of each sample; micro-batches are weighted by it, so accumulation changes nothing.
        users_of: sample indices -> their users' names, for messages.
        ranks_of: (split, at most so many batches) -> ranks; two batches of it are a rehearsal before training.
        meta: stored with every checkpoint. resume: go on from the folder's newest checkpoint.
        max_steps: optimizer steps, -1 for num_epochs whole epochs. eval_steps, save_steps: -1 for every epoch's end.
        patience: evaluations without a better MRR before stopping, 0 for never.
    Raises:
        RunError: the loss, a gradient or a metric is not finite, or the disk is full. Stopped: a signal came.
    """
    torch.manual_seed(seed + RANK_STRIDE * distributed.rank())  # dropout's stream starts here, whatever was drawn to make the models
    device = next(module.parameters()).device
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    per_epoch = math.ceil(len(counts) / batch_size)
    total = max_steps if max_steps > 0 else num_epochs * per_epoch
    factor = _schedule(lr_scheduler, warmup_steps, total)
    precision = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    module.eval()
    ranks_of("valid", 2)
    now, source = _go_on(folder, module, trained, optimizer, device, log) if resume else (Progress(), None)
    seconds, started = log.seconds() if now.step else 0.0, time.perf_counter()

    def save(name: str) -> None:
        about = meta | {"step": now.step, "best_step": now.best_step, "progress": vars(now)}
        broken = [key for key, p in trained.items() if not torch.isfinite(p).all()]
        if broken:
            raise RunError(f"step {now.step}: the weights {', '.join(broken[:3])} are not finite any more; {_kept(folder)}; lower --learning_rate")
        generators = distributed.gather(_generators(device))
        if distributed.is_first():
            state = _optimizer_state(trained, optimizer) | {f"{key}.{r}": t for r, each in enumerate(generators) for key, t in each.items()}
            checkpoint.save(folder / name, checkpoint.trained_tensors(module), about, state)
            log.clock(seconds + (time.perf_counter() - started if module.training else 0.0))

    module.train()
    if source == "best" and _due(now.step, save_steps, per_epoch, total):
        save("last")  # due at the same step, and killed before it was there
    bar = tqdm(total=total, initial=now.step, unit="step", dynamic_ncols=True, mininterval=1.0)
    with bar, Signals() as signals:
        for rows in itertools.islice(_batches(len(counts), batch_size, total, seed), now.step, None):
            if patience and now.waited >= patience:
                tqdm.write(f"stopped at step {now.step}: {patience} evaluations without a better validation MRR")
                break
            step = now.step + 1
            rate = learning_rate * factor(step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts, stopping = _accumulate(loss_fn, rows, counts, micro_batch_size, precision, parameters, signals)
            norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf, foreach=True))
            if not math.isfinite(parts["total"]) or not math.isfinite(norm):
                raise RunError(_not_finite(step, parts, norm, rows, users_of(rows[:5]), folder))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now.step = step
            for name, value in parts.items():
                now.running.setdefault(name, []).append(value)
            bar.update()
            if step % log_steps == 0 or step == total:
                means = {name: float(np.mean(values)) for name, values in now.running.items()}
                now.running = {}
                log.add("train", step, means | {"learning_rate": rate, "grad_norm": norm, "epoch": step / per_epoch})
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if _due(step, eval_steps, per_epoch, total):
                seconds += time.perf_counter() - started
                module.eval()
                if _evaluate(ranks_of, now, log):
                    save("best")
                module.train()
                started = time.perf_counter()
            stopping = stopping or (signals.came if distributed.world() == 1 else 0)
            if stopping or (patience and now.waited >= patience) or _due(step, save_steps, per_epoch, total):
                save("last")
            if stopping:
                raise Stopped(stopping, f"step {step} is done and {folder / 'last'} saved; the same command goes on from there")
        came = max(distributed.gather(signals.came))
        if came:
            raise Stopped(came, f"training is done and saved in {folder}; the same command goes on with the evaluation")
    distributed.barrier()  # the last checkpoint is there for all
    return Fitted(now.step, now.best_step, now.best_mrr, seconds + time.perf_counter() - started)


def _evaluate(ranks_of: Callable[..., Ranks], now: Progress, log: MetricsLog) -> bool:
    """Validate; whether it is the best so far. A tie is not better, and a metric that is not a number is an error before."""
    try:
        metrics = ranks_of("valid", None).metrics()
    except RunError as error:
        raise RunError(f"step {now.step}, validation: {error}; the checkpoints that were there are kept") from None
    log.add("valid", now.step, {f"{protocol}/{name}": value for protocol, values in metrics.items() for name, value in values.items()})
    mrr = metrics["sampled"]["MRR"]
    better = mrr > now.best_mrr
    if better:
        now.best_step, now.best_mrr = now.step, mrr
    now.waited = 0 if better else now.waited + 1
    tqdm.write(
        f"step {now.step}: valid MRR {mrr:.4f} HR@10 {metrics['sampled']['HR@10']:.4f} (best {now.best_mrr:.4f} at step {now.best_step})"
    )
    return better


def _optimizer_state(trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{key}/{name}": optimizer.state[p][key] for name, p in trained.items() for key in ADAM if p in optimizer.state}


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators."""
    states = {"generator/cpu": torch.get_rng_state()}
    return states | ({"generator/device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _go_on(
    folder: Path, module: nn.Module, trained: dict[str, Tensor], optimizer, device: torch.device, log: MetricsLog
) -> tuple[Progress, str | None]:
    """Put model, optimizer and random generators where the newest good checkpoint left them; the log too. Returns its name as well."""
    found, notes = checkpoint.newest(folder)
    for note in notes:
        tqdm.write(f"passed over: {note}")
    if found is None:
        tqdm.write(f"{folder} holds an unfinished run without a checkpoint: it starts from the beginning")
        log.cut(0)
        return Progress(), None
    checkpoint.restore(module, found.tensors, folder / found.name)
    for name, p in trained.items():
        state = {key: found.state[f"{key}/{name}"] for key in ADAM if f"{key}/{name}" in found.state}
        optimizer.state[p] = {key: tensor.to(device) for key, tensor in state.items()}
    mine = {key: found.state.get(f"{key}.{distributed.rank()}") for key in _generators(device)}
    if any(state is None for state in mine.values()) or f"generator/cpu.{distributed.world()}" in found.state:
        tqdm.write("the run was saved by another number of processes or on another kind of device: dropout goes on with new draws")
        torch.manual_seed(found.meta["step"] * 7919 + distributed.rank())
    else:
        torch.set_rng_state(mine["generator/cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(mine["generator/device"], device)
    log.cut(found.meta["step"])
    tqdm.write(f"going on from {folder / found.name}, step {found.meta['step']}")
    return Progress(**found.meta["progress"]), found.name


class Signals:
    """Within it the first SIGTERM or SIGINT is noted, and a second one ends the process at once.

    came: number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.came = 0

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self.before = {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.came:
            os._exit(128 + number)
        self.came = number
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving; once more ends at once\n".encode())


def settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a script that `fit` takes by the same name; micro_batch_size None is the whole batch."""
    names = [name for name in inspect.signature(fit).parameters if name in flags and name != "bf16"]
    whole = flags["batch_size"] // distributed.world()
    return {name: flags[name] for name in names} | {"micro_batch_size": flags["micro_batch_size"] or whole}


def choose_device(device: str) -> torch.device:
    """`auto` is cuda where there is one, of several processes each its own; they are joined here.

    Raises:
        UsageError: cuda is asked for and there is none, or fewer than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch finds no CUDA device here; use --device=cpu")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    place, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda":
        if here > torch.cuda.device_count():  # every process finds it, the first one says it
            raise UsageError(f"--nproc_per_node={here}: one CUDA device a process, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
    distributed.start(kind)
    return torch.device(kind, place) if kind == "cuda" and distributed.world() > 1 else torch.device(kind)


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


def _accumulate(
    loss_fn: Callable, rows: np.ndarray, counts: np.ndarray, micro_batch_size: int, precision, parameters: list[Tensor], signals: "Signals"
) -> tuple[dict[str, float], int]:
    """Gradients of the mean loss over the global batch's targets, micro-batch by micro-batch, summed over the processes.

    Returns:
        the loss's parts, and the number of a signal that came to any process (0 for none).
    """
    whole = counts[rows].sum()
    mine = np.array_split(rows, distributed.world())[distributed.rank()]
    idle = len(mine) == 0  # a short last batch: take part with no weight
    mine = rows[:1] if idle else mine
    parts: dict[str, Tensor] = {}
    for i in range(0, len(mine), micro_batch_size):
        micro = mine[i : i + micro_batch_size]
        share = 0.0 if idle else float(counts[micro].sum() / whole)
        with precision:
            losses = loss_fn(micro)
        (losses["total"] * share).backward()
        for name, value in losses.items():
            parts[name] = parts.get(name, 0.0) + value.detach() * share
    values = torch.stack([value.double() for value in parts.values()])
    if distributed.world() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        distributed.sum_in_place([p.grad for p in parameters])
        values = torch.cat([values, values.new_tensor([float(signals.came > 0)])])
        distributed.sum_in_place([values])
    *means, stopping = values.tolist() if distributed.world() > 1 else [*values.tolist(), signals.came]
    return dict(zip(parts, means)), max(distributed.gather(signals.came)) if stopping else 0


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


def _not_finite(step: int, parts: dict[str, float], norm: float, rows: np.ndarray, users: list[str], folder: Path) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"step {step}: the loss or a gradient is not finite ({shown}, gradient norm {norm:.4g}; batch of {len(rows)} samples"
        f" {', '.join(map(str, rows[:5]))}, ... of users {', '.join(users)}, ...);"
        f" {_kept(folder)}; lower --learning_rate or lengthen --warmup_steps"
    )


def _kept(folder: Path) -> str:
    kept = [str(folder / name) for name in ("best", "last") if (folder / name).is_dir()]
    return f"kept: {' and '.join(kept)}" if kept else "no checkpoint was written yet"
