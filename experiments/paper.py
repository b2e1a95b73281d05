"""The rows of the paper's tables: their runs, their names, and the paper's own figures."""

import csv
from pathlib import Path
from typing import Any

from distill import StudentLoss

COLUMNS = ("HR@1", "HR@5", "NDCG@5", "MRR")
_PAPERS = ("distill_lambda", "norm_lambda", "cls_multiple_lambda")
TERMS = {name: StudentLoss.terms()[name] for name in (*_PAPERS, *StudentLoss.terms())}


def published() -> dict[str, dict[str, tuple[float, ...]]]:
    """Domain -> row -> the paper's COLUMNS in % (tables 2 and 3)."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    with open(Path(__file__).with_name("paper.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = tuple(float(row[name]) for name in COLUMNS)
            found.setdefault(row["domain"], {})[row["row"]] = values
    return found


PAPER = published()


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
    return from_base and not any(flags.get(name) for name in TERMS)


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
        named = [name for weight, name in TERMS.items() if flags.get(weight)]
        parts.append(f"{layers} layers: " + " + ".join(["CE", *named]))
        parts += ["normed exits"] * bool(flags.get("exit_norm") and flags["cls_multiple_lambda"])
    else:
        parts += _student(layers, flags)
    if flags["layer_selection"] != "first":
        parts.append(f"{flags['layer_selection']} layers")
    if flags["train_targets"] == "all":
        parts.append("every prefix")
    return ", ".join(parts)


def _sasrec(flags: dict[str, Any]) -> str:
    """The first release trains at length 30, the later official script at length 50."""
    if flags.get("alpha"):
        return f"BSARec, alpha {flags['alpha']:g}"
    if flags["train_targets"] == "all":
        return "SASRec"
    released = {"init_std": 1, "norm": "query", "loss": "full"}
    if any(flags.get(name, value) != value for name, value in released.items()):
        return "SASRec, one target per user"
    later = flags.get("max_seq_length") == 50
    return "SASRec, as released later" if later else "SASRec, as released"


def _student(layers: int, flags: dict[str, Any]) -> list[str]:
    """The name of a student's row, and what else sets it apart."""
    named = [name for weight, name in TERMS.items() if flags.get(weight)]
    if not any(flags.get(weight) for weight in StudentLoss.terms(of_teacher=True)):
        name = f"{layers} layers: " + " + ".join(["CE", *named])
    else:
        between = f"{layers} <- {flags['llama_decoder_nums_teacher']}"
        name = f"{between}: " + " + ".join(named)
        if named[:3] == ["D_cos", "D_norm", "L_ms"]:
            name = " + ".join([f"SLMRec {between}", *named[3:]])
    parts = [name]
    if any(flags.get(weight) for weight in _PAPERS):
        blocks = flags.get("block_map")
        if blocks or flags["distill_block"] != 4:
            parts.append(f"blocks {blocks}" if blocks else f"B = {flags['distill_block']}")
    if flags["distill_mode"] == "online":
        parts.append("online")
    if flags.get("exit_norm") and flags.get("cls_multiple_lambda"):
        parts.append("normed exits")
    if flags.get("student_init") == "adapter":
        parts.append("from the teacher's adapter and head")
    if flags.get("student_init") == "teacher":
        parts.append("from the teacher's layers")
    return parts
