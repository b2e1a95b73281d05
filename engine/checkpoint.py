"""Checkpoints: a folder of safetensors plus JSON, complete or absent, verified when read.

A checkpoint is written under a temporary name, with a manifest (sha256 of each file) last, flushed
to disk and renamed into place. A run that dies at any instant leaves the old checkpoint or the new
one, never half of one. torch is imported late: hashes are read before it is needed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import RunError, UsageError
from engine.files import file_sha256, making, read_json, replace_folder, replaced

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS, STATE = "weights.safetensors", "state.safetensors"
META, MANIFEST = "meta.json", "manifest.json"
NAMES = ("last", "best")


class Saved(NamedTuple):
    """A checkpoint to resume from; name is that of its folder, last or best."""

    name: str
    tensors: dict[str, "Tensor"]
    state: dict[str, "Tensor"]
    meta: dict[str, Any]


def trained_tensors(module: "nn.Module") -> dict[str, "Tensor"]:
    """Name -> value of the parameters that require a gradient."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def save(
    folder: str | Path,
    tensors: dict[str, "Tensor"],
    meta: dict[str, Any],
    state: dict[str, "Tensor"] | None = None,
) -> None:
    """Write the checkpoint `folder`, replacing the one that is there.

    Args:
        tensors: what was trained, on the CPU.
        meta: as JSON.
        state: what resuming needs beside the tensors (optimizer, random generators).
    Raises:
        RunError: the disk is full; the old checkpoint stays.
    """
    from safetensors.torch import save as serialise

    folder = Path(folder)
    contents = {WEIGHTS: serialise(tensors), META: (json.dumps(meta, indent=2) + "\n").encode()}
    if state is not None:
        contents[STATE] = serialise(state)
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents[MANIFEST] = json.dumps(manifest).encode()
    try:
        with making(folder) as partial:
            for name, data in contents.items():
                with open(partial / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            replace_folder(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        needed, free = sum(map(len, contents.values())), shutil.disk_usage(folder.parent).free
        kept = "the checkpoint that was there stays" if folder.exists() else "there was none before"
        raise RunError(
            f"{folder} cannot be written ({error.strerror}): {needed:,} bytes needed, {free:,}"
            f" free; {kept}; make room and start again with the same flags"
        ) from None


def _present(folder: str | Path) -> Path:
    """The folder, or the old checkpoint beside it where a run died between the two renames."""
    folder = Path(folder)
    old = replaced(folder)
    return old if not folder.exists() and old.exists() else folder


def weights_sha256(folder: str | Path) -> str | None:
    """Hash of a checkpoint's weights: verified, or read from the manifest if the file was removed.

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
        raise UsageError(_altered(folder, WEIGHTS))
    return expected


def load(folder: str | Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Trained tensors and meta of a checkpoint, after both files are checked against the manifest.
    Raises UsageError: the folder is missing, or a file is missing, cut short or altered.
    """
    return _read(folder, WEIGHTS, META)


def newest(run: str | Path) -> Saved:
    """The newest checkpoint of an unfinished run that verifies; each that does not is reported.
    Raises UsageError: there is no checkpoint to resume from, or the best one is lost and resuming
    would not reach its step again.
    """
    run, saved, notes = Path(run), {}, []
    for name in NAMES:
        if not _present(run / name).exists():
            continue
        try:
            saved[name] = Saved(name, *_read(run / name, WEIGHTS, STATE, META))
        except UsageError as problem:
            notes.append(str(problem))
    if not saved:
        problem = "; ".join(notes) or f"{run} has no checkpoint"
        raise UsageError(f"{problem}; nothing to resume from: --overwrite starts from scratch")
    found = max(saved.values(), key=lambda each: each.meta["step"])  # of equal ones the first, last
    claimed = _claimed_step(run / "best")
    # resuming repeats only the steps after the one that is found
    lost = "best" not in saved and (claimed is None or claimed <= found.meta["step"])
    if found.meta["best_step"] > 0 and lost:
        raise UsageError(
            f"{run / 'best'}: the best checkpoint is missing or damaged"
            f" ({'; '.join(notes) or 'missing'}); --overwrite starts from scratch"
        )
    for note in notes:
        print(f"skipped: {note}")
    return found


def _claimed_step(folder: Path) -> int | None:
    try:
        return read_json(_present(folder) / META, "checkpoint").get("step")
    except UsageError:
        return None


def _read(folder: str | Path, *names: str) -> tuple[Any, ...]:
    """The content of the named files, each of which is as its manifest says."""
    from safetensors.torch import load as deserialise

    folder = _present(folder)
    if not folder.is_dir():
        raise UsageError(f"checkpoint not found: {folder}")
    manifest, contents = read_json(folder / MANIFEST, "checkpoint"), {}
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"checkpoint {folder} is incomplete: {name} is missing")
        contents[name] = (folder / name).read_bytes()
        if manifest.get(name) != hashlib.sha256(contents[name]).hexdigest():
            raise UsageError(_altered(folder, name))
    reads = {".safetensors": deserialise, ".json": json.loads}
    return tuple(reads[Path(name).suffix](contents[name]) for name in names)


def _altered(folder: Path, name: str) -> str:
    return f"checkpoint {folder}: {name} does not match its sha256; it was cut short or altered"


def restore(module: "nn.Module", tensors: dict[str, "Tensor"], source: str | Path) -> None:
    """Copy `tensors` into the trained parameters of `module`. The two sets must be the same.

    Args:
        source: where the tensors are from, for messages.
    Raises:
        UsageError: names or shapes differ; the first differences are named.
    """
    import torch

    from engine import sharding

    sharding.divide_again(module)
    own = trained_tensors(module)
    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has {name}, which the model lacks" for name in tensors if name not in own]
    for name in own:
        if name in tensors and tensors[name].shape != own[name].shape:
            shapes = f"{list(tensors[name].shape)}, expected {list(own[name].shape)}"
            problems.append(f"{name} is {shapes}")
    if problems:
        raise UsageError(
            f"checkpoint {source} does not fit the model: {'; '.join(problems[:3])}"
            f" ({len(problems)} differences)"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(sharding.like(parameter, tensors[name]))


def refuse_other(
    spec: dict[str, Any], other: dict[str, Any], names: Iterable[str], theirs: str, own: str
) -> None:
    """Refuse a model to start from that is another in one of these entries.

    Args:
        theirs, own: what the message says before each value.
    """
    for name in names:
        if spec.get(name) != other.get(name):
            raise UsageError(f"{theirs} {name} {other.get(name)}, {own} {spec.get(name)}")
