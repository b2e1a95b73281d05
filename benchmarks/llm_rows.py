"""Rows of benchmarks/throughput.py: training steps, distillation and inference."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure, plain
from benchmarks.bench import DIM, Bench
from benchmarks.measure import Race, training_step
from datasets import sequences, teacher_states
from models.catalogue import catalogue_cross_entropy
from models.losses import Output, Scores, recommendation_loss
from utils.flags import DistillationLoss


def steps(bench: Bench, teacher_layers: int, student_layers: int) -> None:
    """Training steps with cross-entropy alone, LoRA and full."""
    for who, n_layers, strategy in (
        ("teacher", teacher_layers, "lora"),
        ("student", student_layers, "lora"),
        ("student", student_layers, "full"),
    ):
        ours, theirs = bench.shape.twins(n_layers, strategy)

        def plain_loss(rows):
            history, target = bench.batch(rows)
            return plain.plain_loss(theirs(history), None, theirs.item_table, target)

        timed = bench.race(bench.step(ours), training_step(theirs, plain_loss))
        bench.add(
            f"{who} train step, {n_layers} layers, {strategy}",
            "ms",
            timed,
            1e3,
            bench.operations(n_layers, strategy),
            llm=True,
        )


def preparation(bench: Bench, n_layers: int) -> None:
    """Making a batch, histories and layout, beside the whole step over it: the most that doing it
    in the background could save.
    """
    model = bench.shape.model(n_layers, "full")

    timed = bench.race(lambda rows: model.pack(bench.batch(rows)[0]), bench.step(model))
    bench.add("making a batch against a student's step over it", "ms", timed, 1e3, llm=True)


def sasrec_kl(bench: Bench, n_layers: int) -> None:
    """What SASRec's KL adds to a student's step; "plain" is the same step without it."""
    model = bench.shape.model(n_layers, "lora")
    size, table = (len(bench.batches[0]), DIM), model.item_table
    users = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(bench.device)

    def loss(rows, weight):
        history, target = bench.batch(rows)
        sasrec = Scores(users[: len(rows)], table)
        given = DistillationLoss(sasrec_lambda=weight)
        parts = recommendation_loss(model(history), None, table, target, given, sasrec=sasrec)
        return parts["total"]

    step = functools.partial(training_step, model)
    timed = bench.race(step(lambda rows: loss(rows, 3.0)), step(lambda rows: loss(rows, 0.0)))
    bench.add("student train step, with SASRec's KL against without", "ms", timed, 1e3, llm=True)


def precision(bench: Bench, n_layers: int) -> None:
    """A student's step in bfloat16, and with torch's own choice of float32 products, beside the
    step as a run takes it.
    """
    model = bench.shape.model(n_layers, "full")
    chosen = torch.get_float32_matmul_precision()

    in_float32, in_bf16 = (bench.step(model, bf16) for bf16 in (False, True))

    def by_torch(rows):
        torch.set_float32_matmul_precision("highest")
        in_float32(rows)
        torch.set_float32_matmul_precision(chosen)

    name = f"student train step, {n_layers} layers, full"
    timed = bench.race(in_bf16, in_float32)
    bench.add(f"{name}, bf16 against float32", "ms", timed, 1e3, llm=True)
    timed = bench.race(in_float32, by_torch)
    bench.add(f"{name}, products as chosen against torch's", "ms", timed, 1e3, llm=True)


def compiled(bench: Bench, n_layers: int) -> None:
    """A student's step with `--compile` beside the step without; compiling is timed apart."""
    models = [bench.shape.model(n_layers, "full", compiled=c) for c in (True, False)]

    steps = [bench.step(model) for model in models]
    spent = measure.seconds(lambda: steps[0](bench.batches[0]), bench.device)
    timed = bench.race(*steps)
    name = (
        f"student train step, {n_layers} layers, full, compiled against not (after {spent:.0f} s)"
    )
    bench.add(name, "ms", timed, 1e3, llm=True, compile_seconds=spent)


def layouts(bench: Bench, n_layers: int) -> None:
    """Packed tokens against buckets of like length, where every user of a bucket is computed as if
    as long as its longest.
    """
    model = bench.shape.model(n_layers, "lora")

    def loss(rows, n_buckets):
        history, target = bench.batch(rows)
        if n_buckets:
            length = torch.from_numpy(bench.samples.lengths()[rows])
            for bucket in length.argsort().chunk(n_buckets):
                longest = int(length[bucket].max())
                # padding becomes an item
                history[bucket, -longest:] = history[bucket, -longest:].clamp(
                    max=bench.data.n_items - 1
                )
        return catalogue_cross_entropy(model(history).user, model.item_table, target)

    step = functools.partial(training_step, model)
    for n_buckets in (4, 8):
        timed = bench.race(
            step(lambda rows: loss(rows, 0)), step(lambda rows: loss(rows, n_buckets))
        )
        bench.add(
            f"student train step, packed against {n_buckets} buckets", "ms", timed, 1e3, llm=True
        )


def distillation(bench: Bench, teacher_layers: int, student_layers: int, n_blocks: int) -> None:
    """A student's step with every part of the loss: the teacher cached, then live, against a plain
    live teacher and student.
    """
    teacher, plain_teacher = bench.shape.twins(teacher_layers, "lora", n_blocks=n_blocks)
    student, plain_student = bench.shape.twins(
        student_layers, "lora", n_blocks=n_blocks, exits=True
    )
    encode = teacher.requires_grad_(False).encoder()
    plain_teacher.requires_grad_(False).eval()

    def loss(rows, teacher_output):
        history, target = bench.batch(rows)
        outputs = student(history), teacher_output(rows, history)
        loss = recommendation_loss(*outputs, student.item_table, target, DistillationLoss())
        return loss["total"]

    def plain_loss(rows):
        history, target = bench.batch(rows)
        with torch.no_grad():
            teacher = plain_teacher(history)
        return plain.plain_loss(plain_student(history), teacher, plain_student.item_table, target)

    plain_step = training_step(plain_student, plain_loss)
    own = (
        bench.operations(student_layers, "lora")
        + 2 * 2 * (n_blocks - 1) * len(bench.batches[0]) * bench.shape.item_table.numel()
    )
    with tempfile.TemporaryDirectory() as folder:
        fill = fill_seconds(bench, encode, Path(folder))
        cached = states_of_batches(bench, encode, Path(folder))
        timed = bench.race(
            training_step(student, lambda rows: loss(rows, lambda r, h: Output(*cached(r)))),
            plain_step,
        )
    per_epoch = len(bench.samples) / len(bench.batches[0])
    live = bench.race(
        training_step(student, lambda rows: loss(rows, lambda r, h: encode(h))), plain_step
    )
    first_epoch = Race(
        timed.ours + fill / per_epoch, timed.plain, timed.plain / (timed.ours + fill / per_epoch)
    )
    saved = live.ours - timed.ours
    break_even = fill / per_epoch / saved if saved > 0 else float("inf")
    name = f"distill step {student_layers} <- {teacher_layers}"
    bench.add(f"{name}, cached teacher", "ms", timed, 1e3, own, llm=True)
    filled = f"{name}, first epoch and the pass that fills the cache"
    filled += f" (breaks even after {break_even:.1f})"
    bench.add(
        filled, "ms", first_epoch, 1e3, llm=True, break_even_epochs=break_even, fill_seconds=fill
    )
    bench.add(
        f"{name}, live teacher",
        "ms",
        live,
        1e3,
        own + bench.operations(teacher_layers, "lora", training=False),
        llm=True,
    )


def fill_seconds(bench: Bench, encode, folder: Path) -> float:
    """Seconds that the teacher's pass over all samples takes, from a part of them."""
    part = some_of(bench.samples, np.arange(min(len(bench.samples), 4096)))
    arguments = folder, {"part": True}, lambda: encode, part, 512
    timed = measure.seconds(lambda: teacher_states.open_or_build(*arguments), bench.device)
    return timed * len(bench.samples) / len(part)


def some_of(samples: sequences.Samples, indices: np.ndarray) -> sequences.Samples:
    """These samples alone."""
    end, length = samples.end[indices], samples.length[indices]
    return dataclasses.replace(samples, end=end, length=length)


def states_of_batches(bench: Bench, encode, folder: Path):
    """A cache over the samples of the timed batches alone; sample indices -> tensors, through the
    memory-mapped files.
    """
    every = np.unique(np.concatenate(bench.batches))
    part = some_of(bench.samples, every)
    states = teacher_states.open_or_build(folder, {"batches": True}, lambda: encode, part, 512)
    return lambda rows: states.rows(np.searchsorted(every, rows), bench.device)


def inference(bench: Bench, n_layers: int) -> None:
    ours, theirs = bench.shape.twins(n_layers, "lora")
    encode = ours.user_encoder()
    theirs.eval()

    @torch.no_grad()
    def plain_encode(rows):
        return theirs(bench.batch(rows)[0]).user

    timed = bench.race(lambda rows: encode(bench.batch(rows)[0]), plain_encode)
    bench.add(
        f"inference, {n_layers} layers",
        "users/s",
        timed,
        len(bench.batches[0]),
        bench.operations(n_layers, "lora", training=False),
        llm=True,
    )
