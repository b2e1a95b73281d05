"""A recommender as a folder for others: a plain Hugging Face decoder and its ends, or SASRec.

config.json and model.safetensors are the decoder (LoRA merged, layers renumbered);
recommender.safetensors has adapter, head, item table, item ids and popularity; recommender.json
the prompt and the shape. serving/scores.py computes the scores with transformers alone. SASRec has
no decoder: all its weights are in recommender.safetensors, and serving/scores_sasrec.py reads them
with torch alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from engine.errors import RunError
from engine.files import let_all_read, read_json, write_json
from models.llm4rec import LLM4Rec
from models.sasrec import SASRec

WEIGHTS, SHAPE = "recommender.safetensors", "recommender.json"
TOLERANCE = 1e-5  # of scores, relative to the largest
ONNX_BATCH = 64
LARGEST_ONNX = 2**30  # bytes of weights in one file; more are written beside it


def save(
    folder: Path,
    model: LLM4Rec | SASRec,
    item_ids: Tensor,
    popularity: Tensor,
    about: dict[str, Any],
) -> None:
    """Write the model's files into an existing folder. LoRA of an LLM is merged.

    Args:
        model: in float32.
        item_ids: int64 [N], by catalogue index.
        popularity: float [N].
        about: what else recommender.json says: L (max_seq_length), whose items these are, and of
            SASRec its arguments beside N and L, under `sasrec`.
    """
    tensors = model.state_dict()
    if isinstance(model, LLM4Rec):
        decoder = model.decoder
        merge_lora(decoder.llama)
        decoder.llama.config.architectures = [type(decoder.llama).__name__]
        decoder.llama.save_pretrained(folder)
        spell_for_older(folder / "config.json")
        tensors = {name: t for name, t in tensors.items() if name.startswith(("adapter.", "head."))}
        tensors["item_table"] = model.item_table
        about = about | {
            "prompt_ids": decoder.prompt_ids.tolist(),
            "response_ids": decoder.response_ids.tolist(),
        }
    tensors |= {"item_ids": item_ids, "popularity": popularity}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / SHAPE, about)
    let_all_read(folder)


def spell_for_older(path: Path) -> None:
    """Add to a config.json of transformers 5 the names under which transformers 4 reads the rotary
    positions; it would take its default for `rope_parameters`, without a word. Raises RunError: the
    installed version does not read the same from both.
    """
    config = read_json(path, "config")
    rope = config.get("rope_parameters") or {}
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: v for name, v in rope.items() if name != "rope_theta"}
    write_json(path, config)
    if AutoConfig.from_pretrained(path.parent).rope_parameters != rope:
        raise RunError(f"{path}: transformers reads other rotary positions from it")


def merge_lora(llama: PreTrainedModel) -> None:
    """Merge every LoRA into the weight that it adapts."""
    for name, module in list(llama.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(llama.get_submodule(parent), child, module.get_base_layer())


def card_scores(code: str, folder: Path) -> Callable[[list[int]], Tensor]:
    """The function `scores` of the card's own code, run on the folder."""
    names: dict[str, Any] = {"__name__": "card"}
    code = code.replace('FOLDER = "."', f"FOLDER = {json.dumps(str(folder))}")
    exec(compile(code, "the card's code", "exec"), names)
    return names["scores"]


def verify(expected: Tensor, found: Tensor, what: str) -> None:
    """Compare scores [n, N] with those of the exported model. Raises RunError: a score differs."""
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    error = float((expected - found).abs().max())
    if not error <= allowed:
        raise RunError(
            f"{what} gives other scores: they differ by {error:.2g}, allowed {allowed:.2g};"
            " nothing was written"
        )


class Graph(nn.Module):
    """An LLM's scores as one graph without data-dependent steps, for ONNX: the layout of training,
    [prompt | free slots | items | response], with free slots masked.
    """

    def __init__(self, model: LLM4Rec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> Tensor:
        """Scores [B, N] of histories int64 [B, L]: lines of items.csv from 0, the most recent one
        last, N in the free slots before them.
        """
        model, decoder = self.model, self.model.decoder
        ids, batch_size = (decoder.prompt_ids, decoder.response_ids), history.shape[0]
        prompt, response = (decoder.llama.embed_tokens(x).expand(batch_size, -1, -1) for x in ids)
        items = model.adapter(model.item_table[history.clamp(max=len(model.item_table) - 1)])
        inputs = torch.cat([prompt, items, response], dim=1)  # [B, T, H]
        used = F.pad(history < len(model.item_table), (len(ids[0]), len(ids[1])), value=True)
        before = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        seen = (before & used[:, None, :])[:, None]  # [B, 1, T, T]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        out = decoder.llama(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        return model.head(out.last_hidden_state[:, -1]) @ model.item_table.T


class SASRecGraph(nn.Module):
    """SASRec's scores as one graph: the same argument as `Graph`'s."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> Tensor:
        return self.model.padded_states(history)[:, -1] @ self.model.item_table.T


def save_onnx(folder: Path, graph: nn.Module, max_seq_length: int) -> Path:
    """Write recommender.onnx: history [B, L] -> scores [B, N], any B.

    Args:
        graph: of an LLM with its LoRA merged, as `save` leaves it, or of SASRec.
    """
    graph = graph.eval()
    size = sum(tensor.numel() * 4 for tensor in graph.state_dict().values())
    path = folder / "recommender.onnx"
    torch.onnx.export(
        graph,
        (torch.zeros(2, max_seq_length, dtype=torch.int64),),
        path,
        input_names=["history"],
        output_names=["scores"],
        dynamic_shapes={"history": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        external_data=size > LARGEST_ONNX,
        verbose=False,
    )
    return path


def onnx_scores(path: Path, histories: Tensor) -> Tensor:
    """The graph's scores [n, N] of histories [n, L], by onnxruntime on CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = (part.numpy() for part in histories.split(ONNX_BATCH))
    scores = [session.run(["scores"], {"history": part})[0] for part in parts]
    return torch.from_numpy(np.concatenate(scores))
