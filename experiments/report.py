"""One page over all runs below a folder: the paper's rows, ours beside the paper's, significance, cost, and the losses' curves.

    python -m experiments.report                                         # every results.json below output/
    python -m experiments.report --runs output/cloth/paper
    python -m experiments.report --runs output/beauty/paper --keep docs/results/beauty    # copy what the report reads
    python -m experiments.report --runs docs/results --into docs/results.md               # between the page's two markers

Runs that differ in their seed alone (their teachers too) are one row: mean and standard deviation over seeds. Two rows are
compared by a paired bootstrap over users of the reciprocal rank, averaged over the seeds both have. A row of the paper's
tables that was not run is in the table, marked. Writes report.md and, for each domain, metrics and curves as PNG.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import significance
from experiments.found import Row, by_domain, keep_all, read_runs
from experiments.rows import ABLATION, COLUMNS, PAPER, label, main_rows
from experiments.runs import SCRIPTS
from utils import cli

START, END = "<!-- report: made by experiments.report, do not edit -->", "<!-- end of report -->"
SAMPLED, FULL = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"), ("HR@10", "NDCG@10", "MRR")
NOT_RUN = "not run"


@cli.command
def main(
    *, runs: str = "output", output_dir: str | None = None, keep: str | None = None, into: str | None = None, resamples: cli.PositiveInt = 2000
) -> Path:
    """Write the report of every run below a folder.

    Args:
        runs: the folder; runs at any depth count.
        output_dir: where report.md and the figures go; the folder of the runs by default.
        keep: also copy what the report reads (config, results, log, test ranks) there, to be committed.
        into: also put the report between the two markers of this Markdown file.
        resamples: of the bootstrap.
    """
    root = Path(runs)
    cli.check((root.is_dir(), f"--runs={runs}: no such folder"))
    page = Path(into) if into else None
    if page is not None:
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        cli.check((START in text and END in text, f"--into={into}: expected a file with the lines {START} and {END}"))
    source, copy = root.resolve(), Path(keep or "").resolve()
    apart = not keep or not (copy.is_relative_to(source) or source.is_relative_to(copy))
    cli.check((apart, f"--keep={keep}: one of it and --runs={runs} holds the other; name a folder apart"))
    found, notes = read_runs(root)
    if not found:
        passed = f" ({'; '.join(notes)})" if notes else ""
        raise cli.UsageError(f"--runs={runs}: no finished run below it{passed}; train_sr_trad.py, finetune.py and distill.py write them")
    folder = Path(output_dir) if output_dir else root
    folder.mkdir(parents=True, exist_ok=True)
    domains = by_domain(found, notes)
    if keep:
        keep_all([run for rows in domains.values() for row in rows for run in row.runs.values()], root, Path(keep))
    sections = [_section(domain, rows, folder, resamples, notes) for domain, rows in domains.items()]
    report = "\n\n".join([*sections, *([f"Passed over: {'; '.join(notes)}."] if notes else [])]) + "\n"
    (folder / "report.md").write_text("# Report\n\n" + report, encoding="utf-8")
    if page is not None:
        linked = report.replace("](", f"]({_relative(folder, page.parent)}")
        before, _, rest = text.partition(START)
        page.write_text(f"{before}{START}\n\n{linked}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(report)
    print(f"wrote {folder / 'report.md'}", flush=True)
    return folder / "report.md"


def _section(domain: str, rows: list[Row], folder: Path, resamples: int, notes: list[str]) -> str:
    """The Markdown of one domain; draws its figures. Comparisons that cannot be made are added to the notes."""
    by_label = {row.label: row for row in rows}
    random_base = any(run.results.get("random_base") for row in rows for run in row.runs.values())
    popularity = next((run.results["popularity"]["test"] for row in rows for run in row.runs.values() if "popularity" in run.results), None)
    depths = _depths(rows)
    main_labels, ablation = main_rows(*depths), [_ablation_label(flags, *depths) for flags in ABLATION.values()]
    others = sorted(row.label for row in rows if row.label not in (*main_labels, *ablation))
    users = rows[0].first.results["users"]
    seeds = sorted({seed for row in rows for seed in row.runs})
    parts = [
        f"## {domain}",
        f"{users:,} users, test set; mean ± standard deviation over the seeds (of {', '.join(map(str, seeds))}) that a row has."
        + (" LLM rows stand on a random base." if random_base else ""),
    ]
    paper = PAPER.get(domain.partition(" (")[0], {})
    for title, labels in (("Main rows", main_labels), ("Ablation", ablation), ("Other rows", others)):
        own = set(labels) - (set(main_labels) if title == "Ablation" and not paper else set())  # CE and the whole loss are main rows
        if title != "Other rows" and not own & set(by_label):
            continue
        if labels:
            parts.append(f"### {title}\n\n" + _table(labels, by_label, popularity, paper))
    order = [by_label[text] for text in dict.fromkeys((*main_labels, *ablation, *others)) if text in by_label]
    parts.append("### Significance\n\n" + _significance(order, resamples, notes))
    parts.append("### Cost\n\n" + _cost(order))
    slug = domain.replace(" (", "_").rstrip(")")
    from experiments import figures

    parts.append(f"![metrics]({figures.metrics(order, folder / f'report_{slug}_metrics.png').name})")
    drawn = [row for row in order if row.label not in others] or order  # a curve for everything is a curve for nothing
    parts.append(f"![curves]({figures.curves(drawn, folder / f'report_{slug}_curves.png').name})")
    return "\n\n".join(parts)


def _depths(rows: list[Row]) -> tuple[int, int]:
    """Layers of student and teacher that most distilled runs have, of equals the larger; the paper's 4 and 8 without any."""
    pairs = Counter(
        (run.flags["llama_decoder_nums_student"], run.flags["llama_decoder_nums_teacher"])
        for row in rows
        for run in row.runs.values()
        if run.step == "student" and run.config.get("teacher") and run.flags["llama_decoder_nums_teacher"]
    )
    return max(pairs, key=lambda pair: (pairs[pair], pair)) if pairs else (4, 8)


def _ablation_label(flags: dict[str, Any], student: int, teacher: int) -> str:
    own = {"llama_decoder_nums_student": student, "llama_decoder_nums_teacher": teacher}
    return label("student", cli.defaults(SCRIPTS["student"]) | own | flags)


def _significance(rows: list[Row], resamples: int, notes: list[str]) -> str:
    lines = significance.compare(rows, resamples, notes)
    if not lines:
        return "No two rows to compare: their ranks.npz are missing, or they share no seed."
    return markdown(significance.HEAD, lines) + (
        "\n\nDifference of the mean reciprocal rank, paired bootstrap over users of its mean over the seeds both have; how seeds"
        f" scatter is not in the interval, nothing is corrected for the number of comparisons, and {resamples:,} resamples show"
        f" no p below {2 / (resamples + 1):.4f}."
    )


def _table(labels: Iterable[str], by_label: dict[str, Row], popularity: dict | None, paper: dict[str, tuple]) -> str:
    head = ["row", "seeds", *SAMPLED, *[f"full {name}" for name in FULL], *[f"full_all {name}" for name in FULL[:2]]]
    head += [f"paper {name}" for name in COLUMNS] if paper else []
    lines = []
    for text in labels:
        row = by_label.get(text)
        if row is not None:
            tests = [run.results["test"] for run in row.runs.values()]
            seeds = ", ".join(map(str, row.runs))
        elif text == "popularity" and popularity is not None:
            tests, seeds = [popularity], "-"
        else:
            tests, seeds = [], NOT_RUN
        cells = [spread([test["sampled"][name] for test in tests]) for name in SAMPLED]
        cells += [spread([test["full"][name] for test in tests]) for name in FULL]
        cells += [spread([test["full_all"][name] for test in tests]) for name in FULL[:2]]
        if paper:
            theirs = paper.get(text) or paper.get(text.partition(", as released")[0])  # the paper's SASRec is the released one
            cells += [f"{value / 100:.4f}" for value in theirs] if theirs else ["-"] * len(COLUMNS)
        lines.append([text, seeds, *cells])
    return markdown(head, lines)


def _cost(rows: list[Row]) -> str:
    head = ["row", "parameters", "trained", "steps", "best step", "training s", "teacher states s", "inference users/s", "valid MRR"]
    lines = []
    for row in rows:
        results = [run.results for run in row.runs.values()]
        values = lambda name: [result[name] for result in results if result.get(name) is not None]
        lines.append(
            [
                row.label,
                f"{results[0]['parameters']:,}",
                f"{results[0]['trainable_parameters']:,}",
                *[spread(values(name), 0) for name in ("steps", "best_step", "train_seconds", "teacher_states_seconds", "inference_users_per_second")],
                spread([result["valid"]["sampled"]["MRR"] for result in results]),
            ]
        )
    return markdown(head, lines)


def spread(values: list[float], digits: int = 4) -> str:
    """`mean ± standard deviation` (of a sample), the value alone where there is one, `-` where there is none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _relative(folder: Path, start: Path) -> str:
    """The prefix of links that turns a file beside report.md into one seen from the page."""
    path = Path(os.path.relpath(folder, start)).as_posix()
    return "" if path == "." else path + "/"


if __name__ == "__main__":
    cli.run(main)
