"""What a checkpoint holds: model, optimizer, random generators and progress."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, processes, sharding
from engine.errors import RunError
from engine.folder import drop_replaced
from engine.run import Run

FROM_FLAGS = ("save_every", "patience")  # of the plan: taken from the command, not the checkpoint
ADAM = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


@dataclass
class Progress:
    """Where a run stands after an optimizer step.

    With tensors and random state it is all that resuming needs.

    best_mrr: the validation metric of best/, whichever it is. waited: evaluations since the best
        one. running: values of the loss's parts since the last log line.
    """

    step: int = 0
    best_step: int = 0
    best_mrr: float = -math.inf
    waited: int = 0
    running: dict[str, list[float]] = field(default_factory=dict)


class State:
    """Model, AdamW and progress of a run, and the seconds it trained, without evaluation.

    Args:
        module: what is trained in it requires a gradient.
        plan: stored with every checkpoint; a resumed run continues with the one it began with.
    """

    def __init__(
        self, run: Run, module: nn.Module, learning_rate: float, weight_decay: float, plan: Any
    ) -> None:
        self.run, self.module, self.plan = run, module, plan
        self.progress = Progress()
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.device = next(module.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        self.seconds = 0.0
        self._began: float | None = None  # would be, without the pauses

    def start_clock(self) -> None:
        self._began = time.perf_counter() - self.seconds

    def stop_clock(self) -> None:
        self.seconds = self.spent()
        self._began = None

    def spent(self) -> float:
        """Seconds trained so far."""
        return self.seconds if self._began is None else time.perf_counter() - self._began

    def clip(self, max_norm: float) -> Tensor:
        """The gradients' norm before they are clipped to `max_norm`; 0 only measures it."""
        limit = max_norm or math.inf
        return sharding.whole(nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True))

    def step(self, finite: Tensor) -> None:
        """Take a step, but leave everything as it is where `finite`, a scalar on the device, is
        False: the optimizer looks at it there, and the CPU does not wait.
        """
        if not any(map(sharding.is_divided, self.parameters)):
            self.optimizer.found_inf = (~finite).float()
        elif not finite:
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, name: str) -> None:
        """Write best/ or last/. Raises RunError: a weight is not finite, or the disk is full."""
        weights = self._gathered(checkpoint.trained_tensors(self.module))
        broken = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
        if broken:
            raise RunError(
                f"step {self.progress.step}: the weights {', '.join(broken[:3])} are not finite"
                f" any more; {kept(self.run)}; lower --learning_rate"
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
        meta = {"step": progress.step, "best_step": progress.best_step, "progress": vars(progress)}
        meta["plan"] = self.plan._asdict()
        checkpoint.save(self.run.folder / name, weights, meta, state)
        drop_replaced(self.run.folder)
        self.run.log.write_seconds(self.spent())

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, in the first process only; every process must call this."""
        whole = {}
        for name, tensor in tensors.items():
            tensor = sharding.whole(tensor)
            if processes.is_first():
                whole[name] = tensor.cpu().contiguous()
        return whole

    def resume(self) -> str:
        """Restore the newest good checkpoint, and the log; returns the checkpoint's name."""
        folder = self.run.folder
        found = checkpoint.newest(folder)
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
        now = {name: getattr(self.plan, name) for name in FROM_FLAGS}
        self.plan = type(self.plan)(**found.meta["plan"])._replace(**now)
        self.seconds = self.run.log.seconds()
        print(f"resuming from {folder / found.name}, step {step}")
        return found.name

    def _restore_generators(self, found: checkpoint.Saved) -> None:
        rank, world = processes.rank(), processes.world()
        mine = {key: found.state.get(f"{key}.{rank}") for key in _generators(self.device)}
        more_processes = f"generator/cpu.{world}" in found.state
        if more_processes or any(state is None for state in mine.values()):
            print(
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


def kept(run: Run) -> str:
    """Which checkpoints a run that fails leaves, for messages."""
    there = [str(run.folder / name) for name in ("best", "last") if (run.folder / name).is_dir()]
    return f"kept: {' and '.join(there)}" if there else "no checkpoint was written yet"
