"""Ranks of the sum of several runs' scores, of each run alone, and of a run at its inner exits, in
one table.

    python -m experiments.together --model output/beauty/student,runs/titles
    python -m experiments.together --model output/beauty/student --exit 1,2,3

The runs are of the same data. The sum is what `recommend.py --model A,B` recommends by. Prints
metrics of the validation and the test set, users per second of evaluation (ranking included; the
first one warms up), and what the sum (or the run's end) has over each other row in test MRR. The
metrics go to --output.
"""

import time
from pathlib import Path

import numpy as np

from experiments.report import markdown
from experiments.significance import PROTOCOLS, bootstrap, holm
from utils import cli, flags
from utils.files import check_writable, write_json
from utils.flags import PositiveInt, flag

SHOWN = {"sampled": ("HR@10", "NDCG@10", "MRR"), "full": ("HR@10", "NDCG@10", "MRR")}


def table(metrics: dict[str, dict[str, dict]]) -> str:
    """Markdown, a row for each model and split.

    Args:
        metrics: model -> split -> protocol -> metric; and users per second of evaluation.
    """
    shown = [f"{p} {name}" for p, names in SHOWN.items() for name in names]
    head = ["model", "split", *shown, "users/s"]
    lines = []
    for model, splits in metrics.items():
        for split, found in splits.items():
            values = [f"{found[p][name]:.4f}" for p, names in SHOWN.items() for name in names]
            lines.append([model, split, *values, f"{found['users_per_second']:.0f}"])
    return markdown(head, lines)


def differences(ranks: dict[str, dict[str, np.ndarray]], best: str, resamples: int) -> str:
    """Markdown: what one model has over each other one in MRR, paired over users.

    p and the interval are a bootstrap's; p is corrected by Holm for all cells of the table.

    Args:
        ranks: model -> protocol -> ranks of the same users [U], 1 the best.
        best: the model that the others are taken from.
    """
    others = [name for name in ranks if name != best]
    pairs = [(name, protocol) for name in others for protocol in PROTOCOLS]
    gained = [1 / ranks[best][protocol] - 1 / ranks[name][protocol] for name, protocol in pairs]
    found = bootstrap([gain[None] for gain in gained], resamples)
    corrected = holm([estimate.p for estimate in found])
    head = ["test MRR"]
    for protocol in PROTOCOLS:
        head += [protocol, "95 % interval", "p, Holm"]
    cells = [[*estimate.shown(), f"{p:.4f}"] for estimate, p in zip(found, corrected)]
    lines = [
        [f"{best} - {name}", *sampled, *full]
        for name, sampled, full in zip(others, cells[::2], cells[1::2])
    ]
    return markdown(head, lines)


@cli.command
def main(
    *,
    files: flags.ServedFiles,
    evaluation: flags.Evaluation,
    eval_batch_size: PositiveInt = flag(512, "users per batch"),
    exit: list[str] = flag([], "numbers of inner exits at which a run is read too, as 1,2"),
    resamples: PositiveInt = flag(20_000, "of the bootstrap"),
    output: str = flag("output/together.json", "where the metrics go"),
) -> dict:
    """Evaluate runs alone, at their exits, and together."""
    from datasets.domain import read_all_served

    given, names = ",".join(map(str, exit)), files.model.split(",")
    cli.check(
        (len(names) > 1 or bool(exit), f"--model={files.model}: name two runs, or --exit"),
        (not exit or len(names) == 1, f"--exit={given}: is of one model, not of several"),
        (not Path(output).is_dir(), f"--output={output} is a folder"),
        (all(str(k).isdigit() and int(k) for k in exit), f"--exit={given}: numbers from 1"),
    )
    check_writable(Path(output).parent, "--output")
    runs = read_all_served(files)
    twice = len({served.run.folder.resolve() for served in runs}) < len(runs)
    cli.check((not twice, f"--model={files.model}: names a run twice"))

    from datasets.sequences import TEST, VALID, EvaluationSplit
    from models import recommender
    from utils import processes
    from utils.evaluation import ranker

    device = processes.choose_device("auto")

    def model_of(served, number: int | None):
        items, popularity = served.item_table(), served.popularity()
        return recommender.of_run(served.run, items, popularity, device, exit=number)

    whole = {str(served.run.folder): model_of(served, None) for served in runs}
    models = dict(whole)
    for served in runs:
        for number in map(int, exit):
            models[f"{served.run.folder}, exit {number}"] = model_of(served, number)
    if len(whole) > 1:
        models["together"] = recommender.together([*whole.values()])
    metrics, tested = {}, {}
    for name, model in models.items():
        protocol = model.max_seq_length, evaluation.candidate_seed, evaluation.num_candidates
        data = runs[0].data
        splits = {
            "valid": EvaluationSplit(data, VALID, *protocol),
            "test": EvaluationSplit(data, TEST, *protocol),
        }
        ranks_of = ranker(model.item_table.detach(), splits, eval_batch_size, device)
        metrics[name] = {}
        for split in splits:
            started = time.perf_counter()
            ranks = ranks_of(lambda: model.encode)(split)
            rate = len(ranks.full) / (time.perf_counter() - started)
            metrics[name][split] = ranks.metrics() | {"users_per_second": rate}
        tested[name] = {protocol: getattr(ranks, protocol) for protocol in PROTOCOLS}
    print(table(metrics))
    print(differences(tested, "together" if len(whole) > 1 else next(iter(whole)), resamples))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(output), metrics)
    print(f"wrote {output}")
    return metrics


if __name__ == "__main__":
    cli.run(main)
