"""One fit loop for every stage: accumulation, warm-up, clipping, evaluation, best checkpoint,
patience, logs.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import checkpoint, processes, sharding
from utils.errors import RunError, Stopped
from utils.evaluation import Ranks
from utils.flags import Runtime, Training
from utils.processes import Signals
from utils.run import Run

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
LEAST_STEPS = 240  # minimum length of training unless num_epochs or max_steps is given: see Plan
LEAST_EVALUATIONS, LEAST_INTERVAL = 5, 10
PATIENCE_FROM = 500
WARM = 3  # steps; by then kernels are compiled and memory is there
RANK_STRIDE = 1_000_003  # the seeds of the processes' dropout are this far apart

LossFn = Callable[[np.ndarray], dict[str, Tensor]]
RanksOf = Callable[..., Ranks]


class Samples(Protocol):
    """What `fit` needs to know of the training samples."""

    def counts(self) -> np.ndarray:
        """Number of targets of each sample, int64 [n]."""

    def users(self, indices: np.ndarray) -> list[str]:
        """The users' names of some samples, for messages."""


class Fitted(NamedTuple):
    """Optimizer steps, step and validation MRR of the best checkpoint, seconds of training."""

    steps: int
    best_step: int
    best_mrr: float
    seconds: float


class Plan(NamedTuple):
    """The length of training, and the values that follow for flags that were not given.

    total: optimizer steps. per_epoch: optimizer steps per epoch. warmup: steps of warm-up.
    eval_every, save_every: steps between evaluations and between writing last/.
    patience_from: patience counts from this step on.
    """

    total: int
    per_epoch: int
    warmup: int
    eval_every: int
    save_every: int
    patience_from: int

    @classmethod
    def of(cls, n_samples: int, training: Training, runtime: Runtime) -> "Plan":
        """Few samples make few steps. Unless the flags are given, training takes at least
        LEAST_STEPS steps, warm-up is a tenth of them at most, and there are at least
        LEAST_EVALUATIONS.
        """
        per_epoch = math.ceil(n_samples / training.batch_size)
        total = training.num_epochs * per_epoch
        if "num_epochs" not in training.given:
            total = max(total, LEAST_STEPS)
        if training.max_steps > 0:
            total = training.max_steps
        warmup = training.warmup_steps
        if "warmup_steps" not in training.given:
            warmup = min(warmup, total // 10)

        def interval(steps: int, given: bool) -> int:
            if given:
                return steps if steps > 0 else per_epoch
            if steps < 0:  # every epoch, but not every few steps
                return max(per_epoch, min(LEAST_INTERVAL, total))
            return max(min(LEAST_INTERVAL, total), min(steps, total // LEAST_EVALUATIONS))

        return cls(
            total,
            per_epoch,
            warmup,
            interval(training.eval_steps, "eval_steps" in training.given),
            interval(runtime.save_steps, "save_steps" in runtime.given),
            0 if "patience" in training.given else PATIENCE_FROM,
        )

    def __str__(self) -> str:
        epochs = f"{self.total / self.per_epoch:.4g} epochs of {self.per_epoch}"
        return (
            f"training: {self.total} steps ({epochs}), warm-up {self.warmup},"
            f" validation every {self.eval_every}"
        )


@dataclass
class Progress:
    """Where a run stands after an optimizer step.

    With tensors and random state it is all that resuming needs.

    waited: evaluations since the best one. running: values of the loss's parts since the last log
        line.
    """

    step: int = 0
    best_step: int = 0
    best_mrr: float = -math.inf
    waited: int = 0
    running: dict[str, list[float]] = field(default_factory=dict)


def fit(
    run: Run,
    module: nn.Module,
    loss_fn: LossFn,
    samples: Samples,
    ranks_of: RanksOf,
    training: Training,
    runtime: Runtime,
    *,
    bf16: bool,
    meta: dict[str, Any],
) -> Fitted:
    """Train what in `module` requires a gradient.

    Leaves best/ (highest validation MRR) and last/ in the run's folder.

    A resumed run continues from its newest checkpoint as if it had not been interrupted. SIGTERM or
    SIGINT let the optimizer step finish, save last/ and end the run.

    Args:
        loss_fn: sample indices [b] -> parts of the mean loss over the batch's targets, their
            weighted sum under "total".
        ranks_of: (split, at most so many batches) -> ranks. Two batches are evaluated before
            training, so that an error in evaluation costs seconds.
        meta: stored with every checkpoint.
    Raises:
        RunError: the loss, a gradient or a metric is not finite, or the disk is full.
        Stopped: a signal came.
    """
    # Dropout's stream starts here, whatever was drawn to build the models.
    torch.manual_seed(run.seed + RANK_STRIDE * processes.rank())
    device = next(module.parameters()).device
    counts = samples.counts()
    if run.older:  # it predates plans: every flag counts as given
        training, runtime = (group.all_given() for group in (training, runtime))
    state = _State(run, module, training, device, meta)
    state.plan = Plan.of(len(counts), training, runtime)
    micro_batch_size = runtime.micro_batch_size or training.batch_size // processes.world()
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def due(step: int, every: int) -> bool:
        return step == total or step % every == 0

    def out_of_patience() -> bool:
        waited = progress.waited if progress.step >= plan.patience_from else 0
        return 0 < training.patience <= waited

    module.eval()
    ranks_of("valid", 2)
    source = state.resume() if run.resume else None  # with the plan that it began with
    plan, total = state.plan, state.plan.total
    print(plan, flush=True)
    factor = _schedule(training.lr_scheduler, plan.warmup, total)
    progress = state.progress
    state.start_clock()
    module.train()
    if source == "best" and due(progress.step, plan.save_every):
        state.save("last")  # due at the same step; the run was killed before it was written
    took = [time.perf_counter()]
    bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True, mininterval=1.0)
    with bar, Signals() as signals:
        batches = _batches(len(counts), training.batch_size, total, run.seed)
        for indices in itertools.islice(batches, progress.step, None):
            if out_of_patience():
                tqdm.write(
                    f"stopped at step {progress.step}: {training.patience} evaluations"
                    " without a better validation MRR"
                )
                break
            step = progress.step + 1
            rate = state.set_rate(training.learning_rate * factor(step - 1))
            parts, stopping = _accumulate(
                loss_fn, indices, counts, micro_batch_size, autocast, state.parameters, signals
            )
            norm = state.clip(training.max_grad_norm)
            if not math.isfinite(parts["total"]) or not math.isfinite(norm):
                users = samples.users(indices[:5])
                raise RunError(_not_finite(step, parts, norm, indices, users, run))
            state.step()
            progress.step = step
            for name, value in parts.items():
                progress.running.setdefault(name, []).append(value)
            bar.update()
            if len(took) <= WARM:
                took.append(time.perf_counter())
                _report_slow_first_step(np.diff(took))
            if step % runtime.log_steps == 0 or step == total:
                means = {name: float(np.mean(values)) for name, values in progress.running.items()}
                progress.running = {}
                about = {"learning_rate": rate, "grad_norm": norm, "epoch": step / plan.per_epoch}
                run.log.add("train", step, means | about)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if due(step, plan.eval_every):
                state.stop_clock()
                module.eval()
                if _evaluate(ranks_of, progress, run):
                    state.save("best")
                module.train()
                state.start_clock()
            stopping = stopping or (signals.received if processes.world() == 1 else 0)
            ends = stopping or out_of_patience()
            if ends or due(step, plan.save_every):
                state.save("last")
            if stopping:
                raise Stopped(
                    stopping,
                    f"step {step} is done and {run.folder / 'last'} saved;"
                    " the same command resumes from there",
                )
        late = max(processes.gather(signals.received))
        if late:
            raise Stopped(
                late,
                f"training is done and saved in {run.folder};"
                " the same command continues with the evaluation",
            )
    processes.barrier()  # the last checkpoint is there for all
    state.stop_clock()
    return Fitted(progress.step, progress.best_step, progress.best_mrr, state.seconds)


class _State:
    """What a checkpoint holds: model, optimizer, random generators and progress. LEAVE ALONE."""

    def __init__(
        self, run: Run, module: nn.Module, training: Training, device: torch.device, meta: dict
    ) -> None:
        self.run, self.module, self.device, self.meta = run, module, device, meta
        self.progress = Progress()
        self.plan: Plan | None = None
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self.seconds = 0.0  # trained, without evaluation
        self._started: float | None = None

    def start_clock(self) -> None:
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self._started
        self._started = None

    def set_rate(self, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def clip(self, max_norm: float) -> float:
        """The gradients' norm before they are clipped to `max_norm`; 0 only measures it."""
        limit = max_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        return float(sharding.whole(norm))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, name: str) -> None:
        """Write best/ or last/.

        Raises:
            RunError: a weight is not finite, or the disk is full.
        """
        weights = self._gathered(checkpoint.trained_tensors(self.module))
        broken = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
        if broken:
            raise RunError(
                f"step {self.progress.step}: the weights {', '.join(broken[:3])} are not finite"
                f" any more; {_kept(self.run)}; lower --learning_rate"
            )
        state = {}
        for parameter, p in self.trained.items():
            if p in self.optimizer.state:
                state |= {f"{key}/{parameter}": self.optimizer.state[p][key] for key in ADAM}
        state = self._gathered(state)
        generators = processes.gather(_generators(self.device))
        if not processes.is_first():
            return
        for rank, states in enumerate(generators):
            state |= {f"{key}.{rank}": value for key, value in states.items()}
        progress = self.progress
        meta = self.meta | {"step": progress.step, "best_step": progress.best_step}
        meta["progress"] = vars(progress)
        meta["plan"] = self.plan._asdict()
        checkpoint.save(self.run.folder / name, weights, meta, state)
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        self.run.log.write_seconds(self.seconds + running)

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, in the first process only; every process must call this."""
        kept = {}
        for name, tensor in tensors.items():
            tensor = sharding.whole(tensor)
            if processes.is_first():
                kept[name] = tensor.cpu()
        return kept

    def resume(self) -> str:
        """Restore the newest good checkpoint, and the log; returns the checkpoint's name."""
        folder = self.run.folder
        found, notes = checkpoint.newest(folder)
        for note in notes:
            tqdm.write(f"skipped: {note}")
        checkpoint.restore(self.module, found.tensors, folder / found.name)
        for name, p in self.trained.items():
            saved = {key: found.state.get(f"{key}/{name}") for key in ADAM}
            self.optimizer.state[p] = {
                key: sharding.like(p, value) for key, value in saved.items() if value is not None
            }
        self._restore_generators(found)
        step = found.meta["step"]
        self.run.log.cut(step)
        self.progress = Progress(**found.meta["progress"])
        if "plan" in found.meta:
            began = Plan(**found.meta["plan"])
            self.plan = began._replace(save_every=self.plan.save_every)  # a free flag
        self.seconds = self.run.log.seconds()
        tqdm.write(f"resuming from {folder / found.name}, step {step}")
        return found.name

    def _restore_generators(self, found: checkpoint.Saved) -> None:
        rank, world = processes.rank(), processes.world()
        mine = {key: found.state.get(f"{key}.{rank}") for key in _generators(self.device)}
        more_processes = f"generator/cpu.{world}" in found.state
        if more_processes or any(state is None for state in mine.values()):
            tqdm.write(
                "the run was saved by another number of processes or on another kind of device:"
                " dropout continues with new draws"
            )
            torch.manual_seed(found.meta["step"] * 7919 + rank)
            return
        torch.set_rng_state(mine["generator/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["generator/device"], self.device)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random generators."""
    states = {"generator/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator/device"] = torch.cuda.get_rng_state(device)
    return states


def _evaluate(ranks_of: RanksOf, progress: Progress, run: Run) -> bool:
    """Validate, and return whether the result is the best so far. A tie is not better.

    Raises:
        RunError: a score is not finite.
    """
    try:
        metrics = ranks_of("valid", None).metrics()
    except RunError as error:
        raise RunError(
            f"step {progress.step}, validation: {error}; the checkpoints that were there are kept"
        ) from None
    flat = {}
    for protocol, values in metrics.items():
        flat |= {f"{protocol}/{name}": value for name, value in values.items()}
    run.log.add("valid", progress.step, flat)
    mrr, hit_rate = metrics["sampled"]["MRR"], metrics["sampled"]["HR@10"]
    better = mrr > progress.best_mrr
    if better:
        progress.best_step, progress.best_mrr = progress.step, mrr
    progress.waited = 0 if better else progress.waited + 1
    tqdm.write(
        f"step {progress.step}: valid MRR {mrr:.4f} HR@10 {hit_rate:.4f}"
        f" (best {progress.best_mrr:.4f} at step {progress.best_step})"
    )
    return better


def _batches(n: int, batch_size: int, total: int, seed: int) -> Iterator[np.ndarray]:
    """`total` global batches of indices.

    Epoch e is the permutation drawn from (seed, e); its last batch may be short.
    """
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
    loss_fn: LossFn,
    indices: np.ndarray,
    counts: np.ndarray,
    micro_batch_size: int,
    autocast: contextlib.AbstractContextManager,
    parameters: list[Tensor],
    signals: Signals,
) -> tuple[dict[str, float], int]:
    """Gradients of the mean loss over the global batch's targets, micro-batch by micro-batch,
    summed over processes.

    Returns:
        The loss's parts, and the number of a signal that came to any process (0 for none).
    """
    targets = counts[indices].sum()
    shares = np.array_split(indices, processes.world())
    mine = shares[processes.rank()]
    parts: dict[str, Tensor] = {}
    for i in range(0, len(shares[0]), micro_batch_size):  # the first share is the longest
        micro = mine[i : i + micro_batch_size]
        share = float(counts[micro].sum() / targets)
        if not len(micro):  # a sharded model needs every process: run one sample with weight 0
            micro = indices[:1]
        with autocast:
            losses = loss_fn(micro)
        (losses["total"] * share).backward()
        for name, value in losses.items():
            parts[name] = parts.get(name, 0.0) + value.detach() * share
    values = torch.stack([value.double() for value in parts.values()])
    if processes.world() == 1:
        return dict(zip(parts, values.tolist())), signals.received
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    # gradients of a sharded model were already summed in the backward pass
    processes.sum_in_place([p.grad for p in parameters if not sharding.is_divided(p.grad)])
    signalled = values.new_tensor([float(signals.received > 0)])
    values = torch.cat([values, signalled])
    processes.sum_in_place([values])
    *means, any_signal = values.tolist()
    stopping = max(processes.gather(signals.received)) if any_signal else 0
    return dict(zip(parts, means)), stopping


def _report_slow_first_step(seconds: np.ndarray) -> None:
    """Report the time of the first step if it is over 5 s longer than a later step's."""
    if len(seconds) == WARM and seconds[0] > seconds[-1] + 5:
        tqdm.write(f"the first step took {seconds[0]:.0f} s, a step now {seconds[-1]:.2f} s")


def _schedule(kind: str, warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at an optimizer step, counted from 0.

    Linear warm-up, then cosine or linear to zero, or constant. The first step has 1 / warmup of the
    rate, where the schedule of transformers has 0.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if kind == "constant":
            return 1.0
        left = 1.0 - min(1.0, (step - warmup) / max(1, total - warmup))
        return left if kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))

    return factor


def _not_finite(
    step: int, parts: dict[str, float], norm: float, indices: np.ndarray, users: list[str], run: Run
) -> str:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    return (
        f"step {step}: the loss or a gradient is not finite ({shown}, gradient norm {norm:.4g};"
        f" batch of {len(indices)} samples {', '.join(map(str, indices[:5]))}, ..."
        f" of users {', '.join(users)}, ...); {_kept(run)};"
        " lower --learning_rate or lengthen --warmup_steps"
    )


def _kept(run: Run) -> str:
    kept = [str(run.folder / name) for name in ("best", "last") if (run.folder / name).is_dir()]
    return f"kept: {' and '.join(kept)}" if kept else "no checkpoint was written yet"
