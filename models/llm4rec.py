"""LLM4Rec: a pruned LLaMA that reads projected item embeddings and predicts in item space.

Teacher and student alike.

Legend: B batch, L item slots, N items (also the padding index), D item width, H LLM width, E block
    ends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.base import check_unchanged, load_llama, locate, longest, read_config
from models.builtin import BUILT_IN
from models.decoder import Decoder, KeyValue, Packed
from models.losses import Output
from models.selection import block_ends, block_influence, select_layers
from utils import checkpoint, sharding
from utils.errors import UsageError
from utils.flags import LLM, LoRA, Prompt
from utils.run import Run


class LLM4Rec(nn.Module):
    """[prompt | items through the adapter | response] -> decoder -> last token -> item space.

    Args:
        decoder: with its E block ends.
        item_table: [N, D], frozen; row = catalogue index.
        exit_heads: also predict at the E - 1 inner block ends.
        exit_norm: exit heads read states that went through the decoder's final norm.
    """

    def __init__(
        self, decoder: Decoder, item_table: Tensor, exit_heads: bool, exit_norm: bool = False
    ) -> None:
        super().__init__()
        self.exit_norm = exit_norm
        width, dim = decoder.llama.config.hidden_size, item_table.shape[1]
        n_exits = len(decoder.block_ends) - 1 if exit_heads else 0
        self.decoder = decoder
        self.register_buffer("item_table", item_table, persistent=False)
        self.adapter = nn.Linear(dim, width)
        self.head = nn.Linear(width, dim, bias=False)
        heads = [nn.Linear(width, dim, bias=False) for _ in range(n_exits)]
        self.exit_heads = nn.ModuleList(heads)

    def forward(self, history: Tensor, prompt: list[KeyValue] | None = None) -> Output:
        """Left-padded catalogue indices [B, L], best on the CPU -> Output on the model's device."""
        return self.forward_packed(self.pack(history), prompt)

    def pack(self, history: Tensor) -> Packed:
        """The batch as the forward reads it, on the model's device."""
        decoder, n_items = self.decoder, len(self.item_table)
        packed = Packed.of(history, n_items, len(decoder.prompt_ids), len(decoder.response_ids))
        return packed.to(self.item_table.device)

    def forward_packed(self, packed: Packed, prompt: list[KeyValue] | None = None) -> Output:
        """The forward of a packed batch: no step depends on the data."""
        items = F.embedding(packed.items, self.item_table)  # [sum of lengths, D]
        items = self.adapter(items.to(self.adapter.weight.dtype))
        states = self.decoder(items, packed.layout, prompt)
        states = states.index_select(0, packed.back)  # [B, E, H]
        user = self.head(states[:, -1])
        inner = self.decoder.llama.norm(states[:, :-1]) if self.exit_norm else states
        exits = [head(inner[:, k]) for k, head in enumerate(self.exit_heads)]
        none = user.new_empty(len(user), 0, user.shape[1])
        return Output(user, states, torch.stack(exits, dim=1) if exits else none)

    def prompt_states(self) -> list[KeyValue]:
        """Keys and values of the prompt in every layer, for inference."""
        return self.decoder.prompt_states()

    def place(self, device: torch.device, shard: bool) -> "LLM4Rec":
        """Move to the device; with `shard`, divided among the processes."""
        if not shard:
            return self.to(device)
        sharding.divide(self, self.decoder.divide(), device)
        sharding.calls(self, "prompt_states")
        return self

    def return_states_at(self, ends: list[int]) -> None:
        """Return states at these block ends from now on.

        Exit heads made for other ends are dropped.
        """
        if ends != self.decoder.block_ends:
            self.exit_heads = nn.ModuleList()
        self.decoder.block_ends = ends

    def read_at_exit(self, number: int) -> None:
        """Predict at an inner exit from now on: later layers are dropped.

        Args:
            number: of the exit, from 1.
        Raises:
            UsageError: the model has no such exit.
        """
        if not 1 <= number <= len(self.exit_heads):
            n = len(self.exit_heads)
            there = f"exits 1 to {n}" if n else "none; train it with --cls_multiple_lambda"
            raise UsageError(f"--exit={number}: no such inner exit; the model has {there}")
        decoder = self.decoder
        decoder.n_layers = decoder.block_ends[number - 1]
        decoder.llama.layers = decoder.llama.layers[: decoder.n_layers]
        decoder.block_ends = [decoder.n_layers]
        if not self.exit_norm:
            decoder.llama.norm = nn.Identity()
        self.head, self.exit_heads = self.exit_heads[number - 1], nn.ModuleList()

    @torch.no_grad()
    def encoder(self, bf16: bool = False) -> Callable[[Tensor], Output]:
        """A forward for inference with the present weights. The prompt is computed here, once."""
        self.eval()
        device_type = self.item_table.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            prompt = self.prompt_states()

        @torch.no_grad()
        def encode(history: Tensor) -> Output:
            with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
                return self(history, prompt)

        return encode

    def user_encoder(self, bf16: bool = False) -> Callable[[Tensor], Tensor]:
        """As `encoder`, history -> user vectors [B, D] alone."""
        encode = self.encoder(bf16)
        return lambda history: encode(history).user

    @classmethod
    def load(cls, run: Run, item_table: Tensor, bf16: bool) -> "LLM4Rec":
        """The model of a run's best checkpoint.

        Raises:
            UsageError: the base or the checkpoint is missing, does not fit, or is another base.
        """
        base = locate(run.config["flags"]["base_model"])
        check_unchanged(run.config, base)
        model = build(base, item_table, run.config["model"], bf16)
        model.restore(run)
        return model

    def restore(self, run: Run) -> None:
        """Take the weights of a run's best checkpoint; of an online run, the student's.

        Raises:
            UsageError: the checkpoint is missing or does not fit.
        """
        tensors, _ = checkpoint.load(run.folder / "best")
        students = {name: t for name, t in tensors.items() if name.startswith("student.")}
        if students:
            tensors = {name.removeprefix("student."): t for name, t in students.items()}
        checkpoint.restore(self, tensors, run.folder / "best")

    def continue_from(self, source: Run, spec: dict[str, Any]) -> None:
        """Take all weights of another run's best checkpoint as the start.

        Args:
            spec: this model's; the other's must be the same.
        Raises:
            UsageError: the other run is of another model or base, or its checkpoint is missing.
        """
        other = source.config["model"]
        for name in sorted({*spec, *other}):
            if spec.get(name) != other.get(name):
                raise UsageError(
                    f"--init_from={source.folder}: its model has {name} {other.get(name)},"
                    f" this one {spec.get(name)}"
                )
        check_unchanged(source.config, locate(source.config["flags"]["base_model"]))
        self.restore(source)

    def take_ends(self, teacher: Run) -> None:
        """Take a trained teacher's item adapter and head as the start; all else stays.

        Raises:
            UsageError: the teacher's checkpoint is missing or does not fit.
        """
        tensors, _ = checkpoint.load(teacher.folder / "best")
        ends = {name: t for name, t in tensors.items() if name.startswith(("adapter.", "head."))}
        own = checkpoint.trained_tensors(self)
        checkpoint.restore(self, own | ends, teacher.folder / "best")

    def start_from(self, teacher: Run, spec: dict[str, Any]) -> None:
        """Take a trained teacher's layers, item adapter and head as the start; exit heads stay.

        Args:
            spec: this model's.
        Raises:
            UsageError: the teacher was trained in another way, or its checkpoint is missing or does
                not fit.
        """
        taught = teacher.config["model"]
        check_unchanged(teacher.config, locate(teacher.config["flags"]["base_model"]))
        for name in ("strategy", *LoRA().values()):
            if spec[name] != taught[name]:
                raise UsageError(
                    f"--student_init=teacher: the teacher was trained with {name} {taught[name]},"
                    f" not {spec[name]}"
                )
        tensors, _ = checkpoint.load(teacher.folder / "best")
        taken = kept_tensors(tensors, taught["layers"], spec["layers"])
        own = checkpoint.trained_tensors(self)
        heads = {name: value for name, value in own.items() if name.startswith("exit_heads.")}
        checkpoint.restore(self, taken | heads, teacher.folder / "best")


class Calibration(NamedTuple):
    """What layer_selection `influence` is measured on: see models.selection.block_influence."""

    history: Tensor
    item_table: Tensor
    bf16: bool
    seed: int


def specify(
    base: str,
    prompt: Prompt,
    ids: tuple[list[int], list[int]],
    llm: LLM,
    lora: LoRA,
    n_layers: int,
    n_blocks: int,
    exit_heads: bool,
    calibration: Calibration | None = None,
    teacher_layers: list[int] | None = None,
    exit_norm: bool = False,
) -> dict[str, Any]:
    """What `build` needs to make the same model again, as JSON.

    Args:
        base: where the base is (see models.base.locate).
        ids: token ids of the prompt's two texts.
        n_layers: how many layers are kept.
        teacher_layers: choose among these alone, to start from the teacher's.
    Raises:
        UsageError: the base lacks the layers or the positions asked for.
    """
    config, (prompt_ids, response_ids) = read_config(base), ids
    length = len(prompt_ids) + prompt.max_seq_length + len(response_ids)
    most, unit = longest(config)
    if length > most:
        raise UsageError(
            f"prompt, items and response are {length} tokens, the base has {most} {unit};"
            " lower --max_seq_length"
        )
    pool, owner = [*range(config.num_hidden_layers)], "the base checkpoint"
    if teacher_layers:
        pool, owner = teacher_layers, "the teacher"
    strategy = llm.train_strategy
    if strategy == "auto":  # LoRA on frozen random weights means little
        strategy = "full" if prompt.base_model in BUILT_IN else "lora"

    def influence() -> list[float]:
        return block_influence(base, prompt_ids, response_ids, *calibration)

    return {
        "layers": select_layers(pool, n_layers, llm, influence, owner),
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "n_blocks": n_blocks,
        "exit_heads": exit_heads,
        "strategy": strategy,
        **({"exit_norm": True} if exit_heads and exit_norm else {}),  # absent in older runs
    } | lora.values()


def build(
    base: str,
    item_table: Tensor,
    spec: dict[str, Any],
    bf16: bool,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> LLM4Rec:
    """Read the kept layers of `base` and put a recommender around them.

    What is to be trained requires a gradient.

    Strategy `lora` freezes the base (in bfloat16 if `bf16`) and trains LoRA on the named
    projections, adapter and heads. `full` trains everything but the item table, from float32
    weights.

    Args:
        base: folder or Hugging Face id (see models.base.locate).
        item_table: [N, D].
        spec: what `specify` returned.
    Raises:
        UsageError: a LoRA target matches no module, or the checkpoint lacks what is needed.
    """
    dtype = torch.bfloat16 if bf16 and spec["strategy"] == "lora" else torch.float32
    llama = load_llama(base, read_config(base), spec["layers"], dtype)
    return assemble(llama, item_table, spec, gradient_checkpointing, compiled)


def assemble(
    llama: PreTrainedModel,
    item_table: Tensor,
    spec: dict[str, Any],
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> LLM4Rec:
    """As `build`, around a LLaMA that is already in memory (or on the meta device, to count)."""
    llama.requires_grad_(spec["strategy"] == "full")
    if spec["strategy"] == "lora":
        from models.lora import inject_lora  # peft takes seconds to import

        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        inject_lora(llama, *(spec[name] for name in names))
    ends = block_ends(len(llama.layers), spec["n_blocks"])
    ids = spec["prompt_ids"], spec["response_ids"]
    decoder = Decoder(llama, *ids, ends, gradient_checkpointing, compiled)
    return LLM4Rec(decoder, item_table, spec["exit_heads"], spec.get("exit_norm", False))


def kept_tensors(
    tensors: dict[str, Tensor], teacher_layers: list[int], layers: list[int]
) -> dict[str, Tensor]:
    """A trained teacher's tensors under the names of a model that keeps fewer of its layers,
    without exit heads.

    Args:
        tensors: the teacher's trained ones, by name.
        teacher_layers, layers: numbers in the base of the layers of either model.
    """
    number = {str(teacher_layers.index(layer)): str(i) for i, layer in enumerate(layers)}
    prefix = "decoder.llama.layers."
    kept = {}
    for name, tensor in tensors.items():
        place, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith("exit_heads."):
            continue
        if not name.startswith(prefix):
            kept[name] = tensor
        elif place in number:
            kept[f"{prefix}{number[place]}.{rest}"] = tensor
    return kept
