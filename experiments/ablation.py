"""The paper's ablation and what its readers asked for: what each loss term, block map, layer choice
and start brings.

    python -m experiments.ablation                    # demo domain, base tiny: 4 minutes on 2 cores
    python -m experiments.ablation --rows ce,cos,cos_norm,cos_ms,slmrec    # the paper's five alone
    python -m experiments.ablation --domain_type cloth --base_model meta-llama/Llama-2-7b-hf \
        --seeds 0,1,2 --teacher_flags "--num_epochs 3 --warmup_steps 100" \
        --student_flags "--learning_rate 3e-3 --max_steps 1500 --warmup_steps 50 \
        --eval_steps 50 --save_steps 50"      # as cloth.sh, whose runs it takes

Below --output_dir (output/<domain>/paper by default) each seed has one SASRec, one item table, one
teacher and the teacher's states, made once and shared by its rows. A finished run is read, not
repeated, so that an interrupted suite resumes. Ends
with the report over that folder. Rows: ce, cos, cos_norm, cos_ms, slmrec (all three terms), ce_ms
(exits without a teacher), logit_kl, slmrec_logit_kl, sasrec_kl (SASRec the only teacher),
cos_sasrec_kl, slmrec_sasrec_kl, exit_norm, online, blocks_1, blocks_2, interval, last
(the base's layers), from_teachers_ends (its adapter and head as the start), ce_from_teacher,
from_teacher, from_teacher_interval (the trained teacher's layers).
"""

from pathlib import Path

from engine import cli
from engine.cli import flag
from experiments.suite import SuiteFlags, open_suite


@cli.command
def main(
    *,
    given: SuiteFlags,
    rows: list[str] = flag(["all"], "which rows, in this order"),
    student_flags: str = flag("--num_epochs 10", "flags of distill.py, in quotes"),
) -> Path:
    """Run every row that is not there yet, for every seed, and write the report."""
    from engine.files import read_json
    from experiments import report
    from experiments.paper import ABLATION

    unknown = [name for name in rows if name not in (*ABLATION, "all")]
    known = ", ".join(ABLATION)
    cli.check((not unknown, f"--rows: there is no row {', '.join(unknown)}; choose from {known}"))
    texts = {"sasrec": given.sasrec_flags, "teacher": given.teacher_flags, "student": student_flags}
    suite = open_suite(given, texts)
    # Rows without a teacher read what the others read.
    shared = ("max_seq_length", "prompt_template_name")
    theirs = [n for n in (*shared, "llama_decoder_nums_teacher") if n in suite.extra["student"]]
    cli.check(
        (
            not theirs,
            f"--student_flags: --{', --'.join(theirs)} is the teacher's, for rows without one too;"
            " give it in --teacher_flags",
        )
    )
    for seed in given.seeds:
        suite.item_table(seed)
        teacher = suite.run("teacher", seed, "teacher")
        trained = read_json(teacher / "config.json", "teacher")["flags"]
        for name in ABLATION if "all" in rows else dict.fromkeys(rows):
            flags = {name: trained[name] for name in shared}
            if name == "online":
                flags["llama_decoder_nums_teacher"] = trained["llama_decoder_nums"]
            flags |= ABLATION[name]
            if "sasrec_lambda" in flags:
                flags["sasrec"] = str(suite.folder(seed) / "sasrec")
            suite.run("student", seed, name, teacher=str(teacher), **flags)
    return report.main(runs=str(suite.root))


if __name__ == "__main__":
    cli.run(main)
