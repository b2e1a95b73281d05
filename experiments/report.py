"""One page over all runs below a folder: the paper's rows beside ours, significance, cost, curves.

    python -m experiments.report                         # every results.json below output/
    python -m experiments.report --runs output/cloth/paper
    python -m experiments.report --runs output/beauty/paper --keep docs/results/beauty.zip

Runs that differ in their seed alone (their teachers too) are one row: mean and standard deviation
over seeds. Two rows are compared by a paired bootstrap over users of the reciprocal rank, averaged
over the seeds both have. A row of the paper's tables that was not run is marked where the paper
has figures for it, and named below the table otherwise.
Writes report.md and, for each domain, metrics and curves as PNG and PDF, and the rows as CSV and
LaTeX.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from engine import cli
from engine.cli import PositiveInt, flag
from engine.errors import UsageError
from engine.files import markdown
from experiments import results, significance
from experiments.paper import COLUMNS, PAPER, main_rows
from experiments.results import Row, by_domain, read_runs
from utils.evaluation import PROTOCOLS
from utils.metrics import summarise

SAMPLED = tuple(summarise(np.ones(1), PROTOCOLS["sampled"]))  # all of them
FULL = ("HR@10", "NDCG@10", "MRR")
SPENT = ("steps", "best_step", "train_seconds", "teacher_states_seconds")
SPENT += ("inference_users_per_second",)
COST = ["row", "parameters", "trained", "steps", "best step", "training s"]
COST += ["teacher states s", "inference users/s", "valid MRR"]
NOT_RUN = "not run"
NAMES = (
    "E4SRec-like rows are trained by cross-entropy alone. SLMRec among the main rows starts from"
    " the base (`--student_init base`); by default a student starts from its teacher's ends."
)
PAPERS_ORDER = (
    "The paper's figures are of sequences in file order (its notebook drops the time); ours are as"
    " `datasets.process` was told, by time unless `--order file`."
)


@cli.command
def main(
    *,
    runs: str = flag("output", "the folder; runs at any depth count, and archives right below it"),
    output_dir: str | None = flag(
        None, "where report.md and the figures go; the folder of the runs by default"
    ),
    keep: str | None = flag(
        None, "also write what the report reads of each run to this archive, NAME.zip, and NAME.csv"
    ),
    overwrite: bool = flag(False, "replace that archive", needs="keep"),
    resamples: PositiveInt = flag(20_000, "of the bootstrap"),
) -> Path:
    """Write the report of every run below a folder."""
    root, kept = Path(runs), [Path(keep), Path(keep).with_suffix(".csv")] if keep else []
    there = [path for path in kept if path.exists() and not overwrite]
    cli.check(
        (root.is_dir(), f"--runs={runs}: no such folder"),
        (keep is None or keep.endswith(".zip"), f"--keep={keep}: expected a name ending in .zip"),
        (not there, f"--keep={keep}: {', '.join(map(str, there))} exists; --overwrite replaces it"),
    )
    folder = Path(output_dir) if output_dir else root
    with tempfile.TemporaryDirectory() as unpacked:
        found, notes = read_runs(root, Path(unpacked))
        if not found:
            skipped = f" ({'; '.join(notes)})" if notes else ""
            raise UsageError(
                f"--runs={runs}: no finished run below it{skipped}; train_sr_trad.py, finetune.py"
                " and distill.py write them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        domains = by_domain(found, notes)
        if keep:
            results.keep([row for rows in domains.values() for row in rows], Path(keep))
        sections = [
            _section(domain, rows, folder, resamples, notes) for domain, rows in domains.items()
        ]
    if notes:
        sections.append(f"Skipped: {'; '.join(notes)}.")
    report = "\n\n".join(sections) + "\n"
    print(report)
    written = folder / "report.md"
    written.write_text("# Report\n\n" + report, encoding="utf-8")
    print(f"wrote {written}")
    return written


def _section(domain: str, rows: list[Row], folder: Path, resamples: int, notes: list[str]) -> str:
    """The Markdown of one domain; draws its figures, notes what cannot be compared."""
    from experiments import figures

    by_label = {row.label: row for row in rows}
    first = rows[0].first
    paper = PAPER.get(first.config["domain"], {}) if first.as_published else {}
    main_labels = main_rows(*_depths(rows))
    others = [text for text in paper if text not in main_labels]
    others += sorted(row.label for row in rows if row.label not in (*main_labels, *others))
    every = [run.results for row in rows for run in row.runs.values()]
    popularity = next((r["popularity"]["test"] for r in every if "popularity" in r), None)
    parts = [f"## {domain}", _head(rows, bool(paper))]
    for title, labels in (("Main rows", main_labels), ("Other rows", others)):
        if labels:
            parts.append(f"### {title}\n\n" + _table(labels, by_label, popularity, paper))
    order = [by_label[text] for text in (*main_labels, *others) if text in by_label]
    parts.append("### Significance\n\n" + _significance(order, resamples, notes))
    settings = [[row.label, ", ".join(row.first.settings) or "-"] for row in order]
    parts.append("### Settings\n\n" + markdown(["row", "flags beside the defaults"], settings))
    parts.append("### Cost\n\n" + _cost(order))
    listed = _lists(order)
    parts += [f"### Lists of ten\n\n{listed}"] if listed else []
    slug = re.sub(r"[^\w.-]+", "_", domain).strip("_")
    write_main_table(folder / f"report_{slug}", order, popularity)
    title = f"{domain}, test set, {first.results['users']:,} users"
    names = [run.folder for row in rows for run in row.runs.values()]
    smoke = any("smoke" in part for path in (folder, *names) for part in path.parts)
    path = folder / f"report_{slug}_metrics.png"
    metrics = figures.metrics(order, path, title, popularity, smoke)
    parts.append(f"![metrics]({metrics.name})")
    title = f"{domain}: training, and validation on {first.results['users']:,} users"
    curves = figures.curves(order, folder / f"report_{slug}_curves.png", title, smoke)
    parts.append(f"![curves]({curves.name})")
    return "\n\n".join(parts)


def _head(rows: list[Row], paper: bool) -> str:
    runs = [run for row in rows for run in row.runs.values()]
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    random_base = [run.results.get("random_base") for run in runs if run.stage != "sasrec"]
    which = "LLM rows use" if all(random_base) else "Some LLM rows use"
    return (
        f"{rows[0].first.results['users']:,} users, test set;"
        f" mean, and standard deviation where a row has several seeds (of {seeds})."
        + (f" {which} a random base." if any(random_base) else "")
        + (f" {NAMES}" if random_base else "")
        + (f" {PAPERS_ORDER}" if paper else "")
    )


def _depths(rows: list[Row]) -> tuple[int, int]:
    """Layers of student and teacher that most distilled runs have; the paper's without any."""
    pairs: Counter[tuple[int, int]] = Counter()
    for row in rows:
        for run in row.runs.values():
            teacher = run.flags.get("llama_decoder_nums_teacher")
            if run.stage == "student" and run.config.get("teacher") and teacher:
                pairs[run.flags["llama_decoder_nums_student"], teacher] += 1
    return max(pairs, key=lambda pair: (pairs[pair], pair)) if pairs else (4, 8)


def _significance(rows: list[Row], resamples: int, notes: list[str]) -> str:
    lines = significance.compare(rows, resamples, notes)
    if not lines:
        return "No two rows to compare: their ranks.npz are missing, or they share no seed."
    return markdown(significance.HEAD, lines) + (
        "\n\nDifference of the mean reciprocal rank over the seeds both have; bootstrap over users"
        f" and seeds ({resamples:,} resamples, so that no p is below {2 / (resamples + 1):.4f}),"
        " over users alone where there is one seed. Holm's correction is over all comparisons of"
        f" this table, {2 * len(lines)} in number. p of runs: Student's t-test on the runs' means"
        " alone, paired by seed, from three seeds on; corrected over the comparisons that have one."
    )


def _table(
    labels: Iterable[str],
    by_label: dict[str, Row],
    popularity: dict | None,
    paper: dict[str, tuple],
) -> str:
    head = ["row", "seeds", *SAMPLED, *(f"full {name}" for name in FULL)]
    head += [f"full_all {name}" for name in FULL[:2]]
    head += [f"paper {name}" for name in COLUMNS] if paper else []
    lines, missing = [], []
    for text in labels:
        row = by_label.get(text)
        # the paper's SASRec is the released one
        theirs = paper.get(text) or paper.get(text.partition(", as released")[0])
        if row is None and text != "popularity" and not theirs:
            missing.append(text)
            continue
        tests, seeds = [], NOT_RUN
        if row is not None:
            tests = [run.results["test"] for run in row.runs.values()]
            seeds = ", ".join(map(str, row.runs))
        elif text == "popularity" and popularity is not None:
            tests, seeds = [popularity], "-"
        cells = [text, seeds]
        for protocol, names in (("sampled", SAMPLED), ("full", FULL), ("full_all", FULL[:2])):
            cells += [spread(_values(tests, protocol, name)) for name in names]
        if paper:
            cells += [f"{value / 100:.4f}" for value in theirs] if theirs else ["-"] * len(COLUMNS)
        lines.append(cells)
    not_run = f"\n\nNot run: {'; '.join(missing)}." if missing else ""
    return markdown(head, lines) + not_run


def _cost(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        of_row = [run.results for run in row.runs.values()]
        sizes = (of_row[0][name] for name in ("parameters", "trainable_parameters"))
        cells = [row.label, *(f"{size:,}" for size in sizes)]
        for name in SPENT:
            values = [result[name] for result in of_row if result.get(name) is not None]
            cells.append(spread(values, 0))
        valid = [result["valid"]["sampled"]["MRR"] for result in of_row]
        lines.append([*cells, spread(valid)])
    return markdown(COST, lines)


def _lists(rows: list[Row]) -> str:
    """What the rows' lists of ten hold, of those that record it (utils.metrics.beyond_accuracy)."""
    lines, names = [], []
    for row in rows:
        found = [run.results["lists"] for run in row.runs.values() if "lists" in run.results]
        if found:
            names = list(found[0])
            cells = [spread([each[name] for each in found], 3) for name in names]
            lines.append([row.label, *cells])
    return markdown(["row", *names], lines) if lines else ""


def write_main_table(stem: Path, rows: list[Row], popularity: dict | None) -> None:
    """The rows' test metrics as CSV, a run per line, and as LaTeX for the package booktabs."""
    metrics = [("sampled", name) for name in SAMPLED] + [("full", name) for name in FULL]
    head = ["row", "runs", *(" ".join(metric) for metric in metrics)]
    tests = {row.label: [run.results["test"] for run in row.runs.values()] for row in rows}
    seeds = {row.label: list(row.runs) for row in rows}
    tests |= {"popularity": [popularity]} if popularity else {}
    lines, flat = [], []
    for text, of_row in tests.items():
        means = [spread(_values(of_row, *metric)) for metric in metrics]
        lines.append([text, str(len(of_row)), *means])
        for seed, test in zip(seeds.get(text, [""]), of_row):
            flat.append([text, seed, *(test[protocol].get(name) for protocol, name in metrics)])
    frame = pd.DataFrame(flat, columns=["row", "seed", *head[2:]])
    frame.to_csv(stem.with_name(f"{stem.name}.csv"), index=False)
    options = {"index": False, "escape": True, "column_format": "l" + "r" * (len(head) - 1)}
    latex = pd.DataFrame(lines, columns=head).to_latex(**options)
    latex = latex.replace("<-", r"$\leftarrow$").replace("±", r"$\pm$")
    stem.with_name(f"{stem.name}.tex").write_text(latex, encoding="utf-8")


def _values(tests: list[dict], protocol: str, name: str) -> list[float]:
    """A metric of several runs; of an older run it may be missing."""
    return [test[protocol][name] for test in tests if name in test[protocol]]


def spread(values: list[float], digits: int = 4) -> str:
    """`mean ± standard deviation` (of a sample); one value alone; `-` for none."""
    if not values:
        return "-"
    mean = f"{np.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):,.{digits}f}"


if __name__ == "__main__":
    cli.run(main)
