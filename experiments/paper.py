"""The rows of the paper's tables: their runs, their names, and the paper's own figures."""

import csv
from pathlib import Path
from typing import Any

from utils.flags import reads_teacher, terms

OFF = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
SASREC_KL = {"sasrec_lambda": 3.0, "sasrec_temperature": 2.0}
# folder -> flags of distill.py; what a row does not turn off keeps its weight. A student starts
# from the base, as in the paper, unless its row says otherwise.
ROWS: dict[str, dict[str, Any]] = {
    "ce": OFF,
    "cos": {"norm_lambda": 0.0, "cls_multiple_lambda": 0.0},
    "cos_norm": {"cls_multiple_lambda": 0.0},
    "cos_ms": {"norm_lambda": 0.0},
    "slmrec": {},
    "ce_ms": {"distill_lambda": 0.0, "norm_lambda": 0.0},
    "logit_kl": OFF | {"logit_lambda": 1.0},
    "slmrec_logit_kl": {"logit_lambda": 1.0},
    "sasrec_kl": OFF | SASREC_KL,
    "cos_sasrec_kl": {"norm_lambda": 0.0, "cls_multiple_lambda": 0.0} | SASREC_KL,
    "slmrec_sasrec_kl": SASREC_KL,
    "exit_norm": {"exit_norm": True},
    "online": {"distill_mode": "online"},
    "blocks_1": {"distill_block": 1, "cls_multiple_lambda": 0.0},
    "blocks_2": {"distill_block": 2},
    "interval": {"layer_selection": "interval"},
    "last": {"layer_selection": "last"},
    "ce_from_teacher": OFF | {"student_init": "teacher"},
    "from_teachers_ends": {"student_init": "adapter"},
    "from_teacher": {"student_init": "teacher"},
    "from_teacher_interval": {"student_init": "teacher", "layer_selection": "interval"},
}
ABLATION = {name: {"student_init": "base"} | flags for name, flags in ROWS.items()}

COLUMNS = ("HR@1", "HR@5", "NDCG@5", "MRR")


def published() -> dict[str, dict[str, tuple[float, ...]]]:
    """Domain -> row -> the paper's COLUMNS in % (tables 2 and 3)."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    with open(Path(__file__).with_name("paper.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = tuple(float(row[name]) for name in COLUMNS)
            found.setdefault(row["domain"], {})[row["row"]] = values
    return found


PAPER = published()
# Fig. 2 (cloth), read off the figure: layers -> HR@10, NDCG@10, MRR; SASRec's band
FIGURE2 = {
    1: (0.2073, 0.1654, 0.1620),
    2: (0.2081, 0.1684, 0.1654),
    4: (0.2092, 0.1725, 0.1701),
    8: (0.2129, 0.1779, 0.1760),
    16: (0.2105, 0.1785, 0.1773),
    24: (0.2110, 0.1821, 0.1813),
    32: (0.2186, 0.1886, 0.1877),
}


def main_rows(student: int, teacher: int) -> list[str]:
    """The main table's rows where most students are `student` <- `teacher`, and 2 <- `teacher`."""
    both = []
    for n in dict.fromkeys((student, 2)):
        blocks = ", B = 2" if n == 2 else ""
        both += [plain_name(n), f"SLMRec {n} <- {teacher}{blocks}"]
    names = dict.fromkeys([plain_name(teacher), *both])
    return ["popularity", "SASRec, as released", "SASRec", *names]


def plain_name(layers: int) -> str:
    """An LLM row trained by cross-entropy alone, as E4SRec is."""
    return f"E4SRec-like, {layers} layer{'s' if layers > 1 else ''}"


def plain_ce(flags: dict[str, Any]) -> bool:
    """Whether an LLM run is trained by cross-entropy alone from the base, by either script."""
    from_base = flags.get("student_init") in (None, "base")
    return from_base and not any(flags.get(name) for name in terms())


def label(stage: str, flags: dict[str, Any]) -> str:
    """The name of a run's row. Runs of equal label differ in training settings alone.

    Args:
        stage: sasrec, teacher or student.
        flags: as config.json has them, inherited ones filled in.
    """
    if stage == "sasrec":
        return _sasrec(flags)
    teacher = stage == "teacher"
    depth = "llama_decoder_nums" if teacher else "llama_decoder_nums_student"
    layers = flags[depth]
    parts = []
    if plain_ce(flags):
        parts.append(plain_name(layers))
    elif teacher:
        named = [name for weight, name in terms().items() if flags.get(weight)]
        parts.append(f"{layers} layers: " + " + ".join(["CE", *named]))
    else:
        parts += _student(layers, flags)
    if flags["layer_selection"] != "first":
        parts.append(f"{flags['layer_selection']} layers")
    if flags["train_targets"] == "all":
        parts.append("every prefix")
    return ", ".join(parts)


def _sasrec(flags: dict[str, Any]) -> str:
    """The first release trains at length 30, the later official script at length 50."""
    if flags["train_targets"] == "all":
        return "SASRec"
    if flags["init_std"] != 1:
        return "SASRec, one target per user"
    later = flags.get("max_seq_length") == 50
    return "SASRec, as released later" if later else "SASRec, as released"


def _student(layers: int, flags: dict[str, Any]) -> list[str]:
    """The name of a student's row, and what else sets it apart."""
    named = [name for weight, name in terms().items() if flags.get(weight)]
    if not reads_teacher(flags):
        name = f"{layers} layers: " + " + ".join(["CE", *named])
    else:
        between = f"{layers} <- {flags['llama_decoder_nums_teacher']}"
        name = f"{between}: " + " + ".join(named)
        if named[:3] == ["D_cos", "D_norm", "L_ms"]:
            name = " + ".join([f"SLMRec {between}", *named[3:]])
    parts = [name]
    by_blocks = ("distill_lambda", "norm_lambda", "cls_multiple_lambda")
    if flags["distill_block"] != 4 and any(flags.get(weight) for weight in by_blocks):
        parts.append(f"B = {flags['distill_block']}")
    if flags["distill_mode"] == "online":
        parts.append("online")
    if flags.get("exit_norm") and flags.get("cls_multiple_lambda"):
        parts.append("normed exits")
    if flags.get("student_init") == "adapter":
        parts.append("from the teacher's adapter and head")
    if flags.get("student_init") == "teacher":
        parts.append("from the teacher's layers")
    return parts
