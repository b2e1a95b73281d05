"""Whether two rows differ: a bootstrap over users and seeds, a t-test over seeds, Holm."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.paper import plain_ce, plain_name
from experiments.results import FinishedRun, Row

PROTOCOLS = ("sampled", "full")
FEWEST_RUNS = 3  # for a test over runs
CHUNK = 2**24  # resampled users held at once
HEAD = ["row", "against"]
for _name in PROTOCOLS:
    HEAD += [f"difference of {_name} MRR", "95 % interval", "p", "p, Holm", "p of runs, Holm"]
HEAD += ["seeds"]


class Estimate(NamedTuple):
    """A difference: its mean, its 95 % percentile interval, and a two-sided p."""

    mean: float
    low: float
    high: float
    p: float


def compare(rows: list[Row], resamples: int, notes: list[str]) -> list[list[str]]:
    """Lines of HEAD's table. Pairs that cannot be compared are added to the notes.

    Every row is compared with SASRec; cross-entropy alone with its deepest row; the others with
    cross-entropy alone at their depth, with their teacher, and with SLMRec and D_cos of their
    depths.
    """
    by_label = {row.label: row for row in rows}
    names, seeds, differences = [], [], []
    for row in rows:
        for other in _references(row, by_label):
            theirs = by_label[other].runs
            pairs = [(run, theirs[seed]) for seed, run in row.runs.items() if seed in theirs]
            problems = [_incomparable(*pair) for pair in pairs] or ["no seed in common"]
            told = "; ".join(dict.fromkeys(filter(None, problems)))
            if told:
                notes.append(f"{row.label} against {other}: {told}")
            pairs = [pair for pair, problem in zip(pairs, problems) if not problem]
            if not pairs:
                continue
            names.append([row.label, other])
            seeds.append(", ".join(str(mine.seed) for mine, _ in pairs))
            for protocol in PROTOCOLS:  # of the reciprocal ranks, [seeds, U]
                each = [1 / mine.ranks(protocol) - 1 / its.ranks(protocol) for mine, its in pairs]
                differences.append(np.stack(each))
    found = bootstrap(differences, resamples)
    corrected = holm([estimate.p for estimate in found])
    several = [i for i, difference in enumerate(differences) if len(difference) >= FEWEST_RUNS]
    of_runs = holm([t_test(differences[i].mean(1)) for i in several])
    by_runs = dict(zip(several, of_runs))
    cells = [_cells(found[i], corrected[i], by_runs.get(i)) for i in range(len(found))]
    lines = zip(names, cells[::2], cells[1::2], seeds)
    return [[*pair, *sampled, *full, text] for pair, sampled, full, text in lines]


def _references(row: Row, by_label: dict[str, Row]) -> list[str]:
    """The labels of the rows that a row is compared with."""
    run = row.first
    stage, flags = run.stage, run.flags
    names = ["SASRec"]
    items = f", items from {run.items_from}" * bool(run.items_from) + row.base
    every = ", every prefix" if stage != "sasrec" and flags["train_targets"] == "all" else ""
    if stage != "sasrec" and plain_ce(flags):
        others = [other.first for other in by_label.values() if other.base == row.base]
        depths = [_layers(o) for o in others if o.stage != "sasrec" and plain_ce(o.flags)]
        names += [plain_name(max(depths)) + every + items, plain_name(_layers(run)) + items]
    elif stage != "sasrec":
        between = f"{_layers(run)} <- {flags.get('llama_decoder_nums_teacher')}"
        names.append(plain_name(_layers(run)) + every + items)
        for text, other in by_label.items():
            if any(map(run.taught_by, other.runs.values())):
                names.append(text)
        names += [f"SLMRec {between}{items}", f"{between}: D_cos{items}"]
    return [text for text in dict.fromkeys(names) if text in by_label and text != row.label]


def _layers(run: FinishedRun) -> int:
    return run.flags.get("llama_decoder_nums_student") or run.flags["llama_decoder_nums"]


def _incomparable(mine: FinishedRun, theirs: FinishedRun) -> str:
    """Why two runs of a seed cannot be paired; empty where they can."""
    tables = [run.config.get("table_sha256") for run in (mine, theirs)]
    if "sasrec" not in (mine.stage, theirs.stage) and tables[0] != tables[1]:
        return f"{mine.name} and {theirs.name} use different item tables"
    ranks = [run.ranks(protocol) for run in (mine, theirs) for protocol in ("sampled", "full")]
    missing = any(values is None for values in ranks)
    if missing or len({len(values) for values in ranks}) > 1:
        return f"ranks.npz of {mine.name} or {theirs.name} is missing or torn"
    return ""


def _cells(estimate: Estimate, corrected: float, of_runs: float | None) -> list[str]:
    last = "-" if of_runs is None else f"{of_runs:.3f}"
    mean, low, high, p = estimate
    return [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p:.4f}", f"{corrected:.3f}", last]


def bootstrap(differences: list[np.ndarray], resamples: int, seed: int = 0) -> list[Estimate]:
    """Estimates of paired differences, each [seeds, U], with U alike for all.

    Users and seeds are resampled together (Efron and Tibshirani, 1993, ch. 8 and 13): one draw of
    users for all seeds, and seeds with replacement. A difference of one seed is resampled over
    users alone. p is twice the smaller share of resampled means on either side of zero, the sample
    itself counted among them, so that it is never 0 (Davison and Hinkley, 1997, ch. 4).
    """
    if not differences:
        return []
    rows = np.concatenate(differences)  # [all seeds, U]
    means = _resampled(rows, resamples, seed)  # [resamples, all seeds]
    bounds = np.cumsum([len(difference) for difference in differences])[:-1]
    draws = np.random.default_rng((seed, 1))
    estimates = []
    for difference, mine in zip(differences, np.split(means, bounds, axis=1)):
        n = len(difference)
        if n > 1:
            drawn = draws.integers(0, n, (resamples, n))
            mine = np.take_along_axis(mine, drawn, axis=1)
        resampled = mine.mean(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        smaller = min((resampled <= 0).sum(), (resampled >= 0).sum())
        p = min(1.0, 2 * (1 + smaller) / (resamples + 1))
        estimates.append(Estimate(float(difference.mean()), float(low), float(high), float(p)))
    return estimates


def _resampled(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of rows [n, U] over users drawn with replacement, alike for all; [resamples, n]."""
    rng = np.random.default_rng(seed)
    users = rows.shape[1]
    chunk = max(1, CHUNK // users)
    means = []
    for start in range(0, resamples, chunk):
        n = min(resamples - start, chunk)
        drawn = rng.integers(0, users, (n, users), dtype=np.int32)
        cell = drawn + users * np.arange(n)[:, None]
        counts = np.bincount(cell.ravel(), minlength=n * users).reshape(n, users)
        means.append(counts @ rows.T / users)
    return np.concatenate(means)


def t_test(differences: np.ndarray) -> float:
    """Two-sided p of Student's t-test that paired differences, one per seed, have mean zero."""
    if not np.ptp(differences):
        return 0.0 if differences.any() else 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(values: list[float]) -> list[float]:
    """p corrected for the number of comparisons (Holm, 1979): none of them false at this level."""
    order = np.argsort(values, kind="stable")
    corrected, largest = [0.0] * len(values), 0.0
    for smaller, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - smaller)))
        corrected[index] = largest
    return corrected
