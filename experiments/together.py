"""Ranks of the sum of several runs' scores, and of each alone, in one table.

    python -m experiments.together --model output/beauty/student,runs/titles

The runs are of the same data. The sum is what `recommend.py --model A,B` recommends by. Prints
metrics of the validation and the test set, and writes them to --output.
"""

from pathlib import Path

from utils import cli, flags
from utils.files import check_writable, write_json
from utils.flags import PositiveInt, flag

SHOWN = {"sampled": ("HR@10", "NDCG@10", "MRR"), "full": ("HR@10", "NDCG@10", "MRR")}


def table(metrics: dict[str, dict[str, dict]]) -> str:
    """Markdown, a row for each model and split.

    Args:
        metrics: model -> split -> protocol -> metric.
    """
    head = ["model", "split", *(f"{p} {name}" for p, names in SHOWN.items() for name in names)]
    lines = [head, ["---"] * len(head)]
    for model, splits in metrics.items():
        for split, found in splits.items():
            values = [f"{found[p][name]:.4f}" for p, names in SHOWN.items() for name in names]
            lines.append([model, split, *values])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@cli.command
def main(
    *,
    files: flags.ServedFiles,
    evaluation: flags.Evaluation,
    eval_batch_size: PositiveInt = flag(512, "users per batch"),
    output: str = flag("output/together.json", "where the metrics go"),
) -> dict:
    """Evaluate runs alone and together."""
    from datasets.domain import read_all_served

    cli.check(("," in files.model, f"--model={files.model}: name two runs or more, with commas"))
    check_writable(Path(output).parent, "--output")
    runs = read_all_served(files)

    from datasets.sequences import TEST, VALID, EvaluationSplit
    from models import recommender
    from utils import processes
    from utils.evaluation import ranker

    device = processes.choose_device("auto")
    models = {}
    for served in runs:
        model = recommender.of_run(
            served.run, served.item_table(), served.popularity(), device, exit=None
        )
        models[str(served.run.folder)] = model
    models["together"] = recommender.together([*models.values()])
    metrics = {}
    for name, model in models.items():
        protocol = model.max_seq_length, evaluation.candidate_seed, evaluation.num_candidates
        data = runs[0].data
        splits = {
            "valid": EvaluationSplit(data, VALID, *protocol),
            "test": EvaluationSplit(data, TEST, *protocol),
        }
        ranks_of = ranker(model.item_table.detach(), splits, eval_batch_size, device)
        metrics[name] = {split: ranks_of(lambda: model.encode)(split).metrics() for split in splits}
    print(table(metrics))
    write_json(Path(output), metrics)
    print(f"wrote {output}")
    return metrics


if __name__ == "__main__":
    cli.run(main)
