"""Several processes of one run, as torchrun starts them: each works on a part of the same global batch.

With one process every function here is the identity. Gradients are summed once a step over all processes after they have
been accumulated, so that a step is the same mathematics whatever the number of processes.
"""

import datetime
import os
from typing import Any

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first fills the teacher cache; torchrun ends a run whose process died
CHUNK = 2**25  # numbers summed at once


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """The one process that writes files and talks."""
    return rank() == 0


def start(device_type: str) -> None:
    """Join the other processes: gloo on CPU, nccl on CUDA."""
    import torch.distributed as dist

    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device_type == "cpu" else "nccl", timeout=PATIENCE)


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        gather(None)


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sum_in_place(tensors: list[Any]) -> None:
    """Replace each tensor by its sum over the processes; all processes give the same shapes."""
    if world() == 1:
        return
    import torch
    import torch.distributed as dist

    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same, size = [], 0
        for tensor in [t for t in tensors if t.dtype == dtype] + [None]:
            if same and (tensor is None or size + tensor.numel() > CHUNK):
                flat = torch.cat([t.reshape(-1) for t in same])
                dist.all_reduce(flat)
                for part, t in zip(flat.split([t.numel() for t in same]), same):
                    t.copy_(part.view_as(t))
                same, size = [], 0
            if tensor is not None:
                same.append(tensor)
                size += tensor.numel()
