"""LLM4Rec: a pruned LLaMA that reads projected item embeddings and predicts in item space.

Teacher and student alike. [B, L] history -> item vectors -> adapter -> decoder, between prompt and
response -> last token -> head -> [B, D].

Legend: B batch, L item slots, N items (also the padding index), D item width, H LLM width, E block
    ends.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import checkpoint, sharding
from engine.errors import UsageError, one_line
from engine.run import Run
from models.attention import KeyValue
from models.base import PROVEN, Base, load_llama, longest, open_base
from models.builtin import BUILT_IN
from models.decoder import Decoder
from models.losses import Output
from models.packed import Packed
from models.selection import equal_blocks, select_layers
from utils.flags import LLM, LoRA, Prompt

PROOF_ITEMS = 5
PROOF = 1e-4  # largest relative difference from the library's forward


class LLM4Rec(nn.Module):
    """[prompt | items through the adapter | response] -> decoder -> last token -> item space.

    Args:
        decoder: with its E block ends.
        item_table: [N, D], frozen; row = catalogue index.
        exit_heads: also predict at the E - 1 inner block ends.
        exit_norm: exit heads read states that went through the decoder's final norm.
        bf16: compute in bfloat16 at inference.
    """

    def __init__(
        self,
        decoder: Decoder,
        item_table: Tensor,
        exit_heads: bool,
        exit_norm: bool = False,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.exit_norm, self.bf16 = exit_norm, bf16
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
        tokens = len(decoder.prompt_ids), len(decoder.response_ids)
        return Packed.of(history, n_items, *tokens, self.item_table.device)

    def forward_packed(self, packed: Packed, prompt: list[KeyValue] | None = None) -> Output:
        """The forward of a packed batch: no step depends on the data."""
        items = F.embedding(packed.items, self.item_table)  # [sum of lengths, D]
        items = self.adapter(items.to(self.adapter.weight.dtype))
        states = self.decoder(items, packed, prompt)
        states = states.index_select(0, packed.back)  # [B, E, H]
        user = self.head(states[:, -1])
        inner = self.decoder.llama.norm(states[:, :-1]) if self.exit_norm else states
        exits = [head(inner[:, k]) for k, head in enumerate(self.exit_heads)]
        none = user.new_empty(len(user), 0, user.shape[1])
        return Output(user, states, torch.stack(exits, dim=1) if exits else none)

    def prompt_states(self) -> list[KeyValue]:
        """Keys and values of the prompt in every layer, for inference."""
        return self.decoder.prompt_states()

    def move(self, device: torch.device, shard: bool) -> "LLM4Rec":
        """Move to the device; with `shard`, divided among the processes."""
        if not shard:
            return self.to(device)
        sharding.divide(self, self.decoder.divide(), device, "prompt_states")
        return self

    def return_states_at(self, ends: list[int]) -> None:
        """Return states at these block ends from now on.

        Exit heads made for other ends are dropped.
        """
        if ends != self.decoder.block_ends:
            self.exit_heads = nn.ModuleList()
        self.decoder.block_ends = ends

    @torch.no_grad()
    def encoder(self) -> Callable[[Tensor], Output]:
        """A forward for inference with the present weights. The prompt is computed here, once."""
        self.eval()
        kind = self.item_table.device.type
        autocast = torch.autocast(kind, torch.bfloat16, enabled=self.bf16)
        with autocast:
            prompt = self.prompt_states()

        @torch.no_grad()
        def encode(history: Tensor) -> Output:
            with autocast:
                return self(history, prompt)

        return encode

    def user_encoder(self) -> Callable[[Tensor], Tensor]:
        """As `encoder`, history -> user vectors [B, D] alone."""
        encode = self.encoder()
        return lambda history: encode(history).user

    @classmethod
    def build(
        cls,
        base: Base,
        item_table: Tensor,
        spec: dict[str, Any],
        bf16: bool,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> "LLM4Rec":
        """Read the kept layers of `base` and put a recommender around them.

        What is to be trained requires a gradient. Strategy `lora` freezes the base (in bfloat16 if
        `bf16`) and trains LoRA on the named projections, adapter and heads. `full` trains
        everything but the item table, from float32 weights.

        Args:
            item_table: [N, D].
            spec: what `specify` returned.
        Raises:
            UsageError: a LoRA target matches no module, or the checkpoint lacks what is needed.
        """
        if base.config.model_type not in PROVEN:
            _prove(base, item_table, spec)
        dtype = torch.bfloat16 if bf16 and spec["strategy"] == "lora" else torch.float32
        llama = load_llama(base.location, base.config, spec["layers"], dtype)
        return assemble(llama, item_table, spec, gradient_checkpointing, compiled, bf16)

    @classmethod
    def load(cls, run: Run, item_table: Tensor, bf16: bool) -> "LLM4Rec":
        """The model of a run's best checkpoint. Raises UsageError: the base or the checkpoint is
        missing, does not fit, or is another base.
        """
        base = open_base(run.flags["base_model"])
        base.check_unchanged(run.config)
        return cls.build(base, item_table, run.config["model"], bf16).restore(run)

    def restore(self, run: Run, part: str = "student") -> "LLM4Rec":
        """Take the weights of a run's best checkpoint; of an online run those of a part, `student`
        or `teacher`. A run without a teacher gives none. Raises UsageError: the checkpoint is
        missing or does not fit.
        """
        tensors, _ = checkpoint.load(run.folder / "best")
        named = {n: t for n, t in tensors.items() if n.startswith(f"{part}.")}
        mine = {name.removeprefix(f"{part}."): t for name, t in named.items()}
        if mine or part == "student":  # a model that was trained alone has no prefix
            checkpoint.restore(self, mine or tensors, run.folder / "best")
        return self

    def start(
        self, how: str, teacher: Run | None, source: Run | None, spec: dict[str, Any], base: Base
    ) -> "LLM4Rec":
        """Take the weights that training starts from; what is not taken stays as it was drawn.

        Args:
            how: `base` takes nothing, `adapter` a trained teacher's item adapter and head,
                `teacher` also its layers.
            teacher: the run of step 3.
            source: another run of the same stage, whose weights are all taken (`--init_from`).
            spec, base: this model's.
        Raises:
            UsageError: the other run is of another model or base, or its checkpoint is missing.
        """
        if source is not None:
            other, where = source.config["model"], f"--init_from={source.folder}: its model has"
            names = ["layers", "prompt_ids", "response_ids", "exit_heads", *_trained_by(spec)]
            ends = [name for name in ("n_blocks", "block_ends") if name in other]
            names += [*ends, "exit_norm"] * spec["exit_heads"]
            checkpoint.refuse_other(spec, other, names, where, "this one")
            base.check_unchanged(source.config)
            return self.restore(source)
        if how == "base":
            return self
        if not teacher.has_best:
            raise UsageError(
                f"--teacher={teacher.folder}: its checkpoint best/ is gone;"
                " the student starts from its weights, unless --student_init=base"
            )
        tensors, _ = checkpoint.load(teacher.folder / "best")
        own = checkpoint.trained_tensors(self)
        if how == "teacher":
            base.check_unchanged(teacher.config)
            where = "--student_init=teacher: the teacher was trained with"
            checkpoint.refuse_other(spec, teacher.config["model"], _trained_by(spec), where, "not")
            heads = {name: t for name, t in own.items() if name.startswith("exit_heads.")}
            layers = teacher.config["model"]["layers"], spec["layers"]
            own = kept_tensors(tensors, *layers) | heads
        else:
            own |= {n: t for n, t in tensors.items() if n.startswith(("adapter.", "head."))}
        checkpoint.restore(self, own, teacher.folder / "best")
        return self


@torch.no_grad()
def _prove(base: Base, item_table: Tensor, spec: dict[str, Any]) -> None:
    """Compare the packed forward with the library's own on one short history, in float32 and
    without LoRA: layers may do more than LLaMA's (scale what they add, leave positions out).
    """
    llama = load_llama(base.location, base.config, spec["layers"], torch.float32)
    with torch.random.fork_rng(devices=[]):  # the draws of the model that is built come after
        model = assemble(llama, item_table.cpu(), spec | {"strategy": "full"}).eval()
    decoder = model.decoder
    history = torch.arange(min(PROOF_ITEMS, len(item_table)))[None]
    items = model.adapter(model.item_table[history[0]].float())
    try:
        before, after = map(llama.embed_tokens, (decoder.prompt_ids, decoder.response_ids))
        inputs = torch.cat([before, items, after])[None]
        expected = llama(inputs_embeds=inputs).last_hidden_state[0, -1]
        found = model(history).states[0, -1]
        difference = float((found - expected).norm() / expected.norm())
        problem = "" if difference <= PROOF else f"states differ by {difference:.2g}"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        problem = one_line(error, 120)
    if problem:
        raise UsageError(
            f"--base_model={base.name}: the layers of model_type {base.config.model_type} compute"
            f" something else than models/decoder.py ({problem}); add it there"
        )


def _trained_by(spec: dict[str, Any]) -> list[str]:
    """The entries that say which of the decoder's weights are trained."""
    of_lora = [name for name in LoRA().values() if name != "lora_dropout"]
    return ["strategy", *(of_lora if spec["strategy"] == "lora" else ())]


def specify(
    base: Base,
    prompt: Prompt,
    ids: tuple[list[int], list[int]],
    llm: LLM,
    lora: LoRA,
    ends: list[int],
    exit_heads: bool,
    exit_norm: bool = False,
    teacher_ends: list[int] | None = None,
    teacher_layers: list[int] | None = None,
) -> dict[str, Any]:
    """What `LLM4Rec.build` needs to make the same model again, as JSON.

    Args:
        ids: token ids of the prompt's two texts.
        ends: after how many layers each block ends; the last one is the number of layers.
        teacher_ends: those of the teacher that it is compared with.
        teacher_layers: choose among these alone, to start from the teacher's.
    Raises:
        UsageError: the base lacks the layers or the positions asked for.
    """
    prompt_ids, response_ids = ids
    length = len(prompt_ids) + prompt.max_seq_length + len(response_ids)
    most, unit = longest(base.config)
    if length > most:
        raise UsageError(
            f"prompt, items and response are {len(prompt_ids)} + {prompt.max_seq_length} +"
            f" {len(response_ids)} tokens, the base has {most} {unit}; lower --max_seq_length, or"
            " name a shorter --prompt_template_name"
        )
    largest, known = max(*prompt_ids, *response_ids), base.config.vocab_size
    if largest >= known:
        raise UsageError(
            f"--base_model={base.name}: its tokenizer gives token {largest}, its config.json says"
            f" vocab_size {known}: a tokenizer of another base?"
        )
    pool, owner = [*range(base.config.num_hidden_layers)], "the base checkpoint"
    if teacher_layers:
        pool, owner = teacher_layers, "the teacher"
    strategy = llm.train_strategy
    if strategy == "auto":  # LoRA on frozen random weights means little
        strategy = "full" if base.name in BUILT_IN else "lora"
    spec = {
        "layers": select_layers(pool, ends[-1], llm, owner),
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
        "n_blocks": len(ends),
        "block_ends": ends,
        "exit_heads": exit_heads,
        "strategy": strategy,
    }
    if teacher_ends is not None:
        spec["teacher_block_ends"] = teacher_ends
    if exit_heads and exit_norm:
        spec["exit_norm"] = True  # absent in older runs
    return spec | lora.values()


def assemble(
    llama: PreTrainedModel,
    item_table: Tensor,
    spec: dict[str, Any],
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    bf16: bool = False,
) -> LLM4Rec:
    """As `LLM4Rec.build`, around a LLaMA in memory (or on the meta device, to count)."""
    llama.requires_grad_(spec["strategy"] == "full")
    if spec["strategy"] == "lora":
        from models.lora import inject_lora  # peft takes seconds to import

        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        inject_lora(llama, *(spec[name] for name in names))
    ends = spec_ends(spec, len(llama.layers))
    ids = spec["prompt_ids"], spec["response_ids"]
    decoder = Decoder(llama, *ids, ends, gradient_checkpointing, compiled)
    return LLM4Rec(decoder, item_table, spec["exit_heads"], spec.get("exit_norm", False), bf16)


def spec_ends(spec: dict[str, Any], n_layers: int) -> list[int]:
    """The block ends of a model; before 2026-11-28 they were B equal blocks."""
    return spec.get("block_ends") or equal_blocks(n_layers, spec["n_blocks"])


def kept_tensors(
    tensors: dict[str, Tensor], teacher_layers: list[int], layers: list[int]
) -> dict[str, Tensor]:
    """A trained teacher's tensors under the names of a model that keeps fewer of its layers,
    without exit heads.

    Args:
        tensors: the teacher's trained ones, by name.
        teacher_layers, layers: numbers in the base of the layers of either model.
    """
    inside = "decoder.llama.layers."
    kept = {n: t for n, t in tensors.items() if not n.startswith((inside, "exit_heads."))}
    for i, layer in enumerate(layers):
        theirs = f"{inside}{teacher_layers.index(layer)}."
        for name, tensor in tensors.items():
            if name.startswith(theirs):
                kept[f"{inside}{i}.{name.removeprefix(theirs)}"] = tensor
    return kept
