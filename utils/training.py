"""One fit loop for every stage: accumulation, clipping, evaluation, best checkpoint, patience."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import processes, sharding
from engine.errors import RunError, Stopped
from engine.log import SPEED, peak_mib
from engine.processes import Signals
from engine.run import Run
from engine.state import Progress, State, kept
from utils.evaluation import Ranks, evaluate
from utils.flags import Runtime, Training

LEAST_STEPS = 240  # minimum length of training unless num_epochs or max_steps is given: see Plan
LEAST_EVALUATIONS, LEAST_INTERVAL = 5, 10
PATIENCE_FROM = 500
SELECTED = {"sampled_mrr": "MRR", "full_ndcg10": "full NDCG@10"}
SIGNAL = "signal"  # among a step's values
RANK_STRIDE = 1_000_003  # the seeds of the processes' dropout are this far apart

LossFn = Callable[[Any], dict[str, Tensor]]  # a batch -> the loss's parts, and "total"


class Plan(NamedTuple):
    """The length of training, and the values that follow for flags that were not given.

    total: optimizer steps. per_epoch: optimizer steps per epoch. warmup: steps of warm-up.
    eval_every, save_every: steps between evaluations and between writing last/.
    patience: evaluations without a better one before the end, which is not before step
        patience_from; 0 for no end.
    """

    total: int
    per_epoch: int
    warmup: int
    eval_every: int
    save_every: int
    patience_from: int
    patience: int = 0

    @classmethod
    def of(cls, n_samples: int, training: Training, runtime: Runtime) -> "Plan":
        """Few samples make few steps. Unless the flags are given, training takes at least
        LEAST_STEPS steps, warm-up is a tenth of them at most, and there are at least
        LEAST_EVALUATIONS.
        """
        usual = training.usual
        per_epoch = math.ceil(n_samples / training.batch_size)
        if training.max_steps > 0:
            total = training.max_steps
        elif training.num_epochs is not None:
            total = training.num_epochs * per_epoch
        else:
            total = max(usual["num_epochs"] * per_epoch, LEAST_STEPS)
        warmup, patience = training.warmup_steps, training.patience
        if warmup is None:
            warmup = min(usual["warmup_steps"], total // 10)

        def interval(steps: int | None) -> int:
            if steps is not None:
                return steps if steps > 0 else per_epoch
            if usual["eval_steps"] < 0:  # every epoch, but not every few steps
                return max(per_epoch, min(LEAST_INTERVAL, total))
            most = min(usual["eval_steps"], total // LEAST_EVALUATIONS)
            return max(min(LEAST_INTERVAL, total), most)

        return cls(
            total,
            per_epoch,
            warmup,
            interval(training.eval_steps),
            interval(runtime.save_steps),
            PATIENCE_FROM if patience is None else 0,
            usual["patience"] if patience is None else patience,
        )

    def __str__(self) -> str:
        epochs = f"{self.total / self.per_epoch:.4g} epochs, {self.per_epoch} steps each"
        waits = self.patience > 0 and self.patience_from < self.total
        patience = f", patience {self.patience} from step {self.patience_from}" * waits
        return (
            f"training: {self.total} steps ({epochs}), warm-up {self.warmup},"
            f" validation every {self.eval_every}{patience}"
        )

    def ends(self, progress: Progress) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= progress.waited and progress.step >= self.patience_from


def fit(
    run: Run,
    trained: nn.Module,
    loss_fn: LossFn,
    model: Any,
    data: Any,
    training: Training,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train what in `trained` requires a gradient.

    Leaves best/ (by the validation metric of --select) and last/ in the run's folder. A resumed run
    continues from its newest checkpoint as if it had not been interrupted. SIGTERM or SIGINT let
    the optimizer step finish, save last/ and end the run.

    Args:
        loss_fn: a batch of samples -> parts of the mean loss over the batch's targets, their
            weighted sum under "total".
        model: what is validated. Two batches are evaluated before training, so that an error in
            evaluation costs seconds.
        data: samples and splits (datasets.inputs.RunData).
    Returns:
        steps, best_step and train_seconds, for results.json; and "valid", the validation ranks of
        best/, None where it was written before the run was resumed.
    Raises:
        RunError: the loss, a gradient or a metric is not finite, or the disk is full.
        Stopped: a signal came.
    """
    # Dropout's stream starts here, whatever was drawn to build the models.
    torch.manual_seed(run.seed + RANK_STRIDE * processes.rank())
    samples, valid = data.samples, data.splits["valid"]
    counts = samples.counts()
    plan = Plan.of(len(counts), training, runtime)
    state = State(run, trained, training.learning_rate, training.weight_decay, plan)
    micro_batch_size = runtime.micro_batch_size or training.batch_size // processes.world()
    autocast = torch.autocast(state.device.type, torch.bfloat16, enabled=run.bf16)

    trained.eval()
    best_ranks = None  # of best/, on validation
    evaluate(model, valid, runtime, limit=2)
    source = state.resume() if run.resume else None  # with the plan that it began with
    plan, progress = state.plan, state.progress
    print(f"{plan}, targets {training.train_targets}")

    def due(step: int, every: int) -> bool:
        return step == plan.total or step % every == 0

    state.start_clock()
    trained.train()
    if source == "best" and due(progress.step, plan.save_every):
        state.save("last")  # due at the same step; the run was killed before it was written
    users, since = 0, state.spent()  # since the last line of the log
    options = {"unit": "step", "dynamic_ncols": True, "mininterval": 1.0}
    bar = tqdm(total=plan.total, initial=progress.step, **options)
    with bar, Signals() as signals:
        late = _Late(run, samples, progress, signals)
        batches = _batches(len(counts), training.batch_size, run.seed)
        for indices in itertools.islice(batches, progress.step, plan.total):
            if plan.ends(progress):
                tqdm.write(
                    f"stopped at step {progress.step}: {progress.waited} evaluations"
                    f" without a better validation {SELECTED[training.select]}"
                )
                break
            step = progress.step + 1
            rate = training.learning_rate * _factor(training.lr_scheduler, plan, step - 1)
            state.optimizer.param_groups[0]["lr"] = rate
            values = _accumulate(
                loss_fn, step, indices, samples, counts, micro_batch_size, autocast, state, signals
            )
            values["grad_norm"] = state.clip(training.max_grad_norm)
            late.add(step, indices, values)
            users += len(indices)
            state.step(torch.isfinite(values["total"] + values["grad_norm"]))
            progress.step = step
            logs = due(step, runtime.log_steps)
            late.read(logs or due(step, plan.eval_every) or due(step, plan.save_every))
            bar.update()
            if logs:
                means = {name: float(np.mean(found)) for name, found in progress.running.items()}
                progress.running = {}
                more = {"learning_rate": rate, "grad_norm": late.norm}
                more["epoch"] = step / plan.per_epoch
                spent = state.spent()
                speed = (round(users / (spent - since), 1), round(peak_mib(state.device), 1))
                users, since = 0, spent
                run.log.add("train", step, means | more | dict(zip(SPEED, speed)))
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            if due(step, plan.eval_every):
                state.stop_clock()
                trained.eval()
                ranks = _validate(model, valid, runtime, training.select, progress, run)
                if progress.best_step == step:
                    best_ranks = ranks
                    state.save("best")
                trained.train()
                state.start_clock()
            stopping = signals.received if processes.world() == 1 else late.signal
            if stopping or plan.ends(progress) or due(step, plan.save_every):
                late.read(everything=True)
                state.save("last")
            if stopping:
                processes.barrier()  # torchrun ends the writing process once another one is gone
                raise Stopped(
                    stopping,
                    f"step {step} is done and {run.folder / 'last'} saved;"
                    " the same command resumes from there",
                )
        received = max(processes.gather(signals.received))
        if received:
            raise Stopped(
                received,
                f"training is done and saved in {run.folder};"
                " the same command continues with the evaluation",
            )
    processes.barrier()  # the last checkpoint is there for all
    state.stop_clock()
    done = {"steps": progress.step, "best_step": progress.best_step, "plan": plan._asdict()}
    return done | {"valid": best_ranks, "train_seconds": round(state.seconds, 3)}


def _validate(
    model: Any, valid: Any, runtime: Runtime, select: str, progress: Progress, run: Run
) -> Ranks:
    """Validate, and note in `progress` whether it is the best so far. A tie is not better."""
    try:
        ranks = evaluate(model, valid, runtime)
    except RunError as error:
        raise RunError(
            f"step {progress.step}, validation: {error}; the checkpoints that were there are kept"
        ) from None
    metrics = ranks.metrics()
    flat = {f"{p}/{name}": v for p, values in metrics.items() for name, v in values.items()}
    run.log.add("valid", progress.step, flat)
    mrr, hit_rate = metrics["sampled"]["MRR"], metrics["sampled"]["HR@10"]
    score = mrr if select == "sampled_mrr" else metrics["full"]["NDCG@10"]
    better = score > progress.best_mrr
    if better:
        progress.best_step, progress.best_mrr = progress.step, score
    progress.waited = 0 if better else progress.waited + 1
    tqdm.write(
        f"step {progress.step}: valid MRR {mrr:.4f} HR@10 {hit_rate:.4f}"
        + f" full NDCG@10 {score:.4f}" * (select != "sampled_mrr")
        + f" (best {progress.best_mrr:.4f} at step {progress.best_step})"
    )
    return ranks


def _batches(n: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Global batches without end; epoch e is the permutation drawn from (seed, e)."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(n)
        yield from np.split(order, range(batch_size, n, batch_size))


def _accumulate(
    loss_fn: LossFn,
    step: int,
    indices: np.ndarray,
    samples: Any,
    counts: np.ndarray,
    micro_batch_size: int,
    autocast: torch.autocast,
    state: State,
    signals: Signals,
) -> dict[str, Tensor]:
    """Gradients of the mean loss over the global batch's targets, micro-batch by micro-batch,
    summed over processes.

    Returns:
        The loss's parts, scalars on the device; of several processes also SIGNAL, how many of them
        a signal reached.
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
            losses = loss_fn(samples.batch(micro, state.device, step))
        (losses["total"] * share).backward()
        for name, value in losses.items():
            parts[name] = parts.get(name, 0.0) + value.detach() * share
    if processes.world() == 1:
        return parts
    for p in state.parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    # gradients of a sharded model were already summed in the backward pass
    processes.sum_in_place([p.grad for p in state.parameters if not sharding.is_divided(p.grad)])
    parts[SIGNAL] = torch.full_like(parts["total"], float(signals.received > 0))
    summed = torch.stack([value.double() for value in parts.values()])
    processes.sum_in_place([summed])
    return dict(zip(parts, summed))


class _Late:
    """The steps' losses and gradient norms, read one step late: the CPU does not wait for a GPU.

    Attributes:
        norm: of the last step that was read.
        signal: the number of a signal that came to any process; 0 for none, or for one process.
    """

    def __init__(self, run: Run, samples: Any, progress: Progress, signals: Signals) -> None:
        self.run, self.samples, self.progress, self.signals = run, samples, progress, signals
        self.norm, self.signal = 0.0, 0
        self.unread: list[tuple] = []

    def add(self, step: int, indices: np.ndarray, values: dict[str, Tensor]) -> None:
        """Start the copy of a step's values to the CPU."""
        found, copied = torch.stack([value.double() for value in values.values()]), None
        if found.device.type == "cuda":
            pinned = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            found, copied = pinned.copy_(found, non_blocking=True), torch.cuda.Event()
            copied.record()
        self.unread.append((step, indices, [*values], found, copied))

    def read(self, everything: bool) -> None:
        """Note all steps but the last one in `progress`, or all. Raises RunError: a value is not
        finite. The optimizer has left that step out.
        """
        pending = self.unread if everything else self.unread[:-1]
        self.unread = self.unread[len(pending) :]
        for step, indices, names, values, copied in pending:
            if copied is not None:
                copied.synchronize()
            parts = dict(zip(names, values.tolist()))
            self.norm, signalled = parts.pop("grad_norm"), parts.pop(SIGNAL, 0.0)
            if not math.isfinite(parts["total"]) or not math.isfinite(self.norm):
                shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
                users = ", ".join(self.samples.users(indices[:5]))
                raise RunError(
                    f"step {step}: the loss or a gradient is not finite ({shown}, gradient norm"
                    f" {self.norm:.4g}; batch of {len(indices)} samples"
                    f" {', '.join(map(str, indices[:5]))}, ... of users {users}, ...);"
                    f" {kept(self.run)}; lower --learning_rate or lengthen --warmup_steps"
                )
            for name, value in parts.items():
                self.progress.running.setdefault(name, []).append(value)
            if signalled:
                self.signal = max(processes.gather(self.signals.received))


def _factor(kind: str, plan: Plan, step: int) -> float:
    """Factor of the learning rate at an optimizer step, counted from 0.

    Linear warm-up, then cosine or linear to zero, or constant. The first step has 1 / warmup of the
    rate, where the schedule of transformers has 0.
    """
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    if kind == "constant":
        return 1.0
    left = 1.0 - min(1.0, (step - plan.warmup) / max(1, plan.total - plan.warmup))
    return left if kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
