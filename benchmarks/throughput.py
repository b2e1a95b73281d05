"""Ours beside the plain form, part by part, in one run: alternating, medians of the pairs' ratios.

    python -m benchmarks.throughput                    # lengths of the demo domain, base tiny
    python -m benchmarks.throughput --data_path data/amazon2014_beauty.csv.xz --base_model small

Every pair has the same weights and the same batches. The plain form is benchmarks/plain.py: the
padded Hugging Face forward with peft, and full logits. A training step is loss + backward + clip +
AdamW. In a row "A against B" both are of this code. Writes throughput.json and throughput.md.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, plain
from benchmarks.measure import DIM, training_step
from datasets import sequences
from datasets.domain import Domain
from datasets.interactions import Interactions
from datasets.prompts import read_template, tokenise
from distill import StudentLoss, loss_parts
from engine import cli, processes, tensor_cache
from engine.cli import PositiveInt, flag
from engine.files import check_writable, markdown
from models.base import open_base
from models.catalogue import catalogue_cross_entropy
from models.llm4rec import LLM4Rec
from models.losses import Output
from models.sasrec import SASRec
from models.selection import block_map
from utils.flags import Data, SASRecModel


class Race(NamedTuple):
    """Median seconds of both, and the median of the pairwise ratios plain / ours."""

    ours: float
    plain: float
    ratio: float


class Bench:
    """What the rows share: the domain, the models' shape, batches of real lengths, and the rows.

    Attributes:
        n_teacher, n_student: layers. n_blocks: of the distillation row.
        batches: sample indices of every timed batch, int64 [repeats + 1, B]; the first warms up.
    """

    def __init__(
        self,
        data: Interactions,
        shape: measure.Shape,
        batch_size: int,
        repeats: int,
        n_teacher: int,
        n_student: int,
        n_blocks: int,
    ) -> None:
        self.n_teacher, self.n_student, self.n_blocks = n_teacher, n_student, n_blocks
        self.data, self.shape, self.device = data, shape, shape.item_table.device
        self.samples = sequences.training_samples(data, "last", shape.slots)
        self.batches = self.draw(batch_size, repeats + 1)
        self.rows: list[dict[str, Any]] = []

    def draw(self, batch_size: int, n: int) -> list[np.ndarray]:
        rng, size = np.random.default_rng(0), min(batch_size, len(self.samples))
        return [rng.choice(len(self.samples), size, replace=False) for _ in range(n)]

    def race(self, ours: Callable, theirs: Callable, inputs: list | None = None) -> Race:
        """Run both on every input in turn; the first pair warms up and does not count."""
        pairs = []
        for given in self.batches if inputs is None else inputs:
            runs = (lambda: ours(given)), (lambda: theirs(given))
            pairs.append([measure.seconds(run, self.device) for run in runs])
        fast, slow = np.array(pairs[1:]).T
        return Race(float(np.median(fast)), float(np.median(slow)), float(np.median(slow / fast)))

    def add(self, name: str, unit: str, timed: Race, per: float = 1.0, **more: Any) -> None:
        """A row; `per` turns seconds into the unit: units a call for a rate, else a factor."""
        rate = unit.endswith("/s")
        ours, theirs = ((per / t if rate else per * t) for t in (timed.ours, timed.plain))
        row = {"row": name, "unit": unit, "ours": ours, "plain": theirs, "ratio": timed.ratio}
        self.rows.append(row | more)
        print(f"{name:58s} {ours:12.2f} {theirs:12.2f} {unit:8s} {timed.ratio:7.2f} x")

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Histories on the CPU, where ours packs them, and targets on the device."""
        return self.samples.histories(rows), self.samples.targets(rows).to(self.device)

    def step(self, model: LLM4Rec, bf16: bool = False) -> Callable[..., None]:
        """Ours with cross-entropy alone."""

        def loss(rows):
            history, target = self.batch(rows)
            return catalogue_cross_entropy(model(history).user, model.item_table, target)

        return training_step(model, loss, bf16)


# -- the LLM ------------------------------------------------------------------------------------


def steps(bench: Bench) -> None:
    """Training steps with cross-entropy alone, LoRA and full."""
    for who, n_layers, strategy in (
        ("teacher", bench.n_teacher, "lora"),
        ("student", bench.n_student, "lora"),
        ("student", bench.n_student, "full"),
    ):
        ours, theirs = bench.shape.twins(n_layers, strategy)

        def plain_loss(rows):
            history, target = bench.batch(rows)
            return plain.plain_loss(theirs(history), None, theirs.item_table, target)

        timed = bench.race(bench.step(ours), training_step(theirs, plain_loss))
        name = f"{who} train step, {n_layers} layers, {strategy}"
        bench.add(name, "ms", timed, 1e3)


def precision(bench: Bench) -> None:
    """A student's step in bfloat16, compiled, and both, beside float32 as it is."""
    n_student = bench.n_student
    as_it_is = bench.step(bench.shape.model(n_student, "full"))
    for name, bf16, compiled in (
        ("bf16", True, False),
        ("compiled", False, True),
        ("bf16 and compiled", True, True),
    ):
        step = bench.step(bench.shape.model(n_student, "full", compiled=compiled), bf16)
        spent = measure.seconds(lambda: step(bench.batches[0]), bench.device)
        timed = bench.race(step, as_it_is)
        row = f"student train step, {n_student} layers, full: {name} against float32"
        bench.add(row, "ms", timed, 1e3, first_step_seconds=spent)


def distillation(bench: Bench) -> None:
    """A student's whole step, its teacher cached, then live, against a plain live teacher."""
    n_teacher, n_student, n_blocks = bench.n_teacher, bench.n_student, bench.n_blocks
    teacher, plain_teacher = bench.shape.twins(n_teacher, "lora", n_blocks=n_blocks)
    student, plain_student = bench.shape.twins(n_student, "lora", n_blocks=n_blocks, exits=True)
    encode = teacher.requires_grad_(False).encoder()
    plain_teacher.requires_grad_(False).eval()

    def loss(rows, teacher_output):
        history, target = bench.batch(rows)
        outputs = student(history), teacher_output(rows, history), None
        return loss_parts(*outputs, student.item_table, target, StudentLoss())["total"]

    def plain_loss(rows):
        history, target = bench.batch(rows)
        with torch.no_grad():
            output = plain_teacher(history)
        return plain.plain_loss(plain_student(history), output, plain_student.item_table, target)

    plain_step = training_step(plain_student, plain_loss)
    step = functools.partial(training_step, student)
    every = np.unique(np.concatenate(bench.batches))
    part = some_of(bench.samples, np.arange(min(len(bench.samples), 4096)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = Path(folder), {"part": True}, lambda: encode, part, 512
        fill = measure.seconds(lambda: tensor_cache.open_or_build(*arguments), bench.device)
        fill *= len(bench.samples) / len(part)
        timed_samples = some_of(bench.samples, every)
        cached = tensor_cache.open_or_build(Path(folder), {}, lambda: encode, timed_samples, 512)

        def from_disk(rows, _):
            return Output(**cached.rows(np.searchsorted(every, rows), bench.device))

        timed = bench.race(step(lambda rows: loss(rows, from_disk)), plain_step)
    live = bench.race(step(lambda rows: loss(rows, lambda _, history: encode(history))), plain_step)
    first = timed.ours + fill * len(bench.batches[0]) / len(bench.samples)
    first_epoch = Race(first, timed.plain, timed.plain / first)
    name = f"distill step {n_student} <- {n_teacher}"
    bench.add(f"{name}, cached teacher", "ms", timed, 1e3)
    bench.add(f"{name}, in the epoch that fills the cache", "ms", first_epoch, 1e3)
    bench.add(f"{name}, live teacher", "ms", live, 1e3)


def some_of(samples: sequences.Samples, indices: np.ndarray) -> sequences.Samples:
    """These samples alone."""
    end, length = samples.end[indices], samples.length[indices]
    return dataclasses.replace(samples, end=end, length=length)


def inference(bench: Bench) -> None:
    n_student = bench.n_student
    ours, theirs = bench.shape.twins(n_student, "lora")
    encode = ours.user_encoder()
    theirs.eval()

    @torch.no_grad()
    def plain_encode(rows):
        return theirs(bench.batch(rows)[0]).user

    timed = bench.race(lambda rows: encode(bench.batch(rows)[0]), plain_encode)
    bench.add(f"inference, {n_student} layers", "users/s", timed, len(bench.batches[0]))


# -- SASRec -------------------------------------------------------------------------------------


def sasrec(bench: Bench, batch_size: int = 256) -> None:
    """Step 1 at its defaults, every position a target. An epoch: its steps times the median."""
    batches = bench.draw(batch_size, len(bench.batches))
    for hid_dim in (32, DIM):
        torch.manual_seed(0)
        shape = SASRecModel(hid_dim=hid_dim, emb_dim=DIM).values()
        ours, theirs = (
            SASRec(bench.data.n_items, bench.shape.slots, **shape).to(bench.device)
            for _ in range(2)
        )

        def loss(rows, plain_form=False):
            history, targets = bench.samples.histories(rows), bench.samples.shifted_targets(rows)
            real = targets != bench.data.n_items
            target = targets[real].to(bench.device)
            if not plain_form:
                return catalogue_cross_entropy(ours.states(history), ours.item_table, target)
            states = theirs.padded_states(history.to(bench.device))[real.to(bench.device)]
            return F.cross_entropy(states @ theirs.item_table.T, target)

        plain_step = training_step(theirs, lambda rows: loss(rows, plain_form=True))
        timed = bench.race(training_step(ours, loss), plain_step, batches)
        name = f"SASRec epoch, width {hid_dim}, full catalogue"
        bench.add(name, "s", timed, len(bench.samples) / batch_size)


ROWS = {
    "steps": steps,
    "precision": precision,
    "distill": distillation,
    "inference": inference,
    "sasrec": sasrec,
}


def table(bench: Bench) -> str:
    """The rows as a Markdown table."""
    head = ["row", "unit", "ours", "plain", "ratio"]
    lines = []
    for row in bench.rows:
        digits = [2 if row[name] < 100 else 0 for name in ("ours", "plain")]
        cells = [row["row"], row["unit"], f"{row['ours']:,.{digits[0]}f}"]
        lines.append([*cells, f"{row['plain']:,.{digits[1]}f}", f"{row['ratio']:.2f}x"])
    return markdown(head, lines)


@cli.command
def main(
    *,
    data: Data,
    base_model: str = flag("tiny", "the LLaMA's shape and tokenizer; its weights are random here"),
    teacher_layers: PositiveInt = flag(8, "layers of the teacher"),
    student_layers: PositiveInt = flag(4, "layers of the student"),
    distill_block: PositiveInt = flag(4, "blocks of the distillation row"),
    batch_size: PositiveInt = flag(128, "users per step"),
    max_seq_length: PositiveInt = flag(30, "item slots of the padded layout"),
    repeats: PositiveInt = flag(7, "timed pairs per row, after one that warms up"),
    rows: list[str] = flag(["all"], f"all, or some of {', '.join(ROWS)}"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
    output_dir: str = flag("output/benchmarks", "where throughput.json and throughput.md go"),
) -> dict:
    """Race ours against the plain form and print the table.

    Sequence lengths and the catalogue are the domain's.
    """
    rows = [*ROWS] if rows == ["all"] else rows
    unknown = [name for name in rows if name not in ROWS]
    cli.check(
        (not unknown, f"--rows={','.join(unknown)}: expected all, or some of {', '.join(ROWS)}")
    )
    block_map(student_layers, teacher_layers, distill_block if "distill" in rows else 1)
    folder = Path(output_dir)
    check_writable(folder, "--output_dir")
    interactions, csv = Domain.of(data).read()
    device = processes.choose_device(device)
    base = open_base(base_model)
    torch.manual_seed(0)
    items = nn.Embedding(interactions.n_items, DIM).weight.detach().mul_(0.1).to(device)
    ids = tokenise(read_template("alpaca"), base.location)
    shape = measure.Shape(base.config, *ids, items, max_seq_length)
    sizes = batch_size, repeats, teacher_layers, student_layers, distill_block
    bench = Bench(interactions, shape, *sizes)
    about = measure.machine(device) | {
        "base_model": base_model,
        "batch_size": len(bench.batches[0]),
        "repeats": repeats,
        "data": str(csv),
    }
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'':58s} {'ours':>12s} {'plain':>12s} {'':8s} {'ratio':>7s}")
    for name in rows:
        ROWS[name](bench)
    result = about | {"rows": bench.rows}
    measure.write_report(folder, "throughput", result, table(bench))
    return result


if __name__ == "__main__":
    cli.run(main)
