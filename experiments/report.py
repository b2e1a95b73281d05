"""One page over all runs below a folder: the paper's rows, ours beside the paper's, significance, cost, and the losses' curves.

    python -m experiments.report                                         # every results.json below output/
    python -m experiments.report --runs output/cloth/paper
    python -m experiments.report --runs output/beauty/paper --keep docs/results/beauty    # copy what the report reads
    python -m experiments.report --runs docs/results --into docs/results.md               # between the page's two markers

Runs that differ in their seed alone are one row: mean and standard deviation over seeds. Two rows are compared by a paired
bootstrap over users of the reciprocal rank, averaged over the seeds both have. A row of the paper's tables that was not run
is in the table, marked. Writes report.md and, for each domain, metrics and curves as PNG.
"""

import json
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.rows import ABLATION, COLUMNS, MAIN, PAPER, label, plain_ce
from experiments.runs import SCRIPTS
from utils import cli, runlog

START, END = "<!-- report: made by experiments.report, do not edit -->", "<!-- end of report -->"
SAMPLED, FULL = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"), ("HR@10", "NDCG@10", "MRR")
KEPT = ("config.json", "results.json", "metrics.jsonl")
NO_PART = (*runlog.PLACES, *runlog.HARMLESS, "log_steps", "save_steps", "seed", "domain_type")  # flags that make no other row
NEEDED = {"test", "valid", "users", "parameters", "trainable_parameters"}
NOT_RUN = "not run"
CHUNK = 2**24  # resampled users held at once


class Run(NamedTuple):
    """One finished run: its folder, config.json, results.json."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def label(self) -> str:
        return label(self.config["step"], self.config["flags"])

    @property
    def key(self) -> str:
        """What the run is, whatever its seed and place. A student trained by cross-entropy alone is what finetune.py trains."""
        step, flags = self.config["step"], self.config["flags"]
        names = set(flags) - {*NO_PART}
        if step != "sasrec" and plain_ce(step, flags):
            step = "llm"
            names &= set(cli.defaults(SCRIPTS["teacher"])) & set(cli.defaults(SCRIPTS["student"]))
            names -= {"distill_block", "cls_multiple_lambda", "block_reduction"}
        same = {name: flags[name] for name in sorted(names)}
        return json.dumps([step, self.config.get("model", {}).get("layers"), same])


class Row(NamedTuple):
    """Runs that differ in their seed alone, by seed."""

    label: str
    runs: dict[int, Run]


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
    found, notes = read_runs(root)
    if not found:
        raise cli.UsageError(f"--runs={runs}: no results.json below it; train_sr_trad.py, finetune.py and distill.py write them")
    folder = Path(output_dir) if output_dir else root
    folder.mkdir(parents=True, exist_ok=True)
    domains = by_domain(found, notes)
    if keep:
        for run in [run for rows in domains.values() for row in rows for run in row.runs.values()]:
            _keep(run, Path(keep) / run.folder.relative_to(root))
    sections = [_section(domain, rows, folder, resamples) for domain, rows in domains.items()]
    report = "\n\n".join([*sections, *([f"Passed over: {'; '.join(notes)}."] if notes else [])]) + "\n"
    (folder / "report.md").write_text("# Report\n\n" + report, encoding="utf-8")
    if page is not None:
        linked = report.replace("](", f"]({_relative(folder, page.parent)}")
        before, _, rest = text.partition(START)
        page.write_text(f"{before}{START}\n\n{linked}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(report)
    print(f"wrote {folder / 'report.md'}", flush=True)
    return folder / "report.md"


def read_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Every finished run below `root`, oldest first, and a note on each folder that was passed over."""
    found, notes = [], []
    for path in sorted(root.rglob("config.json")):
        folder = path.parent
        try:
            config = runlog.read_json(path, "run")
            if config.get("step") not in list(SCRIPTS):
                continue
            if not runlog.finished(folder):
                notes.append(f"{folder.relative_to(root)} is unfinished")
                continue
            run = Run(folder, config, runlog.read_json(folder / "results.json", "results"))
            if run.seed != config["flags"]["seed"] or not run.label or not run.key or not set(run.results) >= NEEDED:
                raise KeyError
        except (cli.UsageError, KeyError, TypeError, AttributeError) as problem:
            reason = str(problem) if isinstance(problem, cli.UsageError) else "its config.json or results.json lacks something"
            notes.append(f"{folder.relative_to(root)}: {reason}")
            continue
        found.append(run)
    return sorted(found, key=lambda run: (run.folder / "results.json").stat().st_mtime), notes


def by_domain(runs: list[Run], notes: list[str]) -> dict[str, list[Row]]:
    """Domain (and data, where one domain has several) -> its rows, of equal runs the newest; others are noted."""
    hashes = defaultdict(set)
    for run in runs:
        hashes[run.config["domain"]].add(run.config["data_sha256"])
    groups: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        domain, sha = run.config["domain"], run.config["data_sha256"]
        row = groups[domain if len(hashes[domain]) == 1 else f"{domain} ({sha[:8]})"][run.key]
        if run.seed in row:
            notes.append(f"{row[run.seed].folder} has the flags and the seed of {run.folder}")
        row[run.seed] = run
    return {domain: _named(list(rows.values())) for domain, rows in sorted(groups.items())}


def _named(rows: list[dict[int, Run]]) -> list[Row]:
    """Rows of equal label are told apart by their folders' name. The plain label goes to the one that most seeds have, of
    equals to the one trained by distill.py: with the students' settings, it is what they are compared with."""
    by_label = defaultdict(list)
    for row in sorted(rows, key=lambda row: str(next(iter(row.values())).folder)):
        by_label[next(iter(row.values())).label].append(row)
    named = []
    for text, same in by_label.items():
        same.sort(key=lambda row: (len(row), any(run.config["step"] == "student" for run in row.values())), reverse=True)
        for i, row in enumerate(same):
            named.append(Row(text if i == 0 else f"{text} [{next(iter(row.values())).folder.name}]", dict(sorted(row.items()))))
    return named


def _section(domain: str, rows: list[Row], folder: Path, resamples: int) -> str:
    """The Markdown of one domain; draws its figures."""
    by_label = {row.label: row for row in rows}
    random_base = any(run.results.get("random_base") for row in rows for run in row.runs.values())
    popularity = next((run.results["popularity"]["test"] for row in rows for run in row.runs.values() if "popularity" in run.results), None)
    ablation = [_ablation_label(flags) for flags in ABLATION.values()]
    others = sorted(row.label for row in rows if row.label not in (*MAIN, *ablation))
    users = next(iter(rows[0].runs.values())).results["users"]
    seeds = sorted({seed for row in rows for seed in row.runs})
    parts = [
        f"## {domain}",
        f"{users:,} users, test set; mean ± standard deviation over the seeds (of {', '.join(map(str, seeds))}) that a row has."
        + (" LLM rows stand on a random base." if random_base else ""),
    ]
    paper = PAPER.get(domain, {})
    for title, labels in (("Main rows", MAIN), ("Ablation", ablation), ("Other rows", others)):
        if title != "Other rows" and not any(text in by_label for text in labels):
            continue
        if labels:
            parts.append(f"### {title}\n\n" + _table(labels, by_label, popularity, paper))
    order = [by_label[text] for text in dict.fromkeys((*MAIN, *ablation, *others)) if text in by_label]
    parts.append("### Significance\n\n" + _significance(order, resamples))
    parts.append("### Cost\n\n" + _cost(order))
    slug = domain.replace(" (", "_").rstrip(")")
    from experiments import figures

    parts.append(f"![metrics]({figures.metrics(order, folder / f'report_{slug}_metrics.png').name})")
    parts.append(f"![curves]({figures.curves(order, folder / f'report_{slug}_curves.png').name})")
    return "\n\n".join(parts)


def _ablation_label(flags: dict[str, Any]) -> str:
    return label("student", cli.defaults(SCRIPTS["student"]) | {"llama_decoder_nums_teacher": 8} | flags)


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
            cells += [f"{value / 100:.4f}" for value in paper[text]] if text in paper else ["-"] * len(COLUMNS)
        lines.append([text, seeds, *cells])
    return markdown(head, lines)


def _cost(rows: list[Row]) -> str:
    head = ["row", "parameters", "trained", "steps", "best step", "training s", "inference users/s", "valid MRR"]
    lines = []
    for row in rows:
        results = [run.results for run in row.runs.values()]
        values = lambda name: [result[name] for result in results if result.get(name) is not None]
        lines.append(
            [
                row.label,
                f"{results[0]['parameters']:,}",
                f"{results[0]['trainable_parameters']:,}",
                *[spread(values(name), 0) for name in ("steps", "best_step", "train_seconds", "inference_users_per_second")],
                spread([result["valid"]["sampled"]["MRR"] for result in results]),
            ]
        )
    return markdown(head, lines)


def _significance(rows: list[Row], resamples: int) -> str:
    """Every LLM row against SASRec, every distilled one against CE alone at its depth and against its teacher."""
    by_label, lines = {row.label: row for row in rows}, []
    for text, row in by_label.items():
        for other in _references(next(iter(row.runs.values())), text):
            if other in by_label:
                common = [seed for seed in row.runs if seed in by_label[other].runs]
                cells = [_comparison(row, by_label[other], common, protocol, resamples) for protocol in ("sampled", "full")]
                lines += [[text, other, *cells[0], *cells[1], str(len(common))]] if all(cells) else []
    if not lines:
        return "No two rows to compare: their ranks.npz are missing, or they share no seed."
    head = ["row", "against", "sampled MRR", "95 % interval", "p", "full MRR", "95 % interval", "p", "seeds"]
    return markdown(head, lines) + (
        "\n\nDifference of the mean reciprocal rank, paired bootstrap over users of its mean over the seeds both have; how seeds"
        " scatter is not in the interval, and nothing is corrected for the number of comparisons."
    )


def _references(run: Run, text: str) -> list[str]:
    step, flags = run.config["step"], run.config["flags"]
    if step == "sasrec":
        return ["SASRec"] if text != "SASRec" else []
    if plain_ce(step, flags):
        return ["SASRec"]
    layers = flags.get("llama_decoder_nums_student", flags.get("llama_decoder_nums"))
    return ["SASRec", f"E4SRec-like, {layers} layers", f"E4SRec-like, {flags.get('llama_decoder_nums_teacher')} layers"]


def _comparison(row: Row, other: Row, seeds: list[int], protocol: str, resamples: int) -> list[str]:
    """Difference, interval and p; empty where ranks are missing."""
    pairs = [(_ranks(row.runs[seed].folder, protocol), _ranks(other.runs[seed].folder, protocol)) for seed in seeds]
    if not pairs or any(mine is None or theirs is None or len(mine) != len(theirs) for mine, theirs in pairs):
        return []
    difference = np.mean([1 / mine - 1 / theirs for mine, theirs in pairs], axis=0)
    mean, low, high, p = paired_bootstrap(difference, resamples)
    return [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", f"< {1 / resamples:.4f}" if p < 1 / resamples else f"{p:.4f}"]


def paired_bootstrap(difference: np.ndarray, resamples: int, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean, 95 % percentile interval and two-sided p of a paired difference [U] (Efron and Tibshirani, 1993, ch. 13 and 16).

    p is twice the smaller share of resampled means on either side of zero.
    """
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, max(1, CHUNK // len(difference))):
        n = min(resamples - start, max(1, CHUNK // len(difference)))
        means.append(difference[rng.integers(0, len(difference), (n, len(difference)), dtype=np.int32)].mean(1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
    return float(difference.mean()), float(low), float(high), float(p)


def _ranks(folder: Path, protocol: str) -> np.ndarray | None:
    try:
        with np.load(folder / "ranks.npz", allow_pickle=False) as ranks:
            return ranks[f"test_{protocol}"].astype(np.float64)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or torn: the comparison is left out
        return None


def _keep(run: Run, folder: Path) -> None:
    """What the report reads of a run; of the ranks the test ones that significance needs, in the fewest bits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run.folder / name, folder / name)
    ranks = {f"test_{protocol}": _ranks(run.folder, protocol) for protocol in ("sampled", "full")}
    if all(values is not None for values in ranks.values()):
        np.savez_compressed(folder / "ranks.npz", **{name: values.astype(np.min_scalar_type(int(values.max()))) for name, values in ranks.items()})


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
    path = folder.resolve().relative_to(start.resolve()).as_posix()
    return "" if path == "." else path + "/"


if __name__ == "__main__":
    cli.run(main)
