"""Whether two rows differ: a paired bootstrap over users."""

import numpy as np

from experiments.paper import plain_ce, plain_name
from experiments.results import Row, Run

SAME_CANDIDATES = ("num_candidates", "candidate_seed")
CHUNK = 2**24  # resampled users held at once
HEAD = ["row", "against"]
HEAD += ["sampled MRR", "95 % interval", "p", "full MRR", "95 % interval", "p", "seeds"]


def compare(rows: list[Row], resamples: int, notes: list[str]) -> list[list[str]]:
    """Lines of HEAD's table. Pairs that cannot be compared are added to the notes.

    Every row is compared with SASRec; cross-entropy alone with its deepest row; the others with
    cross-entropy alone at their depth, with their teacher, and with SLMRec and D_cos of their
    depths.
    """
    by_label, lines = {row.label: row for row in rows}, []
    for row in rows:
        for other in _references(row, by_label):
            theirs = by_label[other].runs
            pairs = [(run, theirs[seed]) for seed, run in row.runs.items() if seed in theirs]
            problem = _problem(pairs)
            if problem:
                notes.append(f"{row.label} against {other}: {problem}")
                continue
            sampled, full = (_comparison(pairs, name, resamples) for name in ("sampled", "full"))
            seeds = ", ".join(str(mine.seed) for mine, _ in pairs)
            lines.append([row.label, other, *sampled, *full, seeds])
    return lines


def _references(row: Row, by_label: dict[str, Row]) -> list[str]:
    """The labels of the rows that a row is compared with."""
    run = row.first
    step, flags = run.step, run.flags
    names = ["SASRec"]
    targets = ", every prefix" if step != "sasrec" and flags["train_targets"] == "all" else ""
    if step != "sasrec" and plain_ce(step, flags):
        depths = [_layers(other.first) for other in by_label.values() if _is_plain(other.first)]
        names += [plain_name(max(depths)) + targets, plain_name(_layers(run))]
    elif step != "sasrec":
        between = f"{_layers(run)} <- {flags.get('llama_decoder_nums_teacher')}"
        names.append(plain_name(_layers(run)) + targets)
        for text, other in by_label.items():
            if any(map(run.taught_by, other.runs.values())):
                names.append(text)
        names += [f"SLMRec {between}", f"{between}: D_cos"]
    return [text for text in dict.fromkeys(names) if text in by_label and text != row.label]


def _is_plain(run: Run) -> bool:
    return run.step != "sasrec" and plain_ce(run.step, run.flags)


def _layers(run: Run) -> int:
    return run.flags.get("llama_decoder_nums_student") or run.flags["llama_decoder_nums"]


def _problem(pairs: list[tuple[Run, Run]]) -> str:
    """Why the runs of two rows cannot be paired; empty where they can."""
    if not pairs:
        return "no seed in common"
    return next((problem for pair in pairs if (problem := _incomparable(*pair))), "")


def _incomparable(mine: Run, theirs: Run) -> str:
    """Why two runs of a seed cannot be paired; empty where they can."""
    if any(mine.flags[name] != theirs.flags[name] for name in SAME_CANDIDATES):
        return "other candidates"
    tables = [run.config.get("table_sha256") for run in (mine, theirs)]
    if "sasrec" not in (mine.step, theirs.step) and tables[0] != tables[1]:
        return f"{mine.name} and {theirs.name} stand on different item tables"
    ranks = [run.ranks(protocol) for run in (mine, theirs) for protocol in ("sampled", "full")]
    missing = any(values is None for values in ranks)
    if missing or len({len(values) for values in ranks}) > 1:
        return f"ranks.npz of {mine.name} or {theirs.name} is missing or torn"
    return ""


def _comparison(pairs: list[tuple[Run, Run]], protocol: str, resamples: int) -> list[str]:
    """Difference, interval and p."""
    differences = [1 / mine.ranks(protocol) - 1 / theirs.ranks(protocol) for mine, theirs in pairs]
    mean, low, high, p = paired_bootstrap(np.mean(differences, axis=0), resamples)
    return [f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"]


def paired_bootstrap(
    difference: np.ndarray, resamples: int, seed: int = 0
) -> tuple[float, float, float, float]:
    """Mean, 95 % percentile interval and two-sided p of a paired difference [U].

    Efron and Tibshirani (1993), ch. 13 and 16. p is twice the smaller share of resampled means on
    either side of zero, the sample itself counted among them, so that it is never 0 (Davison and
    Hinkley, 1997, ch. 4).
    """
    rng = np.random.default_rng(seed)
    means, users = [], len(difference)
    chunk = max(1, CHUNK // users)
    for start in range(0, resamples, chunk):
        n = min(resamples - start, chunk)
        drawn = rng.integers(0, users, (n, users), dtype=np.int32)
        means.append(difference[drawn].mean(1))
    resampled = np.concatenate(means)
    low, high = np.quantile(resampled, [0.025, 0.975])
    smaller = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (1 + smaller) / (resamples + 1))
    return float(difference.mean()), float(low), float(high), float(p)
