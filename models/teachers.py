"""Where a teacher's output comes from: none, a frozen model (from disk, or live), one that is
trained beside the student, or SASRec.

A teacher is a function of a batch: its output for the batch's samples, or None. EDIT for another
kind.

Legend: B batch, L item slots, N items, D item width, E block ends.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import tensor_cache
from engine.errors import UsageError
from engine.run import Run
from models.base import open_base
from models.llm4rec import LLM4Rec, spec_ends
from models.losses import Output
from models.sasrec import SASRec
from utils.flags import Runtime

Teacher = Callable[[Any], Output | None]
HERE = Path(__file__).parent
# read, not imported: peft takes seconds
SHARED_CODE = [HERE / "packed.py", HERE.parent / "datasets" / "sequences.py"]
LLM_FILES = ("llm4rec", "decoder", "attention", "lora", "base", "catalogue")
LLM_CODE = [*SHARED_CODE, *(HERE / f"{name}.py" for name in LLM_FILES)]
SASREC_CODE = [*SHARED_CODE, HERE / "sasrec.py"]


def none(batch: Any) -> None:
    """No teacher."""


def online(teacher: LLM4Rec) -> Teacher:
    """A teacher that is trained beside the student, on the same histories."""
    return lambda batch: teacher(batch.history)


def exit_ends(spec: dict[str, Any]) -> list[int] | None:
    """The block ends of a trained teacher's exits; None where it has none."""
    return spec_ends(spec, len(spec["layers"])) if spec["exit_heads"] else None


def _frozen(
    load_encoder: Callable[[], Callable[[Tensor], Output]],
    samples: Any,
    cache: Path | None,
    identity: dict[str, Any],
    device: torch.device,
    batch_size: int,
    divided: bool = False,
) -> tuple[Teacher, float | None]:
    """A frozen model: its outputs from disk where they were computed once, else in every step.

    Args:
        load_encoder: gives history [b, L] -> Output; called only where something must be computed.
        samples: the training samples, with histories of the teacher's own length.
        cache: the folder of the outputs; None runs the model in every step.
        identity: all that the outputs depend on, as JSON.
        divided: see engine.tensor_cache.
    Returns:
        the teacher, and the seconds that the run waited for the outputs on disk.
    """
    if cache is None:
        encode = load_encoder()

        def live(batch: Any) -> Output:
            with torch.autocast(device.type, enabled=False):  # its own precision, as on disk
                return encode(samples.histories(batch.indices))

        return live, None
    started = time.perf_counter()
    given = cache, identity, load_encoder, samples, batch_size, divided
    stored = tensor_cache.open_or_build(*given)
    seconds = round(time.perf_counter() - started, 3)
    return lambda batch: Output(**stored.rows(batch.indices, device)), seconds


def offline(
    run: Run, ends: list[int], data: Any, cache: Path | None, student: Run, runtime: Runtime
) -> tuple[Teacher, float | None]:
    """A trained LLM teacher, and the seconds that the run waited for its states.

    Args:
        run: of step 3.
        ends: after how many of its layers its states are read.
        data: the student's data (datasets.inputs.RunData).
        student: its run, for the device and the precision.
    Raises:
        UsageError: the base is another one than the teacher was trained on.
    """
    open_base(run.flags["base_model"]).check_unchanged(run.config)

    def load_encoder() -> Callable[[Tensor], Output]:
        teacher = LLM4Rec.load(run, data.item_table, student.bf16)
        teacher.return_states_at(ends)
        return teacher.requires_grad_(False).move(student.device, runtime.shard).encoder()

    identity = {
        "weights_sha256": run.weights_sha256(),
        "base_sha256": run.config.get("base_sha256"),
        "bf16": student.bf16,
        "model": run.config["model"],
        "block_ends": ends,
        "code": _code(*LLM_CODE),
    }
    identity |= _of_samples(data.samples, data, student)
    given = load_encoder, data.samples, cache, identity, student.device
    return _frozen(*given, runtime.eval_batch_size, runtime.shard)


def sasrec(
    runs: list[Run], data: Any, cache: Path | None, student: Run, runtime: Runtime
) -> Teacher:
    """SASRec over its own item table; of several, the mean of their scores over the tables side by
    side.

    Args:
        runs: of step 1; none gives no teacher.
    Raises:
        UsageError: the item table is not made of their item embeddings.
    """
    if not runs:
        return none
    slots = max(run.flags["max_seq_length"] for run in runs)
    samples = dataclasses.replace(data.samples, max_seq_length=slots)

    def load_encoder() -> Callable[[Tensor], Output]:
        models = [SASRec.load(run).to(student.device) for run in runs]
        check_table([model.item_table.detach() for model in models], data.item_table, runs)
        encoders = [model.user_encoder() for model in models]

        @torch.no_grad()
        def encode(history: Tensor) -> Output:
            parts = []
            for encoder, model in zip(encoders, models):
                parts.append(encoder(history[:, -model.max_seq_length :]))
            user = torch.cat(parts, dim=1) / len(parts)
            exits = user.new_empty(len(user), 0, user.shape[1])
            return Output(user, exits[..., :0], exits)

        return encode

    sha256 = [run.weights_sha256() for run in runs]
    identity = {"sasrec_sha256": ",".join(sha256)} | _of_samples(samples, data, student)
    identity["code"] = _code(*SASREC_CODE)
    identity |= {"scores": "mean"} if runs[1:] else {}
    given = load_encoder, samples, cache, identity, student.device, runtime.eval_batch_size
    return _frozen(*given)[0]


def check_table(tables: list[Tensor], item_table: Tensor, runs: list[Run]) -> None:
    """Refuse an item table [N, sum of D_i] that is not made of these SASRecs' item embeddings [N,
    D_i]: a single one as it is, of several each divided by a number. Raises UsageError: the table
    is of other runs.
    """
    named = ",".join(str(run.folder) for run in runs)
    widths = [table.shape[1] for table in tables]
    same = sum(widths) == item_table.shape[1]
    parts = item_table.split(widths, dim=1) if same else []
    for table, part in zip(tables, parts):
        scale = float(table.double().norm() / part.double().norm()) if tables[1:] else 1.0
        near = 1e-6 * float(part.abs().max())
        same = same and torch.allclose(table / scale, part, rtol=1e-5, atol=near)
    if not same:
        raise UsageError(
            f"--sasrec={named}: their item embeddings are not the item table;"
            " name the run or the runs that the table is from"
        )


def _code(*paths: Path) -> str:
    """Hash of the files that compute the outputs: after an edit these are computed again."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _of_samples(samples: Any, data: Any, student: Run) -> dict[str, Any]:
    """What outputs depend on beside the model."""
    targets, slots = student.flags["train_targets"], samples.max_seq_length
    about = {"train_targets": targets, "max_seq_length": slots, "output": [*Output._fields]}
    return data.hashes | about
