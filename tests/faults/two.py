"""What the tests of several processes run under torchrun: two.py NAME ..., see NAME below."""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  the path is set first
import torch  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from engine import cli, processes  # noqa: E402
from engine.folder import take  # noqa: E402
from engine.run import Run  # noqa: E402
from engine.state import State  # noqa: E402
from models.losses import exit_supervision, next_item, weighted_sum  # noqa: E402
from tests.conftest import exact_norm, histories, small_model  # noqa: E402
from utils import training  # noqa: E402
from utils.evaluation import Ranks  # noqa: E402
from utils.flags import Runtime, Training  # noqa: E402


def float64(folder: str, strategy: str, shard: str = "", ends_in: str = "0") -> None:
    """Twenty steps of a small double-precision LLM4Rec without dropout; the last batch is uneven.

    Args:
        shard: not empty, to divide the model among the processes.
        ends_in: the optimizer step in which every process ends; 0 for none.
    """
    processes.start("cpu")
    modeling_llama.LlamaRMSNorm.forward = exact_norm
    model = small_model(strategy=strategy, gradient_checkpointing=bool(shard))
    model.move(torch.device("cpu"), bool(shard))
    in_step(int(ends_in), lambda: os._exit(0))
    batch, target = histories([1 + i % 8 for i in range(21)]), torch.arange(21) % 23

    def loss_fn(rows: np.ndarray) -> dict:
        out, table = model(batch[rows]), model.item_table
        exits = exit_supervision(out.exits, table, target[rows], "sum")
        ce = next_item(out.user, table, target[rows])
        return weighted_sum({"ce": (1.0, ce), "exits": (0.5, exits)})

    flags = {"batch_size": 8, "max_steps": 20, "learning_rate": 0.01, "warmup_steps": 2}
    settings = Training(**flags, eval_steps=10, seed=1)
    runtime = Runtime(micro_batch_size=2, save_steps=10, log_steps=1)
    run = open_run(folder, settings, runtime)
    samples = SimpleNamespace(
        counts=lambda: np.ones(21, int),
        users=lambda rows: [],
        batch=lambda rows, device, step: rows,
    )
    data = SimpleNamespace(samples=samples, splits={"valid": None})
    ranks = Ranks(*(np.array([2]),) * 3)
    setattr(training, "evaluate", lambda *_, **__: (model.encoder()(batch), ranks)[1])  # noqa: B010
    training.fit(run, model, loss_fn, model, data, settings, runtime)


def open_run(folder: str, settings: Training, runtime: Runtime) -> Run:
    inputs = SimpleNamespace(hashes={}, check=lambda *_: None, kept={})
    run = Run.open("test", Path(folder), (settings, runtime), inputs)
    run.prepare()
    processes.barrier()
    if processes.is_first():
        take(run.folder, run.overwrite, run.resume)
    run._begin()
    return run


def saved(folder: str, shard: str = "") -> None:
    """last/ of a small model before any step. Prints how many numbers this process holds."""
    processes.start("cpu")
    model = small_model(strategy="lora").move(torch.device("cpu"), bool(shard))
    parts = [p.to_local() if shard else p for p in model.parameters()]
    os.write(1, f"{sum(part.numel() for part in parts)}\n".encode())  # in one piece
    settings, runtime = Training(seed=1), Runtime()
    run = open_run(folder, settings, runtime)
    torch.manual_seed(1)
    State(run, model, 1e-3, 0.0, training.Plan.of(21, settings, runtime)).save("last")
    processes.barrier()


def in_step(n: int, action: Callable[[], None]) -> None:
    """Let the n-th optimizer step begin with an action."""
    step, taken = torch.optim.AdamW.step, []

    def acts(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == n:
            action()
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = acts


def dying(script: str, *flags: str) -> None:
    """The script, whose second process is killed in its third step."""

    def dies() -> None:
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    in_step(3, dies)
    cli.run(importlib.import_module(script).main, list(flags))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # as cli.run does
    {"float64": float64, "saved": saved, "dying": dying}[sys.argv[1]](*sys.argv[2:])
    if processes.world() > 1:
        os._exit(0)  # as cli.run does, and for its reason
