"""Checkpoints: a folder of safetensors plus JSON, complete or absent, verified when read.

Written under a temporary name with a manifest (sha256 of each file) last, flushed to disk and renamed into place, so a
run that dies at any instant leaves the old checkpoint or the new one, never half of one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.cli import UsageError
from utils.runlog import file_sha256, read_json

WEIGHTS, META, MANIFEST = "weights.safetensors", "meta.json", "manifest.json"


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What was trained, by name: the parameters that require a gradient."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def save(folder: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` as the checkpoint `folder`, replacing the one that is there.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint stays.
    """
    from safetensors.torch import save as serialise

    folder = Path(folder)
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = {
            WEIGHTS: serialise({name: t.detach().cpu().contiguous() for name, t in tensors.items()}),
            META: (json.dumps(meta, indent=2) + "\n").encode(),
        }
        files[MANIFEST] = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}).encode()
        for name, data in files.items():
            with open(partial / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`; the old folder steps aside first, since a rename cannot replace a full folder."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def _present(folder: str | Path) -> Path:
    """The folder, or the old checkpoint beside it where a run died between the two renames."""
    folder = Path(folder)
    old = folder.with_name(f".old-{folder.name}")
    return old if not folder.exists() and old.exists() else folder


def weights_sha256(folder: str | Path) -> str | None:
    """Hash of a checkpoint's weights, verified where they are there, by the manifest alone where they were taken away.

    Returns:
        None where there is no manifest either.
    Raises:
        UsageError: the weights are not those of the manifest.
    """
    folder = _present(folder)
    if not (folder / MANIFEST).is_file():
        return None
    expected = read_json(folder / MANIFEST, "checkpoint").get(WEIGHTS)
    if (folder / WEIGHTS).is_file() and file_sha256(folder / WEIGHTS) != expected:
        raise UsageError(f"checkpoint {folder}: {WEIGHTS} does not match its sha256; it was cut short or altered")
    return expected


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        UsageError: the folder is missing, or a file is missing, cut short or altered.
    """
    from safetensors.torch import load as deserialise

    folder = _present(folder)
    if not folder.is_dir():
        raise UsageError(f"checkpoint not found: {folder}")
    contents = {}
    for name in (MANIFEST, WEIGHTS, META):
        if not (folder / name).is_file():
            raise UsageError(f"checkpoint {folder} is incomplete: {name} is missing")
        contents[name] = (folder / name).read_bytes()
    try:
        manifest = json.loads(contents[MANIFEST])
    except ValueError:
        raise UsageError(f"checkpoint {folder}: {MANIFEST} is damaged") from None
    for name in (WEIGHTS, META):
        if manifest.get(name) != hashlib.sha256(contents[name]).hexdigest():
            raise UsageError(f"checkpoint {folder}: {name} does not match its sha256; it was cut short or altered")
    return deserialise(contents[WEIGHTS]), json.loads(contents[META])


@torch.no_grad()
def restore(module: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into the trained parameters of `module`; the two sets must be the same.

    Raises:
        UsageError: names or shapes differ, with the first differences.
    """
    own = trained_tensors(module)
    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has {name}, which the model has not" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise UsageError(f"checkpoint {source} does not fit the model: {'; '.join(problems[:3])} ({len(problems)} differences)")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
