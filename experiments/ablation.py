"""The paper's ablation and what its readers asked for: which parts of the loss, which blocks, layers and start bring what.

    python -m experiments.ablation                                       # the demo domain and base tiny, a few minutes on 2 cores
    python -m experiments.ablation --rows ce,cos,cos_norm,cos_ms,slmrec  # the paper's five rows alone
    python -m experiments.ablation --domain_type cloth --base_model meta-llama/Llama-2-7b-hf --seeds 0,1,2 \
        --teacher_flags "--num_epochs 3 --warmup_steps 100" --student_flags "--learning_rate 3e-3 --max_steps 1500"

Below --output_dir (output/<domain>/paper by default) each seed has one SASRec, one item table, one teacher and the teacher's
states, made once and shared by its rows. What is finished is read, not run again, so that a broken suite goes on. Ends with
the report over that folder. Rows: ce, cos, cos_norm, cos_ms, slmrec (all three parts), ce_ms (exits without a teacher),
logit_kl, slmrec_logit_kl, online, blocks_1, blocks_2, interval, last, influence (the base's layers), ce_from_teacher,
from_teacher, from_teacher_interval (the trained teacher's layers).
"""

from pathlib import Path
from typing import Literal

from utils import cli, runlog


@cli.command
def main(
    *,
    domain_type: str = "demo",
    data_path: str | None = None,
    base_model: str = "tiny",
    rows: list[str] = ["all"],  # noqa: B006  read, never changed
    seeds: list[int] = [42],  # noqa: B006
    sasrec_flags: str = "",
    teacher_flags: str = "--num_epochs 10",
    student_flags: str = "--num_epochs 10",
    output_dir: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> Path:
    """Run every row that is not there yet, for every seed, and write the report.

    Args:
        domain_type, data_path: the domain, and its CSV wherever it is.
        base_model: of teacher and students.
        rows: which rows, in this order; all by default.
        seeds: a run of everything for each, SASRec included.
        sasrec_flags, teacher_flags, student_flags: flags of train_sr_trad.py, finetune.py and distill.py, in quotes.
        output_dir: where the runs go; output/<domain>/paper by default.
        device: auto is cuda where there is one.
        overwrite: run again what is finished.
    """
    from experiments.rows import ABLATION

    unknown = [name for name in rows if name not in (*ABLATION, "all")]
    cli.check((not unknown, f"--rows: there is no row {', '.join(unknown)}; choose from {', '.join(ABLATION)}"))
    from experiments import report
    from experiments.runs import open_suite

    texts = {"sasrec": sasrec_flags, "teacher": teacher_flags, "student": student_flags}
    suite = open_suite(domain_type, data_path, output_dir, base_model, device, texts, overwrite)
    theirs = [name for name in ("max_seq_length", "prompt_template_name", "llama_decoder_nums_teacher") if name in suite.extra["student"]]
    cli.check((not theirs, f"--student_flags: --{', --'.join(theirs)} is the teacher's, for rows without one too; give it in --teacher_flags"))
    for seed in seeds:
        suite.item_table(seed)
        teacher = suite.run("teacher", seed, "teacher")
        trained = runlog.read_json(teacher / "config.json", "teacher")["flags"]
        same = {name: trained[name] for name in ("max_seq_length", "prompt_template_name")}  # rows without a teacher read what the others read
        for name in ABLATION if "all" in rows else dict.fromkeys(rows):
            depth = {"llama_decoder_nums_teacher": trained["llama_decoder_nums"]} if name == "online" else {}
            suite.run("student", seed, name, teacher=str(teacher), **same | depth | ABLATION[name])
    return report.main(runs=str(suite.root))


if __name__ == "__main__":
    cli.run(main)
