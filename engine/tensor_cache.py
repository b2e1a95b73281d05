"""Tensors computed once for every sample and kept as memory-mapped files.

A frozen model's outputs on the training samples never change. They are written in the model's
compute dtype, row = index of the sample, into a folder named by a fingerprint of all they depend
on, and read again in later epochs and runs. A folder is complete or absent: written under a
temporary name, meta.json last, then renamed.

Legend: n samples.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import files, processes
from engine.errors import UsageError
from engine.files import read_json

FORMAT = 2  # raised when what is stored, or how it is computed, changes its meaning
WINDOW = 32  # batches sorted by length together while filling; rows stay near each other
ZEROS = 2**24  # bytes written at once to claim room
FLAG = "--teacher_cache"


class TensorCache(dict[str, Tensor]):
    """Each stored tensor [n, ...] by name, mapped from its file."""

    def rows(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """The tensors' rows of the given samples, on the device."""
        index = torch.as_tensor(indices)
        return {name: tensor[index].to(device) for name, tensor in self.items()}


def open_or_build(
    root: Path,
    identity: dict[str, Any],
    load_encoder: Callable[[], Callable[[Tensor], Any]],
    samples: Any,
    batch_size: int,
    divided: bool = False,
) -> TensorCache:
    """The tensors below `root` that belong to `identity`.

    Where there are none, or they are damaged, they are computed.

    Args:
        identity: all that the tensors depend on, as JSON.
        load_encoder: called only if the tensors must be computed. Gives history [b, L] -> a named
            tuple of tensors [b, ...]; what is None is not stored.
        samples: whose histories are encoded (datasets.sequences.Samples).
        divided: the encoder is divided among the processes (see engine.sharding); all run it then,
            and the first one writes.
    Raises:
        UsageError: the disk lacks room, or `root` cannot be written.
    """
    identity = identity | {"format": FORMAT}
    folder = root / _digest(identity)[:16]
    first = processes.is_first()
    only_reads = folder.exists() and not os.access(root, os.W_OK)
    locks = first and not only_reads
    if locks:
        _lock(root)
    try:
        needed, *_ = processes.gather(first and _are_needed(folder, identity, len(samples)))
        if needed and first:
            _build(folder, identity, load_encoder(), samples, batch_size)
        elif needed and divided:
            encode = load_encoder()
            for indices in _batches(samples.lengths(), batch_size):
                encode(samples.histories(indices))
    finally:
        if locks:
            files.release_lock(root)
    processes.barrier()
    found = TensorCache()
    for name, about in read_json(folder / "meta.json", "teacher states")["arrays"].items():
        found[name] = _map(folder / f"{name}.bin", getattr(torch, about["dtype"]), about["shape"])
    return found


def _are_needed(folder: Path, identity: dict[str, Any], n_samples: int) -> bool:
    """Whether the tensors must be computed. Prints where they are read from, or why not."""
    root = folder.parent
    for partial in root.glob(".tmp-*"):  # nobody else fills while the lock is held
        shutil.rmtree(partial, ignore_errors=True)
    if _is_whole(folder, identity, n_samples):
        print(f"teacher states: read from {folder}; the teacher is not loaded")
        return False
    again = f"{folder} is not whole; computing them again"
    once = f"none in {root} for this teacher and these samples; computing them once"
    print(f"teacher states: {again if folder.exists() else once}")
    return True


def _is_whole(folder: Path, identity: dict[str, Any], n: int) -> bool:
    """Whether the files in `folder` are those of this identity, all and of full length."""
    try:
        meta = read_json(folder / "meta.json", "teacher states")
        sizes = [
            (folder / f"{name}.bin").stat().st_size - _size(about)
            for name, about in meta["arrays"].items()
        ]
    except (UsageError, OSError, KeyError):
        return False
    return meta["identity"] == identity and meta["samples"] == n and not any(sizes)


def _size(about: dict[str, Any]) -> int:
    """Bytes of a stored tensor."""
    return math.prod(about["shape"]) * getattr(torch, about["dtype"]).itemsize


def _lock(root: Path) -> None:
    """Take the lock on `root`, waiting for another run that computes its states."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not files.take_lock(root):
            print(f"teacher states: another run is at work in {root}, waiting")
            files.take_lock(root, timeout=-1)
    except OSError as error:
        raise UsageError(
            f"{FLAG}: {root} cannot be written ({error.strerror}); name a folder, or use off"
        ) from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: torch.dtype, shape: list[int], write: bool = False) -> Tensor:
    """A tensor that lies in a file."""
    size = math.prod(shape)
    return torch.from_file(str(path), shared=write, size=size, dtype=dtype).view(shape)


def _claim(path: Path, size: int) -> None:
    """Reserve disk space: a disk that fills up under a memory map kills the process silently."""
    with open(path, "wb") as file:
        for start in range(0, size, ZEROS):
            file.write(bytes(min(ZEROS, size - start)))


def _build(
    folder: Path, identity: dict[str, Any], encode: Callable, samples: Any, batch_size: int
) -> None:
    """Run the encoder over all samples and put the result in place."""
    batches = _batches(samples.lengths(), batch_size)
    first = values = encode(samples.histories(batches[0]))
    kept = {name: part for name, part in first._asdict().items() if part is not None}
    sizes = {n: len(samples) * part[0].numel() * part.element_size() for n, part in kept.items()}
    needed, free = sum(sizes.values()) / 2**30, shutil.disk_usage(folder.parent).free / 2**30
    print(f"teacher states: {len(samples):,} samples, {needed:.2f} GiB to {folder}")
    if needed > free:
        raise UsageError(
            f"{FLAG}: {folder.parent} has {free:.2f} GiB free, the teacher's states need"
            f" {needed:.2f} GiB; name a folder on a larger disk, or use off (the teacher then runs"
            " in every step)"
        )
    with files.making(folder) as partial:
        arrays = {}
        for name, part in kept.items():
            path, shape = partial / f"{name}.bin", [len(samples), *part.shape[1:]]
            _claim(path, sizes[name])
            arrays[name] = _map(path, part.dtype, shape, write=True)
        options = {"unit": "batch", "dynamic_ncols": True, "mininterval": 1.0}
        for i, indices in enumerate(tqdm(batches, desc="teacher states", **options)):
            if i:
                values = encode(samples.histories(indices))
            index = torch.from_numpy(indices)
            for name, array in arrays.items():
                array[index] = getattr(values, name).cpu()
        stored = {}
        for name, array in arrays.items():
            stored[name] = {
                "dtype": str(array.dtype).removeprefix("torch."),
                "shape": list(array.shape),
            }
        meta = {"identity": identity, "samples": len(samples), "arrays": stored}
        files.write_json(partial / "meta.json", meta)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _batches(length: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All samples, in batches of similar length. Stretches of WINDOW batches stay in file order."""
    stretch = WINDOW * batch_size
    stretches = np.split(np.arange(len(length)), range(stretch, len(length), stretch))
    ordered = [part[np.argsort(length[part], kind="stable")] for part in stretches]
    every = np.concatenate(ordered)
    return np.split(every, range(batch_size, len(every), batch_size))
