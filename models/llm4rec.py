"""LLM4Rec: a pruned LLaMA that reads projected item embeddings and predicts in item space; teacher and student alike.

Legend: B batch, L item slots, N items (also the padding index), D item dim, H LLM width, E blocks.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from models.base import BUILT_IN, load_llama, prune_config, read_config
from models.decoder import Decoder, KeyValue
from models.losses import Output
from models.selection import select_layers
from utils.cli import UsageError

Strategy = Literal["lora", "full"]


class LLM4Rec(nn.Module):
    """[prompt | items through the adapter | response] -> decoder -> last token -> item space.

    Args:
        decoder: with its E blocks.
        item_table: [N, D], frozen; row = catalogue index.
        exit_heads: also predict at the E - 1 inner block ends.
    """

    def __init__(self, decoder: Decoder, item_table: Tensor, exit_heads: bool) -> None:
        super().__init__()
        width, dim = decoder.llama.config.hidden_size, item_table.shape[1]
        self.decoder = decoder
        self.register_buffer("item_table", item_table, persistent=False)
        self.adapter = nn.Linear(dim, width)
        self.head = nn.Linear(width, dim, bias=False)
        self.exit_heads = nn.ModuleList([nn.Linear(width, dim, bias=False) for _ in range(decoder.n_blocks - 1 if exit_heads else 0)])

    def forward(self, history: Tensor, prompt: list[KeyValue] | None = None) -> Output:
        """Left-padded catalogue indices [B, L] -> Output."""
        real = history != len(self.item_table)
        order = real.sum(1).argsort(stable=True)  # neighbours of like length pad little; undone below
        history, real = history[order], real[order]
        items = self.adapter(self.item_table[history[real]].to(self.adapter.weight.dtype))
        states = self.decoder(items, real, prompt)[order.argsort()]
        user = self.head(states[:, -1])
        exits = [head(states[:, k]) for k, head in enumerate(self.exit_heads)]
        return Output(user, states, torch.stack(exits, dim=1) if exits else user.new_empty(len(user), 0, user.shape[1]))

    def regroup(self, n_blocks: int) -> None:
        """Return states at the ends of `n_blocks` blocks from now on; exit heads made for other blocks are dropped."""
        if n_blocks != self.decoder.n_blocks:
            self.exit_heads = nn.ModuleList()
        self.decoder.n_blocks = n_blocks

    @torch.no_grad()
    def encoder(self, bf16: bool = False) -> Callable[[Tensor], Output]:
        """A forward for inference with the present weights; the prompt is computed here, once."""
        self.eval()

        def precision():
            return torch.autocast(self.item_table.device.type, torch.bfloat16, enabled=bf16)

        with precision():
            prompt = self.decoder.prompt_states()

        @torch.no_grad()
        def encode(history: Tensor) -> Output:
            with precision():
                return self(history, prompt)

        return encode

    def user_encoder(self, bf16: bool = False) -> Callable[[Tensor], Tensor]:
        """As `encoder`, history -> user vectors [B, D] alone."""
        encode = self.encoder(bf16)
        return lambda history: encode(history).user


def specify(
    location: str, base_model: str, prompt_ids: list[int], response_ids: list[int], *, kept: int, max_seq_length: int,
    n_blocks: int, exit_heads: bool, layer_selection: str, interval_nums: int, train_strategy: str, lora_r: int,
    lora_alpha: int, lora_dropout: float, lora_target_modules: list[str], influence: Callable[[], list[float]] | None = None,
    teacher_layers: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `build` needs to make the same model again, as JSON: layer indices, token ids, blocks, what is trained.

    Args:
        influence: see models.selection.select_layers; teacher_layers: choose among these alone, to start from the teacher's.
    Raises:
        UsageError: the base lacks the layers or the positions asked for.
    """
    config = read_config(location)
    length = len(prompt_ids) + max_seq_length + len(response_ids)
    if length > config.max_position_embeddings:
        raise UsageError(
            f"prompt, items and response are {length} tokens, the base has {config.max_position_embeddings} positions; lower --max_seq_length"
        )
    pool, owner = (teacher_layers, "the teacher") if teacher_layers else ([*range(config.num_hidden_layers)], "the base checkpoint")
    return {
        "layers": select_layers(pool, kept, layer_selection, interval_nums, influence, owner),
        "prompt_ids": prompt_ids, "response_ids": response_ids, "n_blocks": n_blocks, "exit_heads": exit_heads,
        # LoRA on frozen random weights means little: a built-in base is trained in full unless told otherwise
        "strategy": train_strategy if train_strategy != "auto" else ("full" if base_model in BUILT_IN else "lora"),
        "lora_r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "lora_target_modules": lora_target_modules,
    }  # fmt: skip


def build(*, base: str, layers: list[int], item_table: Tensor, strategy: Strategy, bf16: bool, **shape: Any) -> LLM4Rec:
    """Read the kept layers of `base` and put a recommender around them; what is to be trained requires a gradient.

    `lora` freezes the base (in bfloat16 if `bf16`) and trains LoRA on the named projections, adapter and heads;
    `full` trains everything but the item table, from float32 weights.

    Args:
        base: folder or Hugging Face id (see models.base.locate). layers: indices of the kept layers.
        item_table: [N, D]. shape: the rest of `assemble`'s arguments.
    Raises:
        UsageError: a LoRA target that matches no module, or a checkpoint that lacks what is needed.
    """
    dtype = torch.bfloat16 if bf16 and strategy == "lora" else torch.float32
    llama = load_llama(base, read_config(base), layers, dtype)
    return assemble(llama, item_table, strategy=strategy, **shape)


def assemble(
    llama: LlamaModel, item_table: Tensor, *, prompt_ids: list[int], response_ids: list[int], n_blocks: int, exit_heads: bool,
    strategy: Strategy, lora_r: int, lora_alpha: int, lora_dropout: float, lora_target_modules: list[str], gradient_checkpointing: bool = False,
) -> LLM4Rec:  # fmt: skip
    """As `build`, around a LLaMA that is already in memory (or on the meta device, to count)."""
    llama.requires_grad_(strategy == "full")
    if strategy == "lora":
        from models.lora import inject_lora  # peft takes a while to import

        inject_lora(llama, lora_r, lora_alpha, lora_dropout, lora_target_modules)
    return LLM4Rec(Decoder(llama, prompt_ids, response_ids, n_blocks, gradient_checkpointing), item_table, exit_heads)


def kept_of(tensors: dict[str, Tensor], theirs: list[int], mine: list[int]) -> dict[str, Tensor]:
    """A trained teacher's tensors under the names of a model that keeps fewer of its layers; its exit heads are left out.

    Args:
        tensors: the teacher's trained ones, by name; theirs, mine: numbers in the base of the layers of either model.
    """
    number = {str(theirs.index(layer)): str(place) for place, layer in enumerate(mine)}
    head = "decoder.llama.layers."
    kept = {}
    for name, tensor in tensors.items():
        place, _, rest = name.removeprefix(head).partition(".")
        if not name.startswith(head):
            kept[name] = tensor
        elif place in number:
            kept[f"{head}{number[place]}.{rest}"] = tensor
    return {name: tensor for name, tensor in kept.items() if not name.startswith("exit_heads.")}


def count_parameters(config: LlamaConfig, n_layers: int, r: int, targets: list[str]) -> tuple[int, int]:
    """(decoder and embeddings with LoRA, LoRA alone), counted on the meta device; as in the paper's Table of efficiency."""
    from models.lora import inject_lora

    with torch.device("meta"):
        llama = LlamaModel(prune_config(config, n_layers))
        llama.requires_grad_(False)
        inject_lora(llama, r, r, 0.0, targets)
    sizes = [(p.numel(), p.requires_grad) for p in llama.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
