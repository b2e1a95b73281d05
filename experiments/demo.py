"""The whole method on the demo domain, one table: popularity, SASRec, teacher, student, student without distillation.

    python -m experiments.demo                       # what `make demo` runs; a few minutes on 2 cores
    python -m experiments.demo --seed 1 --output_dir output/demo_seed1

Runs the four scripts with their defaults; the last row is distill.py with every weight 0.
"""

import json
from pathlib import Path

from utils import cli

SCRIPTS = ("sasrec", "teacher", "student", "student_ce")


@cli.command
def main(*, seed: cli.NonNegativeInt = 42, output_dir: str = "output/demo_table", max_steps: cli.MaxSteps = -1) -> None:
    """Run the four steps on the demo domain and print the table.

    Args:
        seed: of every step.
        output_dir: where the steps' folders go.
        max_steps: cut every training short, to try it out.
    """
    import distill
    import extract_emb
    import finetune
    import train_sr_trad

    root = Path(output_dir)
    table = str(root / "sasrec_item.pkl")
    common = {"seed": seed, "max_steps": max_steps, "overwrite": True}
    folders = {name: str(root / name) for name in SCRIPTS}
    _title("step 1: train_sr_trad.py")
    train_sr_trad.main(**common, output_dir=folders["sasrec"])
    _title("step 2: extract_emb.py")
    extract_emb.main(sasrec=folders["sasrec"], item_table=table)
    _title("step 3: finetune.py")
    finetune.main(**common, item_table=table, output_dir=folders["teacher"])
    _title("step 4: distill.py")
    distill.main(**common, item_table=table, teacher=folders["teacher"], output_dir=folders["student"])
    _title("step 4 without distillation: distill.py, every weight 0")
    off = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
    distill.main(**common, **off, item_table=table, output_dir=folders["student_ce"])
    print(f"\n{comparison(root)}\n")
    print("teacher and students stand on a random base (tiny): this shows that the pipeline works, not what language pre-training brings")


def comparison(root: Path) -> str:
    """The table over the results.json files below `root`, as text."""
    import pandas as pd

    results = {name: json.loads((root / name / "results.json").read_text()) for name in SCRIPTS}
    rows = {"popularity": _row({"test": results["sasrec"]["popularity"]["test"]})}
    for name, label in zip(SCRIPTS, ("SASRec", "teacher", "student", "student, CE only")):
        rows[label] = _row(results[name])
    return pd.DataFrame.from_dict(rows, orient="index").to_string(na_rep="-")


def _row(result: dict) -> dict:
    test = result["test"]
    return {
        "HR@1": f"{test['sampled']['HR@1']:.4f}",
        "HR@10": f"{test['sampled']['HR@10']:.4f}",
        "NDCG@10": f"{test['sampled']['NDCG@10']:.4f}",
        "MRR": f"{test['sampled']['MRR']:.4f}",
        "full HR@10": f"{test['full']['HR@10']:.4f}",
        "full NDCG@10": f"{test['full']['NDCG@10']:.4f}",
        "parameters": f"{result['parameters']:,}" if "parameters" in result else "-",
        "trained": f"{result['trainable_parameters']:,}" if "trainable_parameters" in result else "-",
        "train s": f"{result['train_seconds']:.0f}" if "train_seconds" in result else "-",
        "test s": f"{result['inference_seconds']:.1f}" if "inference_seconds" in result else "-",
    }


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    cli.run(main)
