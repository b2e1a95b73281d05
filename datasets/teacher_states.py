"""The frozen teacher's outputs on every training sample, computed once and kept as memory-mapped files.

An offline teacher is frozen and in evaluation mode, so what it says of a sample never changes: its states at the block
ends, its user vector and, where it has them, its exits' vectors. They are written in the teacher's compute dtype, row =
index of the training sample, into a folder named by a fingerprint of all they depend on, and reused over epochs, seeds
and weights of the loss. A folder is complete or absent: written under a temporary name, meta.json last, then renamed.

Legend: n training samples, E blocks, H LLM width, D item dim.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.sequences import Samples
from utils import distributed
from utils.cli import UsageError
from utils.runlog import file_sha256, read_json

NAMES = ("user", "states", "exits")  # the fields of models.losses.Output
STORED = {torch.float64: np.int64, torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}  # numpy has no bfloat16
FORMAT = 1  # goes up when what is stored, or how it is computed, changes its meaning
WINDOW = 32  # batches sorted by length together while filling; rows are written not far from each other


class TeacherStates(NamedTuple):
    """user [n, D], states [n, E, H], exits [n, E - 1 or 0, D], each a memory map of bits, and their dtypes."""

    arrays: list[np.ndarray]
    dtypes: list[torch.dtype]

    def rows(self, rows: np.ndarray, device: torch.device) -> list[Tensor]:
        """user, states and exits of the given samples, on the device."""
        return [torch.from_numpy(array[rows]).view(dtype).to(device) for array, dtype in zip(self.arrays, self.dtypes)]


def open_or_build(
    root: Path, identity: dict[str, Any], teacher: Callable[[], Callable[[Tensor], Any]], samples: Samples, batch_size: int,
    device: torch.device,
) -> TeacherStates:  # fmt: skip
    """The states below `root` that belong to `identity`; where there are none, or they are damaged, they are made.

    Args:
        identity: all that the states depend on, as JSON.
        teacher: loads the teacher; called only if the states must be made. history [b, L] -> (user, states, exits).
    Raises:
        UsageError: the disk lacks room, or `root` cannot be written.
    """
    identity = identity | {"format": FORMAT}
    folder = root / _digest(identity)[:16]
    if distributed.is_first():  # the others wait
        waiting = _alone(root)
        _sweep(root)
        problem = _problem(folder, identity, len(samples)) if folder.exists() else "absent"
        if problem == "absent":
            print(f"teacher states: none in {root} for this teacher and these samples; computing them once", flush=True)
        elif problem:
            print(f"teacher states: {folder} {problem}; computing them again", flush=True)
        else:
            print(f"teacher states: read from {folder}; the teacher is not loaded", flush=True)
        if problem:
            _build(folder, identity, teacher(), samples, batch_size, device)
        os.close(waiting)
    distributed.barrier()
    return _mapped(folder)


def _problem(folder: Path, identity: dict[str, Any], n: int) -> str:
    """Why the files in `folder` must not be used; empty where they may."""
    try:
        meta = read_json(folder / "meta.json", "teacher states")
    except UsageError:
        return "has no readable meta.json"
    if meta.pop("sha256", None) != _digest(meta):
        return "has a meta.json that was altered"
    if meta["identity"] != identity or meta["samples"] != n:
        return "belongs to another teacher or other samples"
    for name in NAMES:
        path = folder / f"{name}.bin"
        if not path.is_file():
            return f"lacks {path.name}"
        if file_sha256(path) != meta["arrays"][name]["sha256"]:
            return f"has a {path.name} that was cut short or altered"
    return ""


def _alone(root: Path) -> int:
    """Wait until no other run looks for its states, or fills them, below `root`; free again when the descriptor is closed.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"--teacher_cache: {root} cannot be written ({error.strerror}); name a folder, or use off") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"teacher states: another run is at work in {root}, waiting", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sweep(root: Path) -> None:
    """Remove what processes that died while filling left behind."""
    for partial in root.glob(".tmp-*"):
        try:
            os.kill(int(partial.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except (PermissionError, ValueError):
            continue


def _mapped(folder: Path) -> TeacherStates:
    about = read_json(folder / "meta.json", "teacher states")["arrays"]
    dtypes = [getattr(torch, about[name]["dtype"]) for name in NAMES]
    arrays = [_bits(folder / f"{name}.bin", dtype, about[name]["shape"], "r") for name, dtype in zip(NAMES, dtypes)]
    return TeacherStates(arrays, dtypes)


def _bits(path: Path, dtype: torch.dtype, shape: list[int], mode: str) -> np.ndarray:
    """A memory map of one array's bits; an array without elements has an empty file, which cannot be mapped."""
    if not np.prod(shape):
        path.touch()
        return np.empty(shape, STORED[dtype])
    if mode == "w+":  # claim the room now: a disk that fills up under a memory map kills the process without a word
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * dtype.itemsize)
        mode = "r+"
    return np.memmap(path, STORED[dtype], mode, shape=tuple(shape))


def _build(folder: Path, identity: dict[str, Any], encode: Callable, samples: Samples, batch_size: int, device: torch.device) -> None:
    """Run the teacher over all samples and put the result in place."""
    batches = _batches(samples.counts(), batch_size)
    first = values = encode(samples.histories(batches[0]).to(device))
    shapes = [[len(samples), *part.shape[1:]] for part in first]
    _check_room(folder, sum(int(np.prod(shape)) * part.element_size() for shape, part in zip(shapes, first)), shapes[1])
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        arrays = [_bits(partial / f"{name}.bin", part.dtype, shape, "w+") for name, part, shape in zip(NAMES, first, shapes)]
        for i, rows in enumerate(tqdm(batches, desc="teacher states", unit="batch", dynamic_ncols=True, mininterval=1.0)):
            if i:
                values = encode(samples.histories(rows).to(device))
            for array, part in zip(arrays, values):
                array[rows] = part.cpu().contiguous().view(getattr(torch, array.dtype.name)).numpy()
        about = {}
        for name, array, part in zip(NAMES, arrays, first):
            if isinstance(array, np.memmap):
                array.flush()
            digest = file_sha256(partial / f"{name}.bin")
            about[name] = {"dtype": str(part.dtype).removeprefix("torch."), "shape": list(array.shape), "sha256": digest}
        meta = {"identity": identity, "samples": len(samples), "arrays": about}
        with open(partial / "meta.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(meta | {"sha256": _digest(meta)}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(length: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All samples, in batches of like length; stretches of WINDOW batches stay in file order."""
    stretches = np.split(np.arange(len(length)), range(WINDOW * batch_size, len(length), WINDOW * batch_size))
    ordered = np.concatenate([part[np.argsort(length[part], kind="stable")] for part in stretches])
    return np.split(ordered, range(batch_size, len(ordered), batch_size))


def _check_room(folder: Path, needed: int, shape: list[int]) -> None:
    """Say how large the files will be; refuse where the disk lacks room or the folder cannot be made."""
    size = f"{shape[0]:,} samples x {shape[1]} blocks x {shape[2]}, {needed / 2**30:.2f} GiB"
    print(f"teacher states: {size} to {folder}", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise UsageError(f"--teacher_cache: {folder.parent} cannot be written ({error.strerror}); name a folder, or use off") from None
    if needed > free:
        raise UsageError(
            f"--teacher_cache: {folder.parent} has {free / 2**30:.2f} GiB free, the teacher's states need {needed / 2**30:.2f} GiB;"
            " name a folder on a larger disk, or use off (the teacher then runs in every step)"
        )
