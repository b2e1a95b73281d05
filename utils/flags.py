"""Every flag of the four scripts, once: type, default, help.

EDIT HERE to add a flag. Flags stand in groups, and the group that a flag is in says what kind of
flag it is:

* place: where files are. Their content is compared by hash; paths may differ when a run resumes.
* model: what the trained model depends on. It must be the same when a run resumes, and
  `--eval_only` reads it from the run.
* training: how the model is trained. It must be the same when a run resumes.
* free: by design does not change results (speed, logs). It may differ when a run resumes.

A script lists groups in the signature of `main`, and passes an instance to override defaults.
`utils.cli` binds the command line to them; `docs/flags.md` is made from this file (`python -m
experiments.flags_page`).
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple


class Range(NamedTuple):
    """Bounds of a number. An open bound excludes itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def admits(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and -math.inf < value < math.inf

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{'>' if self.open_low else '>='} {self.low:g}"
        unbounded = self.high in (math.inf, LARGEST)
        high = "" if unbounded else f"{'<' if self.open_high else '<='} {self.high:g}"
        return " and ".join(part for part in (low, high) if part) or "finite"


class PositiveOr(NamedTuple):
    """A whole number from 1, or one value with another meaning."""

    other: int
    meaning: str

    def admits(self, value: int) -> bool:
        return 1 <= value <= LARGEST or value == self.other

    def __str__(self) -> str:
        return f">= 1, or {self.other} for {self.meaning}"


class WordOrNumbers(NamedTuple):
    """One of some words, or whole numbers such as 0,2,4,6."""

    words: tuple[str, ...]

    def admits(self, value: str) -> bool:
        numbers = r"[0-9]+( *, *[0-9]+)*"
        return value in self.words or re.fullmatch(rf"{numbers}|\[{numbers}\]", value) is not None

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}, or numbers such as 0,2,4,6"


LARGEST = 2**31 - 1  # of whole numbers that count something
LAYER_WORDS = ("first", "interval", "last", "influence")
PositiveInt = Annotated[int, Range(low=1, high=LARGEST)]
NonNegativeInt = Annotated[int, Range(low=0, high=LARGEST)]
Seed = Annotated[int, Range(low=0, high=2**63 - 1)]
MaxSteps = Annotated[int, PositiveOr(-1, "num_epochs")]  # -1 as in the released scripts
Interval = Annotated[int, PositiveOr(-1, "every epoch")]
PositiveFloat = Annotated[float, Range(low=0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(low=0)]
DropRate = Annotated[float, Range(low=0, high=1, open_high=True)]
LayerSelection = Annotated[str, WordOrNumbers(LAYER_WORDS)]


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    term: str = "",
    teacher: bool = False,
    needs: str = "",
    adapts: bool = False,
) -> Any:
    """A flag of a group, or of a script's own.

    Args:
        default: the value without the flag; left out, the flag is required. A list is copied.
        help: one or two lines for `--help` and docs/flags.md.
        term: for the weight of a loss term, the term's name in tables.
        teacher: for the weight of a loss term, whether the term reads the teacher's output.
        adapts: whether the value fits itself to the amount of training unless it is given.
        needs: `name` or `name=value` of a flag in the same group without which this one has no
            effect.
    """
    metadata = {"help": help, "term": term, "teacher": teacher, "needs": needs, "adapts": adapts}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Flags of one kind. `given` holds the names that the user wrote."""

    kind: ClassVar[str] = ""
    given: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    @classmethod
    def fields(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if field.name != "given"]

    def values(self) -> dict[str, Any]:
        """Flag name -> value."""
        return {field.name: getattr(self, field.name) for field in self.fields()}

    def fixed(self) -> list[str]:
        """The given flags that would otherwise fit themselves to the amount of training."""
        fields = (field for field in self.fields() if field.metadata["adapts"])
        return [field.name for field in fields if field.name in self.given]

    def all_given(self) -> "Group":
        """As if the user had written every flag."""
        return dataclasses.replace(self, given=frozenset(self.values()))

    def filled(self) -> "Group":
        """A copy that has the class's default wherever the value is None (nothing inherited)."""
        own = {field.name: field.default for field in self.fields()}
        empty = {name: own[name] for name, value in self.values().items() if value is None}
        return dataclasses.replace(self, **empty)

    def problems(self) -> list[str]:
        """What is wrong between the flags of this group, a line each."""
        return []

    def unused(self) -> list[str]:
        """A line for each flag that was given and has no effect, because of another here."""
        lines = []
        for field in self.fields():
            name, _, value = field.metadata["needs"].partition("=")
            if field.name not in self.given or not name:
                continue
            other = getattr(self, name)
            if str(other) != value if value else not other:
                needed = f"--{name}={value}" if value else f"--{name} above 0"
                lines.append(f"--{field.name}={getattr(self, field.name)} (needs {needed})")
        return lines


# -- place --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Data(Group):
    """The domain"""

    kind: ClassVar[str] = "place"
    domain_type: str = flag(
        "demo", "the domain; its CSV is data/<domain>.csv[.gz|.xz]; demo is made on first use"
    )
    data_path: str | None = flag(None, "the domain's CSV, wherever it is")
    ends_are_items: bool = flag(
        False, "treat ids at the ends of many lists that look like padding or markers as items"
    )


@dataclass(frozen=True, kw_only=True)
class Output(Group):
    """Where the run goes"""

    kind: ClassVar[str] = "place"
    output_dir: str | None = flag(
        None, "the run's folder; output/<domain>/<sasrec, teacher or student> by default"
    )
    init_from: str | None = flag(
        None, "the folder of a run of the same stage: start from its best weights"
    )


@dataclass(frozen=True, kw_only=True)
class ItemTable(Group):
    """Where the item table is"""

    kind: ClassVar[str] = "place"
    item_table: str | None = flag(
        None,
        "the item table that step 2 writes and later steps read; output/<domain>/sasrec_item.pkl "
        "by default",
    )


@dataclass(frozen=True, kw_only=True)
class SASRecFiles(Output, Data):
    """Files"""

    init_table: str | None = flag(
        None,
        "an item table to start the item embeddings from, such as that of extract_emb.py "
        "--source titles; scaled to init_std",
    )

    def problems(self) -> list[str]:
        if not (self.init_table and self.init_from):
            return []
        return ["--init_from and --init_table both say where to start; give one of them"]


@dataclass(frozen=True, kw_only=True)
class ExtractFiles(ItemTable, Data):
    """Files"""

    sasrec: str | None = flag(
        None, "the folder of the step-1 run; output/<domain>/sasrec by default"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherFiles(Output, ItemTable, Data):
    """Files"""

    sasrec: str | None = flag(
        None, "the folder of the step-1 run; output/<domain>/sasrec by default"
    )


@dataclass(frozen=True, kw_only=True)
class StudentFiles(TeacherFiles):
    """Files"""

    teacher: str | None = flag(
        None, "the folder of the step-3 run; output/<domain>/teacher by default"
    )
    teacher_cache: str = flag(
        "auto",
        "where a frozen teacher's outputs on the training samples are kept, computed once and "
        "read by later runs;"
        " auto is teacher_states/ beside the teacher's folder, off runs the teacher in every step",
    )


@dataclass(frozen=True, kw_only=True)
class ServedFiles(ItemTable, Data):
    """Files; by default those that the run was made from"""

    model: str = flag(
        "student",
        "sasrec, teacher or student of the domain, or the folder of a run or an export; the scores "
        "of several runs between commas are added",
    )


# -- model --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sequence(Group):
    """What the model reads"""

    kind: ClassVar[str] = "model"
    max_seq_length: PositiveInt | None = flag(30, "how many of the last items are read")


@dataclass(frozen=True, kw_only=True)
class Prompt(Sequence):
    """What the LLM reads; teacher and student agree on it"""

    base_model: str | None = flag(
        "tiny",
        "a Hugging Face id, a local folder, a GGUF file, smollm2, or a built-in random base: tiny "
        "(hidden 64) or small (hidden 256)",
    )
    prompt_template_name: str | None = flag("alpaca", "templates/<name>.json, or a path to one")


@dataclass(frozen=True, kw_only=True)
class SASRecModel(Group):
    """SASRec"""

    kind: ClassVar[str] = "model"
    emb_dim: PositiveInt = flag(128, "width of the item table")
    hid_dim: PositiveInt = flag(
        32, "width of the transformer, with projections between the two unless they are equal"
    )
    num_blocks: PositiveInt = flag(2, "transformer blocks")
    num_heads: PositiveInt = flag(1, "attention heads")
    dropout: DropRate = flag(0.5, "dropout in the transformer")
    norm: Literal["query", "pre", "post"] = flag(
        "query", "position of LayerNorm: query (released), pre or post"
    )
    init_std: PositiveFloat = flag(
        0.02,
        "initial standard deviation of the embeddings; the released code uses 1, with which "
        "training on all positions fails",
    )

    def problems(self) -> list[str]:
        if self.hid_dim % self.num_heads == 0:
            return []
        return [f"--num_heads={self.num_heads} does not divide --hid_dim={self.hid_dim}"]


@dataclass(frozen=True, kw_only=True)
class LLM(Group):
    """Which decoder layers are kept, and what is trained"""

    kind: ClassVar[str] = "model"
    layer_selection: LayerSelection = flag(
        "first",
        "which layers: first, interval, last, influence (those that change their input most), or "
        "numbers such as 0,2,4,6",
    )
    interval_nums: PositiveInt = flag(
        1, "one layer in interval_nums + 1 is left out", needs="layer_selection=interval"
    )
    train_strategy: Literal["auto", "lora", "full"] = flag(
        "auto", "lora (base frozen) or full; auto is full for the built-in random bases, else lora"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherLLM(LLM):
    """Which decoder layers are kept, and what is trained"""

    llama_decoder_nums: PositiveInt = flag(8, "M, decoder layers kept")


@dataclass(frozen=True, kw_only=True)
class StudentLLM(LLM):
    """Which decoder layers are kept, and what is trained"""

    llama_decoder_nums_student: PositiveInt = flag(4, "N, decoder layers kept")
    llama_decoder_nums_teacher: PositiveInt | None = flag(8, "M; the teacher's where there is one")
    distill_mode: Literal["offline", "online"] = flag(
        "offline", "offline: the teacher is frozen; online: both train together from the base"
    )
    student_init: Literal["base", "adapter", "teacher"] | None = flag(
        None,
        "start from the base; adapter takes the trained teacher's item adapter and head, teacher "
        "also its layers (layer_selection then chooses among them); by default adapter where a "
        "trained teacher is read",
    )

    def problems(self) -> list[str]:
        start = self.student_init
        if start in (None, "base") or self.distill_mode == "offline":
            return []
        return [f"--student_init={start} starts from a trained teacher: use --distill_mode=offline"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Group):
    """LoRA; without effect where the base is trained in full"""

    kind: ClassVar[str] = "model"
    lora_r: PositiveInt = flag(16, "rank")
    lora_alpha: PositiveInt = flag(16, "scale")
    lora_dropout: DropRate = flag(0.05, "dropout")
    lora_target_modules: list[str] = flag(
        ["gate_proj", "up_proj", "down_proj"], "the projections that get LoRA"
    )


@dataclass(frozen=True, kw_only=True)
class Exits(Group):
    """Supervision at the inner block ends"""

    kind: ClassVar[str] = "model"
    distill_block: PositiveInt = flag(
        4, "B, the number of blocks; must divide the number of layers"
    )
    cls_multiple_lambda: NonNegativeFloat = flag(
        1.0,
        "weight of the cross-entropy at the inner block ends (lambda3); 0 trains no exits",
        term="L_ms",
    )
    block_reduction: Literal["sum", "mean"] = flag(
        "sum", "over blocks and exits: sum (released) or mean (paper)"
    )
    exit_norm: bool = flag(
        False,
        "inner exits read normalised states, as the final one does (released: as they are)",
        needs="cls_multiple_lambda",
    )

    def unused(self) -> list[str]:
        lines = super().unused()
        weight = self.cls_multiple_lambda
        if self.distill_block == 1 and weight and "distill_block" in self.given:
            lines.append(f"--cls_multiple_lambda={weight} (--distill_block=1 has no inner exit)")
        if not self.weighted:
            for name in sorted(self.given & {"distill_block", "block_reduction"}):
                lines.append(f"--{name}={getattr(self, name)} (no term with a weight uses blocks)")
        return lines

    @property
    def weighted(self) -> bool:
        """Whether any term that uses blocks has a weight."""
        return self.cls_multiple_lambda > 0


@dataclass(frozen=True, kw_only=True)
class TeacherLoss(Exits):
    """The loss beside the cross-entropy at the end; a weight of 0 leaves a term out"""

    sasrec_lambda: NonNegativeFloat = flag(
        0.0,
        "weight of the KL divergence from SASRec's catalogue softmax (SASRec as a teacher); "
        "several folders in --sasrec, separated by commas, use the mean of their scores; their "
        "item tables may differ",
        term="SASRec KL",
    )
    sasrec_temperature: PositiveFloat = flag(
        1.0, "temperature of SASRec's KL", needs="sasrec_lambda"
    )


@dataclass(frozen=True, kw_only=True)
class DistillationLoss(TeacherLoss):
    """The distillation loss, EDIT HERE with models/losses.py; a weight of 0 leaves a term out"""

    distill_lambda: NonNegativeFloat = flag(
        1.0, "weight of the cosine term (lambda1)", term="D_cos", teacher=True
    )
    norm_lambda: NonNegativeFloat = flag(
        0.1, "weight of the distance term (lambda2)", term="D_norm", teacher=True
    )
    logit_lambda: NonNegativeFloat = flag(
        0.0,
        "weight of the KL divergence between catalogue softmaxes",
        term="logit KL",
        teacher=True,
    )
    norm_form: Literal["l2", "squared_l2"] = flag(
        "l2", "the distance: l2 (released) or squared_l2 (paper)", needs="norm_lambda"
    )
    temperature: PositiveFloat = flag(1.0, "temperature of the logit KL", needs="logit_lambda")

    @property
    def weighted(self) -> bool:
        return self.cls_multiple_lambda > 0 or self.reads_teacher

    @property
    def reads_teacher(self) -> bool:
        """Whether any term with a weight reads the teacher's output."""
        return self.reads_teacher_with(self.values())

    @classmethod
    def reads_teacher_with(cls, flags: dict[str, Any]) -> bool:
        """The same for recorded flags. A weight added after the run is 0."""
        weights = [field.name for field in cls.fields() if field.metadata["teacher"]]
        return any(flags.get(name, 0) > 0 for name in weights)


def terms() -> dict[str, str]:
    """Weight of a loss term -> the term's name in tables, the paper's three first."""
    fields = [field for field in DistillationLoss.fields() if field.metadata["term"]]
    named = {field.name: field.metadata["term"] for field in fields}
    paper = ("distill_lambda", "norm_lambda", "cls_multiple_lambda")
    return {name: named[name] for name in (*paper, *(name for name in named if name not in paper))}


@dataclass(frozen=True, kw_only=True)
class ItemVectors(Group):
    """Item vectors"""

    kind: ClassVar[str] = "model"
    source: Literal["sasrec", "titles"] = flag("sasrec", "what they are made from")
    text_model: str = flag(
        "sentence-transformers/all-MiniLM-L6-v2",
        "a sentence encoder: a Hugging Face id or a folder",
        needs="source=titles",
    )
    dim: PositiveInt = flag(128, "width of the table", needs="source=titles")
    device: Literal["auto", "cpu", "cuda"] = flag(
        "auto", "auto uses cuda if available", needs="source=titles"
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Group):
    """The sampled protocol; the same candidates for all models and seeds"""

    kind: ClassVar[str] = "model"
    num_candidates: PositiveInt = flag(999, "negatives per user in the sampled protocol")
    candidate_seed: NonNegativeInt = flag(42, "seed for drawing these negatives")


# -- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training(Group):
    """Training"""

    kind: ClassVar[str] = "training"
    train_targets: Literal["last", "all"] = flag(
        "last",
        "one target per user (last), or every position (SASRec) or prefix (LLM) of a history (all)",
    )
    batch_size: PositiveInt = flag(256, "users per optimizer step")
    num_epochs: PositiveInt = flag(20, "passes over the training samples", adapts=True)
    max_steps: MaxSteps = flag(-1, "optimizer steps, instead of num_epochs; -1 for none")
    learning_rate: PositiveFloat = flag(1e-3, "peak learning rate of AdamW")
    lr_scheduler: Literal["cosine", "linear", "constant"] = flag(
        "cosine", "learning rate after the warm-up"
    )
    warmup_steps: NonNegativeInt = flag(50, "steps of linear warm-up", adapts=True)
    weight_decay: NonNegativeFloat = flag(0.0, "weight decay of AdamW")
    max_grad_norm: NonNegativeFloat = flag(1.0, "clip gradients to this norm; 0 disables clipping")
    patience: NonNegativeInt = flag(
        0,
        "stop after so many evaluations without a better validation MRR; 0 disables it",
        adapts=True,
    )
    eval_steps: Interval = flag(
        100, "steps between evaluations; -1 evaluates at the end of every epoch", adapts=True
    )
    seed: Seed = flag(42, "seed of new weights, sample order and dropout")
    bf16: bool | None = flag(None, "compute in bfloat16; by default on CUDA")


@dataclass(frozen=True, kw_only=True)
class Objective(Group):
    """What the target is compared with"""

    kind: ClassVar[str] = "training"
    loss: Literal["full", "sampled"] = flag(
        "full",
        "cross-entropy over the whole catalogue (full), or over the target and uniform negatives "
        "(sampled), for catalogues of millions; KL terms are always over all",
    )
    num_negatives: PositiveInt = flag(
        256, "negatives per user; its positions and exits share them", needs="loss=sampled"
    )


# -- free ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Runtime(Group):
    """Speed, memory, logs"""

    kind: ClassVar[str] = "free"
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available")
    micro_batch_size: PositiveInt | None = flag(
        None,
        "users per forward pass; gradients accumulate to batch_size; by default the whole batch",
    )
    eval_batch_size: PositiveInt = flag(512, "users per batch in evaluation")
    save_steps: Interval = flag(
        100, "steps between writing last/; -1 writes it at the end of every epoch"
    )
    log_steps: PositiveInt = flag(10, "steps between lines of metrics.jsonl")
    tensorboard: bool = flag(False, "also write TensorBoard events")
    eval_only: bool = flag(False, "evaluate best/ and write results.json; train nothing")
    overwrite: bool = flag(False, "start from scratch in a folder that holds a run")


@dataclass(frozen=True, kw_only=True)
class LLMRuntime(Runtime):
    """Speed, memory, logs"""

    gradient_checkpointing: bool = flag(
        False, "recompute layers in the backward pass to save memory"
    )
    compile: bool = flag(
        False, "train with compiled layers (torch.compile): a slow first step, then shorter ones"
    )
    shard: bool = flag(
        False,
        "divide weights, gradients and optimizer state among torchrun's processes, for a base that "
        "does not fit one device",
    )
