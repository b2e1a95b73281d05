"""Every flag of the four scripts, once, with type, default, help and rules. EDIT HERE.

The student's loss alone has its flags in distill.py, beside the sum.

A group's kind says what may differ when a run resumes:

* files: where files are. Paths may differ, their content not.
* model: what the trained model depends on. `--eval_only` reads it from the run.
* training: how the model is trained.
* free: what does not change results (speed, logs). It may differ.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from engine import processes
from engine.cli import (
    DropRate,
    Group,
    Limits,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    flag,
    pattern,
    positive_or,
)

LAYER_RULES = ("first", "interval", "last")
SASREC = "the step-1 run, by default output/<domain>/sasrec; a,b for a table of several"
TARGETS = (
    "one target per user (last), or one per position (SASRec) or prefix (LLM, --alpha) of a "
    "history (all); "
    "by default SASRec takes all, an LLM last unless the users are fewer than two batches"
)
EXITS = "weight of the cross-entropy at the inner block ends (lambda3); 0 trains no exits"
NOT_FULL = "train_strategy=lora|train_strategy=auto"
READS_TEACHER = "*teacher"  # any weight with teacher=True
USES_BLOCKS = f"{READS_TEACHER}|cls_multiple_lambda"
N_TEACHER = 8  # M, of an online teacher
STUDENT_STREAM = 0x5EED_0F_57D  # between a student's draws and those of a teacher of equal --seed
NUMBERS = r"[0-9]+( *, *[0-9]+)*"
Share = Annotated[float, Limits(">= 0 and <= 1", lambda x: 0 <= x <= 1)]
MaxSteps = Annotated[int, positive_or(-1, "num_epochs")]  # -1 as in the released scripts
Interval = Annotated[int, positive_or(-1, "every epoch")]
LayerSelection = Annotated[
    str,
    pattern(
        rf"{'|'.join(LAYER_RULES)}|{NUMBERS}|\[{NUMBERS}\]",
        f"one of {', '.join(LAYER_RULES)}, or numbers (0,2,4,6)",
    ),
]
Split = Annotated[
    str, pattern(r"leave_one_out|time:0?\.\d*[1-9]\d*", "leave_one_out, or time:Q such as time:0.9")
]
BlockMap = Annotated[str, pattern(r"[0-9]+:[0-9]+(,[0-9]+:[0-9]+)*", "pairs such as 2:4,4:8")]


def weight(default: float, help: str, term: str, teacher: bool = True) -> Any:
    """The weight of a loss term, a flag that ends in _lambda.

    Args:
        term: its name in tables.
        teacher: whether it reads the LLM teacher's output.
    """
    return flag(default, help, term=term, teacher=teacher)


# -- files --------------------------------------------------------------------------------------


class Data(Group, kind="files"):
    """The domain"""

    domain_type: str = flag(
        "demo",
        "the domain; its CSV is data/<domain>.csv[.gz|.xz]; demo is made on first use",
        replaces="data_path|ends_are_items|split|item_table|sasrec|teacher|init_table|init_from",
    )
    data_path: str | None = flag(None, "the domain's CSV, wherever it is")
    ends_are_items: bool = flag(False, "list ends that look like padding or markers are items")
    split: Split | None = flag(
        None, "leave_one_out (default), or time:0.9: targets after the first 90 % of interactions"
    )


class Output(Group, kind="files"):
    """Where the run goes"""

    output_dir: str | None = flag(
        None, "the run's folder; output/<domain>/<sasrec, teacher or student> by default"
    )
    init_from: str | None = flag(
        None, "a run of the same stage to start from", replaces="student_init|init_table"
    )


class ItemTable(Group, kind="files"):
    """Where the item table is"""

    item_table: str | None = flag(None, "step 2's file; output/<domain>/sasrec_item.pkl by default")


class SASRecFiles(Output, Data):
    """Files"""

    init_table: str | None = flag(
        None,
        "an item table to start from (experiments.titles makes one), scaled to init_std",
        replaces="init_from",
    )

    def problems(self, flags: dict[str, Any]) -> list[str]:
        lines = []
        if self.init_table and self.init_from:
            lines.append("--init_from and --init_table both say where to start; give one of them")
        if self.init_table and not Path(self.init_table).is_file():
            lines.append(f"--init_table={self.init_table}: file not found")
        return lines


class ExtractFiles(ItemTable, Data):
    """Files"""

    sasrec: str | None = flag(None, SASREC)


class TeacherFiles(Output, ItemTable, Data):
    """Files"""

    sasrec: str | None = flag(None, SASREC, needs="sasrec_lambda")
    teacher_cache: str = flag(
        "auto",
        "where a frozen teacher's outputs are kept for later runs: auto is teacher_states/ beside "
        "the teacher, off runs the teacher in every step",
        needs=f"{READS_TEACHER}|sasrec_lambda",
    )


class StudentFiles(TeacherFiles):
    """Files"""

    teacher: str | None = flag(
        None,
        "the step-3 run; output/<domain>/teacher by default",
        needs=f"{READS_TEACHER}|student_init=adapter|student_init=teacher",
        replaces="base_model|prompt_template_name|max_seq_length|llama_decoder_nums_teacher",
    )

    def problems(self, flags: dict[str, Any]) -> list[str]:
        lines = []
        from_teacher = flags["student_init"] in ("adapter", "teacher") and not flags["eval_only"]
        if self.init_from and from_teacher:
            lines.append("--init_from and --student_init both say where to start; give one of them")
        return lines


# -- model --------------------------------------------------------------------------------------


class Sequence(Group, kind="model"):
    """What the model reads"""

    max_seq_length: PositiveInt | None = flag(30, "how many of the last items are read")


class Prompt(Sequence):
    """What the LLM reads; teacher and student agree on it"""

    base_model: str | None = flag(
        "tiny",
        "a Hugging Face id, a folder, smollm2 (after `make smollm2`), or a built-in random base: "
        "tiny (hidden 64) or small (hidden 256)",
    )
    prompt_template_name: str | None = flag("alpaca", "templates/<name>.json, or a path to one")


FROM_TEACHER = Prompt(base_model=None, prompt_template_name=None, max_seq_length=None)


class SASRecModel(Group, kind="model"):
    """SASRec"""

    emb_dim: PositiveInt = flag(128, "width of the item table")
    hid_dim: PositiveInt = flag(32, "width of the transformer; projected where it is another")
    num_blocks: PositiveInt = flag(2, "transformer blocks")
    num_heads: PositiveInt = flag(1, "attention heads")
    dropout: DropRate = flag(0.5, "dropout in the transformer")
    norm: Literal["query", "pre", "post"] = flag("query", "where LayerNorm is; released: query")
    init_std: PositiveFloat = flag(0.02, "standard deviation of new embeddings; released: 1")
    alpha: Share = flag(
        0.0, "above 0: BSARec's blocks, and the share of their frequency layer beside attention"
    )
    low_frequencies: PositiveInt = flag(3, "how many of the lowest it keeps", needs="alpha")

    def problems(self, flags: dict[str, Any]) -> list[str]:
        lines = []
        if self.hid_dim % self.num_heads:
            lines.append(f"--num_heads={self.num_heads} does not divide --hid_dim={self.hid_dim}")
        if self.alpha and "norm" in self.given:
            lines.append("--norm is of SASRec's blocks, --alpha has BSARec's: give one of them")
        return lines


class LLM(Group, kind="model"):
    """Which decoder layers are kept, and what is trained"""

    layer_selection: LayerSelection = flag("first", "first, interval, last, or numbers: 0,2,4,6")
    interval_nums: PositiveInt = flag(
        1, "one layer in interval_nums + 1 is left out", needs="layer_selection=interval"
    )
    train_strategy: Literal["auto", "lora", "full"] = flag(
        "auto", "lora (base frozen) or full; auto is full for the built-in random bases, else lora"
    )


class TeacherLLM(LLM):
    """Which decoder layers are kept, and what is trained"""

    llama_decoder_nums: PositiveInt = flag(8, "M, decoder layers kept")


class StudentLLM(LLM):
    """Which decoder layers are kept, and what is trained"""

    stream = STUDENT_STREAM

    llama_decoder_nums_student: PositiveInt = flag(4, "N, decoder layers kept")
    llama_decoder_nums_teacher: PositiveInt | None = flag(
        None, "M; the trained teacher's, or 8 online", needs=READS_TEACHER
    )
    distill_mode: Literal["offline", "online"] = flag(
        "offline",
        "offline: a frozen teacher; online: both are trained",
        needs=READS_TEACHER,
        replaces="teacher|student_init",
    )
    student_init: Literal["base", "adapter", "teacher"] | None = flag(
        None,
        "start from the base; adapter takes the trained teacher's item adapter and head, teacher "
        "also its layers (layer_selection chooses among them); adapter where there is a teacher",
        replaces="init_from",
    )

    def problems(self, flags: dict[str, Any]) -> list[str]:
        start = self.student_init
        if start in (None, "base") or self.distill_mode == "offline":
            return []
        way = "give base, or --distill_mode=offline"
        return [f"--student_init={start} starts from a trained teacher: {way}"]


class LoRA(Group, kind="model"):
    """LoRA; without effect where the base is trained in full"""

    lora_r: PositiveInt = flag(16, "rank", needs=NOT_FULL)
    lora_alpha: PositiveInt = flag(16, "scale", needs=NOT_FULL)
    lora_dropout: DropRate = flag(0.05, "dropout", needs=NOT_FULL)
    lora_target_modules: list[str] = flag(
        ["gate_proj", "up_proj", "down_proj"], "the projections that get LoRA", needs=NOT_FULL
    )


class TeacherLoss(Group, kind="model"):
    """The loss beside the cross-entropy at the end; a weight of 0 leaves a term out"""

    distill_block: PositiveInt = flag(
        4, "B, blocks of equally many layers", needs=USES_BLOCKS, replaces="block_map"
    )
    cls_multiple_lambda: NonNegativeFloat = weight(0.0, EXITS, "L_ms", teacher=False)
    block_reduction: Literal["sum", "mean"] = flag(
        "sum", "over blocks and exits: sum (released) or mean (paper)", needs=USES_BLOCKS
    )
    exit_norm: bool = flag(
        False,
        "inner exits read normed states (released: raw)",
        needs="cls_multiple_lambda|logit_lambda",
    )
    sasrec_lambda: NonNegativeFloat = weight(
        0.0, "weight of the KL from SASRec's catalogue softmax", "SASRec KL", teacher=False
    )
    sasrec_temperature: PositiveFloat = flag(1.0, "of SASRec's KL", needs="sasrec_lambda")

    def problems(self, flags: dict[str, Any]) -> list[str]:
        lines, pairs = [], flags.get("block_map")
        one = "," not in pairs if pairs else self.distill_block == 1
        if pairs and "distill_block" in self.given:
            lines.append("--block_map and --distill_block both say the blocks: give one")
        elif one and "cls_multiple_lambda" in self.given and self.uses_exits:
            shown = f"--cls_multiple_lambda={self.cls_multiple_lambda:g}"
            lines.append(f"{shown}: one block has no inner exit; name more blocks, or give 0")
        if flags.get("teacher") and flags["distill_mode"] == "online" and self.reads_teacher:
            lines.append("--teacher is a trained one, --distill_mode=online trains one: give one")
        return lines

    @classmethod
    def terms(cls, of_teacher: bool = False) -> dict[str, str]:
        """Weight of a loss term -> the term's name in tables; of those that read the LLM teacher
        alone where `of_teacher`.
        """
        weights = [field for field in cls.fields() if "term" in field.metadata]
        kept = [field for field in weights if field.metadata["teacher"] or not of_teacher]
        return {field.name: field.metadata["term"] for field in kept}

    @property
    def reads_teacher(self) -> bool:
        """Whether any term with a weight reads the LLM teacher's output."""
        return any(getattr(self, name) > 0 for name in self.terms(of_teacher=True))

    @property
    def uses_exits(self) -> bool:
        """Whether inner block ends predict too."""
        return self.cls_multiple_lambda > 0

    @property
    def uses_blocks(self) -> bool:
        """Whether any term that uses block ends has a weight."""
        return self.uses_exits or self.reads_teacher


class Evaluation(Group, kind="model"):
    """The sampled protocol; the same candidates for all models and seeds"""

    num_candidates: PositiveInt = flag(999, "negatives per user in the sampled protocol")
    candidate_seed: NonNegativeInt = flag(42, "seed for drawing these negatives")


# -- training -----------------------------------------------------------------------------------


class Training(Group, kind="training"):
    """Training; an empty flag adapts to the amount of data"""

    usual = {"num_epochs": 20, "warmup_steps": 50, "patience": 10, "eval_steps": 100}
    train_targets: Literal["last", "all"] | None = flag(None, TARGETS)
    select: Literal["sampled_mrr", "full_ndcg10"] = flag(
        "sampled_mrr", "the validation metric that chooses best/ and ends patience"
    )
    batch_size: PositiveInt = flag(256, "users per optimizer step")
    num_epochs: PositiveInt | None = flag(
        None,
        "passes over the data; by default 20 (SASRec 200), at least 240 steps",
        replaces="max_steps",
    )
    max_steps: MaxSteps = flag(
        -1, "optimizer steps, instead of num_epochs; -1 for none", replaces="num_epochs"
    )
    learning_rate: PositiveFloat = flag(1e-3, "peak learning rate of AdamW")
    lr_scheduler: Literal["cosine", "linear", "constant"] = flag(
        "cosine", "learning rate after the warm-up"
    )
    warmup_steps: NonNegativeInt | None = flag(
        None, "steps of linear warm-up; by default 50 (SASRec 0), at most a tenth of all"
    )
    weight_decay: NonNegativeFloat = flag(0.0, "weight decay of AdamW")
    max_grad_norm: NonNegativeFloat = flag(1.0, "clip gradients to this norm; 0 disables clipping")
    patience: NonNegativeInt | None = flag(
        None,
        "evaluations without a better one before the end; 0: no end; 10, but not before step 500",
    )
    eval_steps: Interval | None = flag(
        None, "steps between evaluations; -1 for every epoch (SASRec); 100, at least five in all"
    )
    seed: Seed = flag(42, "seed of new weights, sample order and dropout")
    bf16: bool | None = flag(None, "compute in bfloat16; by default on CUDA (SASRec: off)")

    def problems(self, flags: dict[str, Any]) -> list[str]:
        both = self.max_steps > 0 and self.num_epochs is not None
        return ["--max_steps and --num_epochs: give one of them"] * both


class SASRecTraining(Training):
    """Training; an empty flag adapts to the amount of data"""

    usual = {"num_epochs": 200, "warmup_steps": 0, "patience": 10, "eval_steps": -1}
    train_targets: Literal["last", "all"] | None = flag("all", TARGETS)
    lr_scheduler: Literal["cosine", "linear", "constant"] = flag(
        "constant", "learning rate after the warm-up"
    )
    max_grad_norm: NonNegativeFloat = flag(0.0, "clip gradients to this norm; 0 disables clipping")
    bf16: bool = flag(False, "compute in bfloat16; by default on CUDA (SASRec: off)")
    loss: Literal["full", "sampled"] = flag(
        "full", "cross-entropy over the catalogue, or over uniform negatives (millions of items)"
    )
    num_negatives: PositiveInt = flag(256, "per user; its positions share them", "loss=sampled")


# -- free ---------------------------------------------------------------------------------------


class Runtime(Group, kind="free"):
    """Speed, memory, logs"""

    shard = False
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available")
    micro_batch_size: PositiveInt | None = flag(
        None, "users per forward pass, by default batch_size; gradients accumulate to that"
    )
    eval_batch_size: PositiveInt = flag(512, "users per batch in evaluation")
    save_steps: Interval | None = flag(
        None, "steps between writing last/; -1 for every epoch (SASRec); 100, at least five in all"
    )
    log_steps: PositiveInt = flag(10, "steps between lines of metrics.jsonl")
    tensorboard: bool = flag(False, "also write TensorBoard events")
    eval_only: bool = flag(False, "evaluate best/ and write results.json; train nothing")
    overwrite: bool = flag(False, "start from scratch in a folder that holds a run")

    def problems(self, flags: dict[str, Any]) -> list[str]:
        """Whole micro-batches of every process must fill a batch."""
        world, micro, batch_size = processes.world(), self.micro_batch_size, flags["batch_size"]
        if self.eval_only or batch_size % ((micro or 1) * world) == 0:
            return []
        factors = [f"{world} processes"] if world > 1 else []
        factors += [f"--micro_batch_size={micro}"] if micro else []
        return [f"--batch_size={batch_size} is not a multiple of {' x '.join(factors)}"]


class LLMRuntime(Runtime):
    """Speed, memory, logs"""

    gradient_checkpointing: bool = flag(False, "recompute layers in backward to save memory")
    compile: bool = flag(False, "torch.compile the layers: a slow first step, then shorter ones")
    shard: bool = flag(
        False, "divide weights and optimizer among torchrun's processes (a base larger than a GPU)"
    )

    def problems(self, flags: dict[str, Any]) -> list[str]:
        lines = super().problems(flags)
        if self.shard and processes.world() == 1:
            lines.append(
                "--shard divides the model among processes, and there is one; start the script with"
                " torchrun --nproc_per_node=2, or leave --shard out"
            )
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if self.compile and not self.eval_only and shutil.which(compiler) is None:
            lines.append(f"--compile: no C++ compiler {compiler} here; leave --compile out")
        return lines


# -- what flags say together --------------------------------------------------------------------


def teacher_mode(llm: StudentLLM, loss: TeacherLoss, runtime: Runtime) -> str:
    """Which LLM teacher a student has: none, offline (trained) or online (trained beside it)."""
    starts_there = llm.student_init in ("adapter", "teacher")
    if runtime.eval_only or not (loss.reads_teacher or starts_there):
        return "none"
    return llm.distill_mode


def inherit(
    prompt: Prompt, llm: StudentLLM, files: StudentFiles, teacher: Any, mode: str, runtime: Runtime
) -> tuple[Prompt, StudentLLM]:
    """A student's flag groups with the values that its teacher fixed, which are printed. What is
    still empty has its default. With `--eval_only` the run itself fixes all.

    Args:
        teacher: the run of step 3, or None.
    Raises:
        UsageError: a flag contradicts the teacher; both values are named.
    """
    if teacher is not None:
        prompt = teacher.fix(prompt)
        depth = teacher.flags["llama_decoder_nums"]
        llm = teacher.fix(llm, {"llama_decoder_nums_teacher": depth})
    defaults = Prompt().values()
    empty = {name: defaults[name] for name, value in prompt.values().items() if value is None}
    prompt = dataclasses.replace(prompt, **empty)
    if teacher is None and not runtime.eval_only:
        print(f"base {prompt.base_model}, without a trained LLM teacher")
    start = "adapter" if mode == "offline" and not files.init_from else "base"
    n_student, n_teacher = llm.llama_decoder_nums_student, llm.llama_decoder_nums_teacher
    if mode != "none":
        n_teacher = n_teacher or N_TEACHER
        if n_teacher < n_student:
            print(f"the teacher has {n_teacher} layers, fewer than the student's {n_student}")
    start = llm.student_init or start
    if mode == "offline" and start != "base":
        layers = "layers, " * (start == "teacher")
        print(f"the student starts from the teacher's {layers}item adapter and head")
    settled = {"llama_decoder_nums_teacher": n_teacher, "student_init": start}
    return prompt, dataclasses.replace(llm, **settled)


def report_lora(lora: LoRA, llm: LLM, spec: dict[str, Any]) -> None:
    """Print LoRA's flags that were given where `auto` chose to train the base in full.

    Args:
        spec: the model's (models.llm4rec.specify).
    """
    if lora.given and llm.train_strategy == "auto" and spec["strategy"] == "full":
        names = ", ".join(f"--{name}" for name in sorted(lora.given))
        print(f"without effect: {names} (this base is trained in full)")


def first_layers(llm: StudentLLM) -> StudentLLM:
    """The selection of an online teacher's layers: a list names the student's."""
    if llm.layer_selection in LAYER_RULES:
        return llm
    return dataclasses.replace(llm, layer_selection="first")
