"""Metrics of the sum of several runs' scores, of each run alone, and of a run at its inner exits.

    python -m experiments.together --model output/beauty/student,runs/titles
    python -m experiments.together --model output/beauty/student --exit 1,2,3

The runs are of the same data. The sum is what `serving.recommend --model A,B` recommends by. Users
per second are of the evaluation, ranking included; the first one warms up.
"""

import time
from pathlib import Path

from engine import cli
from engine.cli import flag
from engine.files import check_writable, write_json
from experiments.report import markdown
from serving.served import ServedFiles, read_all
from utils.flags import Evaluation, Runtime

SHOWN = [(p, name) for p in ("sampled", "full") for name in ("HR@10", "NDCG@10", "MRR")]


def table(metrics: dict[str, dict[str, dict]]) -> str:
    """Markdown, a row for each model and split.

    Args:
        metrics: model -> split -> protocol -> metric; and users per second of evaluation.
    """
    lines = []
    for model, splits in metrics.items():
        for split, found in splits.items():
            values = [f"{found[protocol][name]:.4f}" for protocol, name in SHOWN]
            lines.append([model, split, *values, f"{found['users_per_second']:.0f}"])
    names = [f"{protocol} {name}" for protocol, name in SHOWN]
    return markdown(["model", "split", *names, "users/s"], lines)


@cli.command
def main(
    *,
    files: ServedFiles,
    evaluation: Evaluation,
    exit: list[str] = flag([], "numbers of inner exits at which a run is read too, as 1,2"),
    output: str = flag("output/together.json", "where the metrics go"),
) -> dict:
    """Evaluate runs alone, at their exits, and together."""
    given, names = ",".join(map(str, exit)), files.model.split(",")
    cli.check(
        (len(names) > 1 or bool(exit), f"--model={files.model}: name two runs, or --exit"),
        (not exit or len(names) == 1, f"--exit={given}: is of one model, not of several"),
        (not Path(output).is_dir(), f"--output={output} is a folder"),
        (all(str(k).isdigit() and int(k) for k in exit), f"--exit={given}: numbers from 1"),
    )
    check_writable(Path(output).parent, "--output")
    runs = read_all(files)
    twice = len({served.run.folder.resolve() for served in runs}) < len(runs)
    cli.check((not twice, f"--model={files.model}: names a run twice"))

    from datasets.sequences import evaluation_splits
    from engine import processes
    from serving.recommender import open_runs
    from utils.evaluation import evaluate

    device, data = processes.choose_device("auto"), runs[0].data
    models = {}
    for served in runs:
        name = str(served.run.folder)
        models[name] = open_runs([served], data.item_ids, device, None)
        for k in map(int, exit):
            models[f"{name}, exit {k}"] = open_runs([served], data.item_ids, device, k)
    if len(runs) > 1:
        models["together"] = open_runs(runs, data.item_ids, device, None)
    metrics: dict[str, dict] = {}
    for name, model in models.items():
        splits = evaluation_splits(data, model.max_seq_length, evaluation)
        metrics[name] = {}
        for split, content in splits.items():
            started = time.perf_counter()
            ranks = evaluate(model, content, Runtime())
            rate = len(ranks.full) / (time.perf_counter() - started)
            metrics[name][split] = ranks.metrics() | {"users_per_second": rate}
    print(table(metrics))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(output), metrics)
    print(f"wrote {output}")
    return metrics


if __name__ == "__main__":
    cli.run(main)
