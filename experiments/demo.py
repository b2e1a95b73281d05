"""The whole method on the demo domain, one table: popularity, SASRec, teacher, student, student
without distillation.

    python -m experiments.demo                       # what `make demo` runs: 4 minutes on 2 cores
    python -m experiments.demo --seed 1 --output_dir output/demo_seed1

Runs the four scripts with their defaults. The last row is distill.py with every weight 0.
"""

from pathlib import Path

from engine import cli
from engine.cli import NonNegativeInt, flag
from utils.flags import MaxSteps

ROWS = {
    "sasrec": "SASRec",
    "teacher": "teacher",
    "student": "student",
    "student_ce": "student, CE only",
}


@cli.command
def main(
    *,
    seed: NonNegativeInt = flag(42, "of every step"),
    output_dir: str = flag("output/demo_table", "where the steps' folders go"),
    max_steps: MaxSteps = flag(-1, "cut every training short, to try it out"),
) -> None:
    """Run the four steps on the demo domain and print the table."""
    import distill
    import extract_emb
    import finetune
    import train_sr_trad

    root = Path(output_dir)
    table = str(root / "sasrec_item.pkl")
    folders = {name: str(root / name) for name in ROWS}
    common = {"seed": seed, "max_steps": max_steps, "overwrite": True}
    off = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
    _title("step 1: train_sr_trad.py")
    train_sr_trad.main(**common, output_dir=folders["sasrec"])
    _title("step 2: extract_emb.py")
    extract_emb.main(sasrec=folders["sasrec"], item_table=table)
    _title("step 3: finetune.py")
    finetune.main(**common, item_table=table, output_dir=folders["teacher"])
    common |= {"item_table": table, "teacher": folders["teacher"]}
    _title("step 4: distill.py")
    distill.main(**common, output_dir=folders["student"])
    _title("step 4 without distillation: distill.py, every weight 0")
    distill.main(**common, **off, output_dir=folders["student_ce"])
    print(f"\n{comparison(root)}\n")
    print("Teacher and students use a random base (tiny): the table shows that the pipeline")
    print("works, not what language pre-training brings.")


def comparison(root: Path) -> str:
    """The table over the results.json files below `root`, as text."""
    import pandas as pd

    from engine.files import read_json

    results = {name: read_json(root / name / "results.json", "results") for name in ROWS}
    rows = {"popularity": _row({"test": results["sasrec"]["popularity"]["test"]})}
    rows |= {label: _row(results[name]) for name, label in ROWS.items()}
    return pd.DataFrame.from_dict(rows, orient="index").to_string(na_rep="-")


def _row(result: dict) -> dict[str, str]:
    sampled, full = result["test"]["sampled"], result["test"]["full"]

    def shown(name: str, form: str) -> str:
        return format(result[name], form) if name in result else "-"

    row = {name: f"{sampled[name]:.4f}" for name in ("HR@1", "HR@10", "NDCG@10", "MRR")}
    row |= {f"full {name}": f"{full[name]:.4f}" for name in ("HR@10", "NDCG@10")}
    return row | {
        "parameters": shown("parameters", ","),
        "trained": shown("trainable_parameters", ","),
        "train s": shown("train_seconds", ".0f"),
        "test s": shown("inference_seconds", ".1f"),
    }


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    cli.run(main)
