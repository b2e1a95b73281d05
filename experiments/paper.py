"""The rows of the paper's tables: their runs, their names, and the paper's own figures."""

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

# The paper's tables 2 and 3, in %: HR@1, HR@5, NDCG@5, MRR
COLUMNS = ("HR@1", "HR@5", "NDCG@5", "MRR")
PAPER = {
    "cloth": {
        "SASRec": (13.08, 16.94, 15.01, 15.76),
        "E4SRec-like, 32 layers": (16.71, 19.45, 18.09, 18.77),
        "E4SRec-like, 8 layers": (15.30, 18.54, 16.91, 17.60),
        "E4SRec-like, 4 layers": (14.58, 18.05, 16.32, 17.01),
        "SLMRec 4 <- 8": (16.69, 19.47, 18.07, 18.74),
        "4 <- 8: D_cos": (16.10, 18.85, 17.48, 18.17),
        "4 <- 8: D_cos + D_norm": (16.28, 19.12, 17.69, 18.40),
        "4 <- 8: D_cos + L_ms": (16.85, 19.05, 17.96, 18.59),
    },
    "movie": {
        "SASRec": (5.57, 16.80, 11.17, 12.08),
        "E4SRec-like, 32 layers": (14.74, 23.79, 19.45, 19.74),
        "E4SRec-like, 8 layers": (13.32, 22.49, 17.99, 18.46),
        "E4SRec-like, 4 layers": (11.80, 21.54, 16.73, 17.20),
        "SLMRec 4 <- 8": (15.29, 24.25, 19.90, 20.36),
        "4 <- 8: D_cos": (14.83, 23.08, 19.08, 19.45),
        "4 <- 8: D_cos + D_norm": (14.86, 23.89, 19.36, 19.84),
        "4 <- 8: D_cos + L_ms": (15.05, 23.48, 19.40, 19.76),
    },
    "music": {
        "SASRec": (1.82, 5.72, 3.79, 4.51),
        "E4SRec-like, 32 layers": (5.62, 9.29, 7.50, 7.98),
        "E4SRec-like, 8 layers": (5.46, 8.86, 7.21, 7.74),
        "E4SRec-like, 4 layers": (5.33, 8.75, 7.08, 7.59),
        "SLMRec 4 <- 8": (5.72, 9.15, 7.48, 8.03),
        "4 <- 8: D_cos": (5.62, 8.78, 7.23, 7.81),
        "4 <- 8: D_cos + D_norm": (5.95, 9.26, 7.65, 8.23),
        "4 <- 8: D_cos + L_ms": (5.69, 8.94, 7.36, 7.91),
    },
    "sport": {
        "SASRec": (4.70, 8.43, 6.59, 7.24),
        "E4SRec-like, 32 layers": (6.40, 9.67, 8.05, 8.70),
        "E4SRec-like, 8 layers": (5.48, 8.63, 7.06, 7.76),
        "E4SRec-like, 4 layers": (5.41, 8.65, 7.04, 7.72),
        "SLMRec 4 <- 8": (6.62, 9.83, 8.25, 8.89),
        "4 <- 8: D_cos": (6.25, 9.25, 7.76, 8.41),
        "4 <- 8: D_cos + D_norm": (6.61, 9.82, 8.24, 8.87),
        "4 <- 8: D_cos + L_ms": (6.51, 9.39, 7.96, 8.62),
    },
}
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
