"""Ours beside the plain form, part by part, in one run: alternating, medians of the pairs' ratios.

    python -m benchmarks.throughput                    # lengths of the demo domain, base tiny
    python -m benchmarks.throughput --data_path data/amazon2014_beauty.csv.xz --base_model small

Every pair has the same weights and the same batches. The plain form is benchmarks/plain.py: the
padded Hugging Face forward with peft, full logits, candidates by set difference, ranks by sorting,
reviews in pandas. A training step is loss + backward + clip + AdamW. The floor is what must be
computed (benchmarks/measure.py) over this machine's measured rate of large matrix products. Prints
one table and writes throughput.json and throughput.md into --output_dir.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, plain
from benchmarks.measure import Race, race, training_step
from datasets import process, sequences, teacher_states
from datasets.candidates import draw
from datasets.domain import Domain
from datasets.interactions import Interactions
from datasets.prompts import read_template, tokenise
from models import base
from models.catalogue import catalogue_cross_entropy
from models.llm4rec import LLM4Rec
from models.losses import Output, Scores, recommendation_loss
from models.sasrec import SASRec
from utils import cli, cpu, processes
from utils.evaluation import evaluate
from utils.files import check_writable
from utils.flags import Data, DistillationLoss, NonNegativeFloat, NonNegativeInt, PositiveInt, flag

DIM = 128
LARGE = 376_858  # items of the paper's largest domain


class Bench:
    """What the rows share: the domain, the models' shape, batches of real lengths, and the table
    that fills up.

    Args:
        batches: sample indices of every timed batch, int64 [repeats + 1, B]; the first warms up.
    """

    def __init__(
        self, data: Interactions, shape: measure.Shape, batch_size: int, repeats: int, rest: float
    ) -> None:
        self.data, self.shape, self.device, self.rest = data, shape, shape.item_table.device, rest
        self.samples = sequences.training_samples(data, "last", shape.slots)
        rng = np.random.default_rng(0)
        self.batches = [
            rng.choice(len(self.samples), batch_size, replace=False) for _ in range(repeats + 1)
        ]
        self.rate = measure.matrix_rate(self.device, torch.float32)
        self.rows: list[dict[str, Any]] = []

    def race(self, ours, theirs, inputs: list | None = None) -> Race:
        return race(
            ours, theirs, self.batches if inputs is None else inputs, self.device, self.rest
        )

    def add(
        self,
        name: str,
        unit: str,
        timed: Race,
        per: float = 1.0,
        operations: float | None = None,
        llm: bool = False,
        **more: Any,
    ) -> None:
        """A row; `per` turns seconds into the unit: units a call for a rate, 1 for seconds, 1000
        for milliseconds.

        Args:
            operations: that must be done, for the floor. llm: also tell prompt, response, lengths
                and tokens.
        """
        rate = unit.endswith("/s")
        ours, theirs = ((per / t if rate else per * t) for t in (timed.ours, timed.plain))
        row = {"row": name, "unit": unit, "ours": ours, "plain": theirs, "ratio": timed.ratio}
        if llm:
            lengths = [self.samples.lengths()[rows] for rows in self.batches[1:]]
            tokens = np.array([self.shape.tokens(n) for n in lengths])
            row |= {
                "prompt": len(self.shape.prompt_ids),
                "response": len(self.shape.response_ids),
                "tokens": float(tokens[:, 0].mean()),
                "mean_history": float(np.mean(np.concatenate(lengths))),
                "token_ratio": float((tokens[:, 1] / tokens[:, 0]).mean()),
            }
        if operations is not None:
            floor = operations / self.rate
            row |= {
                "gflop": operations / 1e9,
                "floor_ms": floor * 1e3,
                "of_matrix_rate": floor / timed.ours,
            }
        self.rows.append(row | more)
        print(f"{name:58s} {ours:12.2f} {theirs:12.2f} {unit:8s} {timed.ratio:7.2f} x", flush=True)

    def operations(self, n_layers: int, strategy: str, training: bool = True) -> float:
        """The mean of the timed batches."""
        each = [
            self.shape.operations(self.samples.lengths()[rows], n_layers, strategy, training)
            for rows in self.batches[1:]
        ]
        return float(np.mean(each))

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Histories on the CPU, where ours packs them, and targets on the device."""
        return self.samples.histories(rows), self.samples.targets(rows).to(self.device)

    def step(self, model: LLM4Rec, bf16: bool = False) -> Callable[..., None]:
        """Ours with cross-entropy alone."""

        def loss(rows):
            history, target = self.batch(rows)
            return catalogue_cross_entropy(model(history).user, model.item_table, target)

        return training_step(model, loss, bf16)


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
                history[bucket, -longest:] = history[bucket, -longest:].clamp(
                    max=bench.data.n_items - 1
                )  # padding becomes an item
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


def catalogue(bench: Bench, n_rows: int = 256) -> None:
    """Cross-entropy over the catalogue, forward and backward, time and peak memory beyond its
    inputs.
    """
    for n_items, trained in (
        (bench.data.n_items, False),
        (LARGE, False),
        (bench.data.n_items, True),
        (LARGE, True),
    ):
        users, table, target = cross_entropy_inputs(n_rows, n_items, trained, bench.device)
        again = range(len(bench.batches))
        timed = bench.race(
            lambda _: catalogue_cross_entropy(users, table, target).backward(),
            lambda _: plain_cross_entropy(users, table, target),
            again,
        )
        arguments = (n_rows, n_items, trained, bench.device.type)
        peaks = [
            measure.peak_memory(cross_entropy_peak, which, *arguments, device=bench.device) or 0
            for which in ("ours", "plain")
        ]
        own = table.numel() * 4 if trained else 0
        bench.add(
            f"catalogue CE, {n_rows} x {n_items:,} x {DIM}, {'trained' if trained else 'frozen'} "
            f"table",
            "ms",
            timed,
            1e3,
            peak_mib=peaks[0] / 2**20,
            plain_peak_mib=peaks[1] / 2**20,
            table_gradient_mib=own / 2**20,
            peak_share=(peaks[0] - own) / max(peaks[1], 1),
        )


def cross_entropy_inputs(
    n_rows: int, n_items: int, trained: bool, device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    users, table = (
        torch.randn(n_rows, DIM, generator=generator),
        torch.randn(n_items, DIM, generator=generator),
    )
    target = torch.randint(n_items, (n_rows,), generator=generator)
    return (
        users.to(device).requires_grad_(),
        table.mul_(0.1).to(device).requires_grad_(trained),
        target.to(device),
    )


def plain_cross_entropy(users: Tensor, table: Tensor, target: Tensor) -> None:
    F.cross_entropy(users @ table.T, target).backward()


def cross_entropy_peak(which: str, n_rows: int, n_items: int, trained: bool, device: str):
    """For measure.peak_memory: one forward and backward."""
    inputs = cross_entropy_inputs(n_rows, n_items, trained, device)
    return (
        functools.partial(plain_cross_entropy, *inputs)
        if which == "plain"
        else lambda: catalogue_cross_entropy(*inputs).backward()
    )


def candidates(bench: Bench, n_users: int = 512, n_plain: int = 16) -> None:
    rng = np.random.default_rng(0)
    lengths = np.resize(np.diff(bench.data.offsets), n_users)
    owner = np.repeat(np.arange(n_users), lengths)
    for n_items in (bench.data.n_items, LARGE):
        met = rng.integers(0, n_items, len(owner))
        pool, histories = (
            set(range(n_items)),
            [met[owner == user].tolist() for user in range(n_plain)],
        )
        k = min(999, n_items - int(lengths.max()))

        def plain_draw(_):
            return [plain.plain_candidates(pool, history, k) for history in histories]

        timed = bench.race(
            lambda _: draw((0, 1), np.arange(n_users), owner, met, n_items, k),
            plain_draw,
            range(len(bench.batches)),
        )
        per_user = Race(
            timed.ours / n_users, timed.plain / n_plain, timed.ratio * n_users / n_plain
        )
        bench.add(f"{k} candidates a user of {n_items:,} items", "users/s", per_user)


def ranking(bench: Bench, n_users: int = 128) -> None:
    """Sampled and full ranks by counting in tiles, against one score matrix that is sorted for the
    full rank alone.
    """
    for n_items in (bench.data.n_items, LARGE):
        users, table, target = (
            t.detach() for t in cross_entropy_inputs(n_users, n_items, False, bench.device)
        )
        seen = target[:, None].repeat(1, 6)
        negatives = torch.randint(n_items, (n_users, 999), device=bench.device)
        batch = sequences.EvaluationBatch(users, target, seen, negatives)
        history = [[int(t)] for t in target]
        timed = bench.race(
            lambda _: evaluate(lambda vectors: vectors, table, [batch]),
            lambda _: plain.plain_ranks(users, table, target, history),
            range(len(bench.batches)),
        )
        bench.add(f"ranks among {n_items:,} items", "users/s", timed, n_users)


def sasrec(bench: Bench, batch_size: int = 256) -> None:
    """Step 1 at its defaults, every position a target. An epoch: its steps times the median."""
    per_epoch = len(bench.samples) / batch_size
    rng = np.random.default_rng(0)
    batches = [
        rng.choice(len(bench.samples), min(batch_size, len(bench.samples)), replace=False)
        for _ in bench.batches
    ]
    for hid_dim in (32, 128):
        torch.manual_seed(0)
        shape = {
            "emb_dim": DIM,
            "hid_dim": hid_dim,
            "num_blocks": 2,
            "num_heads": 1,
            "dropout": 0.5,
            "norm": "query",
            "init_std": 0.02,
        }
        ours, theirs = (
            SASRec(bench.data.n_items, bench.shape.slots, **shape).to(bench.device)
            for _ in range(2)
        )

        def loss(rows, model, states, cross_entropy):
            history, targets = (
                bench.samples.histories(rows).to(bench.device),
                bench.samples.shifted_targets(rows).to(bench.device),
            )
            real = targets != bench.data.n_items
            return cross_entropy(states(history)[real], model.item_table, targets[real])

        timed = bench.race(
            training_step(
                ours, lambda rows: loss(rows, ours, ours.states, catalogue_cross_entropy)
            ),
            training_step(
                theirs,
                lambda rows: loss(
                    rows, theirs, theirs._padded_states, lambda u, t, y: F.cross_entropy(u @ t.T, y)
                ),
            ),
            batches,
        )
        targets = float(np.mean([bench.samples.lengths()[rows].sum() for rows in batches]))
        product = 2 * 3 * targets * bench.data.n_items * DIM  # logits, two gradients
        bench.add(f"SASRec epoch, width {hid_dim}, full catalogue", "s", timed, per_epoch, product)


def reviews(bench: Bench, n_rows: int = 200_000) -> None:
    """Raw reviews to sequences: streamed, against pandas over the whole file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reviews.json"
        write_reviews(path, n_rows)

        def ours(_):
            raw, _ = process.read_reviews(path, 3)
            kept = process.filter_reviews(raw, 5, 20, 5, None, lambda *_: None)
            process.write_domain(kept, {}, Path(folder) / "ours.csv")

        def theirs(_):
            plain.plain_process(path, 3, 5, 20, 5).to_csv(Path(folder) / "plain.csv", index=False)

        timed = bench.race(ours, theirs, range(3))
        assert (
            len(pd.read_csv(Path(folder) / "ours.csv"))
            == len(pd.read_csv(Path(folder) / "plain.csv"))
            > 0
        )
    bench.add("datasets.process, reviews to sequences", "rows/s", timed, n_rows)


def write_reviews(path: Path, n_rows: int) -> None:
    """Made-up reviews with the fields and about the length of the real ones."""
    rng = np.random.default_rng(0)
    user, item = (
        rng.integers(0, n_rows // 12, n_rows),
        (rng.pareto(1.2, n_rows) * 50).astype(int) % (n_rows // 40),
    )
    text = "It does what it says and arrived in time; I would buy it again for a friend. " * 3
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n_rows):
            row = {
                "overall": float(rng.integers(1, 6)),
                "verified": True,
                "reviewTime": "09 4, 2015",
                "reviewerID": f"A{user[i]:012d}",
                "asin": f"B{item[i]:09d}",
                "reviewerName": "A buyer",
                "reviewText": text,
                "summary": "Five Stars",
                "unixReviewTime": 1441324800 + i,
            }
            file.write(json.dumps(row) + "\n")


def table(bench: Bench) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| row | unit | ours | plain | ratio | P + R | mean history | token ratio | floor of a "
        "batch | of matrix rate | peak MiB, ours / plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in bench.rows:
        numbers = [
            f"{row[name]:,.2f}" if row[name] < 100 else f"{row[name]:,.0f}"
            for name in ("ours", "plain")
        ]
        tokens = ["-"] * 3
        if "prompt" in row:
            tokens = [
                f"{row['prompt']} + {row['response']}",
                f"{row['mean_history']:.1f}",
                f"{row['token_ratio']:.2f}",
            ]
        tokens.append(f"{row['floor_ms']:.0f} ms" if "floor_ms" in row else "-")
        reached = f"{row['of_matrix_rate']:.2f}" if "of_matrix_rate" in row else "-"
        peak = (
            f"{row['peak_mib']:,.0f} / {row['plain_peak_mib']:,.0f} ({row['peak_share']:.3f})"
            if "peak_mib" in row
            else "-"
        )
        lines.append(
            f"| {row['row']} | {row['unit']} | {' | '.join(numbers)} | {row['ratio']:.2f}x | "
            f"{' | '.join(tokens)} | {reached} | {peak} |"
        )
    return "\n".join(lines)


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
    rest: NonNegativeFloat = flag(0.0, "seconds between pairs, where a shared machine needs it"),
    busy: NonNegativeInt = flag(0, "other processes at work, a core each, while rows are timed"),
    rows: list[str] = flag(
        ["all"],
        "all, or some of steps, preparation, precision, compiled, layouts, sasrec_kl, distill,"
        " inference, catalogue, candidates, ranking, sasrec, process",
    ),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto is cuda where there is one"),
    output_dir: str = flag("output/benchmarks", "where throughput.json and throughput.md go"),
) -> dict:
    """Race ours against the plain form and print the table.

    Sequence lengths and the catalogue are the domain's.
    """
    parts = {
        "steps": lambda b: steps(b, teacher_layers, student_layers),
        "preparation": lambda b: preparation(b, student_layers),
        "precision": lambda b: precision(b, student_layers),
        "compiled": lambda b: compiled(b, student_layers),
        "layouts": lambda b: layouts(b, student_layers),
        "sasrec_kl": lambda b: sasrec_kl(b, student_layers),
        "distill": lambda b: distillation(b, teacher_layers, student_layers, distill_block),
        "inference": lambda b: inference(b, student_layers),
        "catalogue": catalogue,
        "candidates": candidates,
        "ranking": ranking,
        "sasrec": sasrec,
        "process": reviews,
    }
    rows = [*parts] if rows == ["all"] else rows
    unknown = [name for name in rows if name not in parts]
    cli.check(
        (not unknown, f"--rows={','.join(unknown)}: expected all, or some of {', '.join(parts)}"),
        cli.blocks(distill_block, student_layers=student_layers),
        cli.blocks(distill_block, teacher_layers=teacher_layers),
    )
    folder = Path(output_dir)
    check_writable(folder, "--output_dir")
    interactions, csv = Domain.of(data).read()
    device = processes.choose_device(device)
    location = base.locate(base_model)
    torch.manual_seed(0)
    items = nn.Embedding(interactions.n_items, DIM).weight.detach().mul_(0.1).to(device)
    shape = measure.Shape(
        base.read_config(location),
        *tokenise(read_template("alpaca"), location),
        items,
        max_seq_length,
    )
    bench = Bench(interactions, shape, min(batch_size, interactions.n_users), repeats, rest)
    about = measure.machine(device) | {
        "base_model": base_model,
        "batch_size": len(bench.batches[0]),
        "repeats": repeats,
        "busy": busy,
        "gflops": bench.rate / 1e9,
    }
    print(
        "  ".join(
            f"{name} {value:.0f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in about.items()
        ),
        flush=True,
    )
    print(f"{'':58s} {'ours':>12s} {'plain':>12s} {'':8s} {'ratio':>7s}", flush=True)
    with measure.busy(busy):
        if busy and device.type == "cpu":
            cpu.choose_threads()  # as a run does that starts beside them; for both sides
        about["threads"] = torch.get_num_threads()
        for name in rows:
            parts[name](bench)
    result = about | {"data": str(csv), "rows": bench.rows}
    measure.write_report(folder, "throughput", result, table(bench))
    return result


if __name__ == "__main__":
    cli.run(main)
