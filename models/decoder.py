"""A pruned decoder over [prompt | items | response] that computes no more than it must: a LLaMA, or
another of models.base.FAMILIES, whose layers have the same residuals, MLP and rotary positions.

It returns last-token states. They equal those of the plain Hugging Face forward over
[prompt | left-padded items | response] (benchmarks/plain.py, tests/test_parity.py). Only work whose
result is not used, or is the same for every user, is left out:

* The prompt is the same for all users and attention is causal. Its keys and values are computed
  once per step (with gradient) or, in inference, once per evaluation.
* Padded item slots are not computed: the linear layers see only real tokens, packed one after
  another. Positions stay those of the padded layout.
* In the last layer only the last token needs a query, an output projection and an MLP.

With LoRA dropout > 0 the prompt's dropout mask is therefore shared by the batch; the expectation is
unchanged.

EDIT `queries_keys_values` where queries, keys or values are computed differently, and
`Decoder.forward` to return more than the last tokens. LEAVE the rest ALONE.

Legend: B batch, P prompt tokens, S packed suffix tokens (items and response of all users), T all
tokens computed (P + S, or S where the prompt is known), W widest suffix of a group, H width, h
heads, d head width, E block ends; b, s: B and S of one group.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from engine.errors import UsageError
from models.attention import KeyValue, attend, attend_last, attend_prompt, compilable
from models.packed import Packed

Rotation = tuple[Tensor, Tensor]  # rotary cosines and sines of the packed tokens, each [T, d]


class Decoder(nn.Module):
    """The kept layers of a LLaMA and the token ids of its prompt.

    Args:
        llama: embeddings, kept layers and final norm.
        prompt_ids, response_ids: the tokens before and after the items, at least one each.
        block_ends: numbers of layers, ascending, the last one all layers; states are returned after
            so many layers.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its
            activations.
        compiled: train with compiled steps (see `compilable`).
    """

    def __init__(
        self,
        llama: PreTrainedModel,
        prompt_ids: list[int],
        response_ids: list[int],
        block_ends: list[int],
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.llama = llama
        for layer in llama.layers:
            layer.compiled = compiled
        self.n_layers = len(llama.layers)
        ascending = block_ends == sorted(set(block_ends)) and block_ends[0] > 0
        if not ascending or block_ends[-1] != self.n_layers:
            raise UsageError(
                f"block ends {block_ends} do not fit the model's {self.n_layers} layers"
            )
        self.block_ends = block_ends
        self.gradient_checkpointing = gradient_checkpointing
        self.divided = False  # among processes
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids), persistent=False)
        self.register_buffer("response_ids", torch.tensor(response_ids), persistent=False)

    def forward(
        self, items: Tensor, packed: Packed, prompt: list[KeyValue] | None = None
    ) -> Tensor:
        """Last-token states at the block ends, [B, E, H]: inner ones raw, the last one after the
        final norm.

        Args:
            items: vectors of the real items, user after user, [sum of lengths, H].
            packed: where they stand, on the same device.
            prompt: what `prompt_states` returned, to skip the prompt's own computation (inference).
        """
        n_prompt = len(self.prompt_ids)
        response = self.llama.embed_tokens(self.response_ids)
        # Under autocast the stream stays in the base's precision, as Hugging Face's does.
        x = torch.cat([items, response]).index_select(0, packed.source)  # [S, H]
        position = packed.position
        if prompt is None:  # the prompt's tokens go first in the same packed product
            x = torch.cat([self.llama.embed_tokens(self.prompt_ids), x])  # [T, H]
            position = torch.cat([torch.arange(n_prompt, device=x.device), position])
        rotation = self._rotation(x, packed.length, position)
        last = packed.last + len(x) - len(packed.source)
        states = []
        for i, layer in enumerate(self.llama.layers):
            known = None if prompt is None else prompt[i]
            if i + 1 == self.n_layers:
                x = self._run(_last_layer, layer, x, rotation, packed, known)
                states.append(self.llama.norm(x))
                continue
            x = self._run(_inner_layer, layer, x, rotation, packed, known)
            if i + 1 in self.block_ends:
                states.append(x.index_select(0, last))
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def prompt_states(self) -> list[KeyValue]:
        """Keys and values of the prompt in every layer, for inference with the present weights."""
        x = self.llama.embed_tokens(self.prompt_ids)
        rotation = self._rotation(x, len(x), torch.arange(len(x), device=x.device))
        states = []
        for i, layer in enumerate(self.llama.layers):
            is_last = i + 1 == self.n_layers
            x, *keys_values = self._run(_prompt_layer, layer, x, rotation, is_last)
            states.append(tuple(keys_values))
        return states

    def _rotation(self, x: Tensor, length: int, position: Tensor) -> Rotation:
        """Of the packed tokens; computed for the padded length, as in the plain form."""
        every = torch.arange(length, device=x.device)[None]
        cos, sin = self.llama.rotary_emb(x, position_ids=every)
        return cos[0, position], sin[0, position]

    def divide(self) -> Iterable[nn.Module]:
        """The layers, made ready to be divided among processes: see engine.sharding.

        A layer's weights are brought together around a call of the layer, so that its steps have to
        run within one.
        """
        self.divided = True
        for layer in self.llama.layers:
            layer.forward = functools.partial(self._step, layer)
        return self.llama.layers

    def _run(self, step: Callable, layer: LlamaDecoderLayer, *inputs) -> Any:
        return layer(step, *inputs) if self.divided else self._step(layer, step, *inputs)

    def _step(self, layer: LlamaDecoderLayer, step: Callable, *inputs) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(step, layer, *inputs, use_reentrant=False)
        return step(layer, *inputs)


@compilable
def queries_keys_values(
    layer: LlamaDecoderLayer, x: Tensor, rotation: Rotation, query_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries [T, h, d], keys [T, h_kv, d] and values [T, h_kv, d]; queries and keys are
    rotated. Every layer calls this.

    Args:
        x: the layer's input, [T, H].
        query_tokens: indices of the tokens that need a query; all by default.
    """
    attention, cos, sin = layer.self_attn, *rotation
    normed = layer.input_layernorm(x)
    norms = "q_norm", "k_norm"  # Qwen3 has them
    q_norm, k_norm = (getattr(attention, name, lambda x: x) for name in norms)
    # The order of the three products is the order in which their gradients are summed.
    query = q_norm(_heads(layer, attention.q_proj(normed))) if query_tokens is None else None
    key = k_norm(_heads(layer, attention.k_proj(normed)))
    value = _heads(layer, attention.v_proj(normed))
    if query_tokens is None:
        return *apply_rotary_pos_emb(query, key, cos, sin), value
    query = q_norm(_heads(layer, attention.q_proj(normed.index_select(0, query_tokens))))
    own = cos[query_tokens], sin[query_tokens]
    return _rotated(query, own), _rotated(key, rotation), value


def _prompt_layer(
    layer: LlamaDecoderLayer, x: Tensor, rotation: Rotation, is_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over the prompt alone, [P, H]: its output, its keys and its values. The
    last layer's output is not computed, since nothing uses it.
    """
    query, key, value = queries_keys_values(layer, x, rotation)
    if is_last:
        return x, key, value
    return _feed(layer, x, attend_prompt(layer, query, (key, value))), key, value


def _inner_layer(
    layer: LlamaDecoderLayer, x: Tensor, rotation: Rotation, packed: Packed, known: KeyValue | None
) -> Tensor:
    """One layer over all packed tokens [T, H]; T = P + S, or S where the prompt is known."""
    n_own = len(packed.source)
    # split, not slices: a slice's gradient is a tensor of zeros around it, that of a split one cat
    parts = [t.split([len(x) - n_own, n_own]) for t in queries_keys_values(layer, x, rotation)]
    prompt, own = zip(*parts)
    mixed = []
    if known is None:
        known = prompt[1:]
        mixed.append(attend_prompt(layer, prompt[0], known))
    mixed.append(attend(layer, own[0], own[1:], known, packed.groups))
    return _feed(layer, x, torch.cat(mixed).flatten(1))


def _last_layer(
    layer: LlamaDecoderLayer, x: Tensor, rotation: Rotation, packed: Packed, known: KeyValue | None
) -> Tensor:
    """The last layer for the last token alone, [T, H] -> [B, H]; keys and values of all tokens."""
    n_own = len(packed.source)
    n_prompt = len(x) - n_own
    last = packed.last + n_prompt
    query, *shared = queries_keys_values(layer, x, rotation, last)  # query [B, h, d]
    prompt, own = zip(*(t.split([n_prompt, n_own]) for t in shared))
    known = prompt if known is None else known
    mixed = attend_last(layer, query, own, known, packed.groups)
    return _feed(layer, x.index_select(0, last), mixed.flatten(1))


def _heads(layer: LlamaDecoderLayer, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, layer.self_attn.head_dim))  # [T, h, d]


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [T, h, d] rotated by their positions; the library takes both at once."""
    return apply_rotary_pos_emb(x, x[:, :0], *rotation)[0]


@compilable
def _feed(layer: LlamaDecoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
    """Output projection of the mixed values [T, h * d], residual, MLP, residual."""
    x = x + layer.self_attn.o_proj(mixed.flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))
