"""Ours beside the plain form, part by part, in one run: alternating, medians of the pairs' ratios.

    python -m benchmarks.throughput                    # lengths of the demo domain, base tiny
    python -m benchmarks.throughput --data_path data/amazon2014_beauty.csv.xz --base_model small

Every pair has the same weights and the same batches. The plain form is benchmarks/plain.py: the
padded Hugging Face forward with peft, full logits, candidates by set difference, ranks by sorting,
reviews in pandas. A training step is loss + backward + clip + AdamW. The floor is what must be
computed (benchmarks/measure.py) over this machine's measured rate of large matrix products. Prints
one table and writes throughput.json and throughput.md into --output_dir.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from benchmarks import llm_rows, measure, part_rows
from benchmarks.bench import DIM, Bench
from datasets.domain import Domain
from datasets.prompts import read_template, tokenise
from models import base
from utils import cli, cpu, processes
from utils.files import check_writable
from utils.flags import Data, NonNegativeFloat, NonNegativeInt, PositiveInt, flag


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
        peak = "-"
        if "peak_mib" in row:
            share = f"({row['peak_share']:.3f})"
            peak = f"{row['peak_mib']:,.0f} / {row['plain_peak_mib']:,.0f} {share}"
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
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
    output_dir: str = flag("output/benchmarks", "where throughput.json and throughput.md go"),
) -> dict:
    """Race ours against the plain form and print the table.

    Sequence lengths and the catalogue are the domain's.
    """
    parts = {
        "steps": lambda b: llm_rows.steps(b, teacher_layers, student_layers),
        "preparation": lambda b: llm_rows.preparation(b, student_layers),
        "precision": lambda b: llm_rows.precision(b, student_layers),
        "compiled": lambda b: llm_rows.compiled(b, student_layers),
        "layouts": lambda b: llm_rows.layouts(b, student_layers),
        "sasrec_kl": lambda b: llm_rows.sasrec_kl(b, student_layers),
        "distill": lambda b: llm_rows.distillation(
            b, teacher_layers, student_layers, distill_block
        ),
        "inference": lambda b: llm_rows.inference(b, student_layers),
        "catalogue": part_rows.catalogue,
        "candidates": part_rows.candidates,
        "ranking": part_rows.ranking,
        "sasrec": part_rows.sasrec,
        "process": part_rows.reviews,
    }
    rows = [*parts] if rows == ["all"] else rows
    unknown = [name for name in rows if name not in parts]
    cli.check(
        (not unknown, f"--rows={','.join(unknown)}: expected all, or some of {', '.join(parts)}")
    )
    if "distill" in rows:
        cli.check(
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
