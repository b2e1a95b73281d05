"""A recommender as a folder for others: a plain Hugging Face decoder and its ends, or SASRec.

config.json and model.safetensors are the decoder (LoRA merged, layers renumbered);
recommender.safetensors has adapter, heads, item table, item ids and popularity; recommender.json
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
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from engine.errors import RunError, UsageError, one_line
from engine.files import let_all_read, read_json, write_json
from models.decoder import Decoder
from models.llm4rec import LLM4Rec
from models.sasrec import SASRec
from serving.recommender import Recommender

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
        around = ("adapter.", "head.", "exit_heads.")
        tensors = {name: t for name, t in tensors.items() if name.startswith(around)}
        tensors["item_table"] = model.item_table
        about = about | {
            "prompt_ids": decoder.prompt_ids.tolist(),
            "response_ids": decoder.response_ids.tolist(),
            "block_ends": decoder.block_ends,
            "exit_norm": model.exit_norm,
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


def load(
    folder: Path, device: torch.device, exit: int | None = None
) -> tuple[Recommender, np.ndarray]:
    """The recommender of an exported folder, and its item ids, int64 [N]. Raises UsageError: a file
    is missing or damaged, or there is no such exit.
    """
    shape = read_json(folder / SHAPE, "exported recommender")
    try:
        tensors = load_file(folder / WEIGHTS)
        item_ids, popularity = tensors.pop("item_ids"), tensors.pop("popularity")
        if "sasrec" in shape:
            model = SASRec(len(item_ids), shape["max_seq_length"], **shape["sasrec"])
            model.load_state_dict(tensors)
        else:
            model = _load_llm(folder, tensors, shape)
    except (OSError, KeyError, SafetensorError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(f"{folder}: damaged, not a folder of serving.export ({reason})") from None
    slots = shape["max_seq_length"]
    return Recommender.of(model.to(device), popularity, slots, exit), item_ids.numpy()


def _load_llm(folder: Path, tensors: dict[str, Tensor], shape: dict[str, Any]) -> LLM4Rec:
    """Raises KeyError where a tensor is missing or unknown."""
    options = {"local_files_only": True, "output_loading_info": True}
    llama, about = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
    if about["missing_keys"]:
        raise KeyError(*sorted(about["missing_keys"])[:3])
    ends = shape["block_ends"]
    decoder = Decoder(llama, shape["prompt_ids"], shape["response_ids"], ends)
    heads = any(name.startswith("exit_heads.") for name in tensors)
    model = LLM4Rec(decoder, tensors.pop("item_table"), heads, shape["exit_norm"])
    around = {name for name in model.state_dict() if not name.startswith("decoder.")}
    if around != set(tensors):
        raise KeyError(*sorted(around ^ set(tensors)))
    model.load_state_dict(tensors, strict=False)
    return model


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
    """The scores as one graph without data-dependent steps, for ONNX.

    The layout is [prompt | items | free slots | response]. Free slots are masked, and positions are
    those of the layout that the model was trained on.
    """

    def __init__(self, model: LLM4Rec, max_seq_length: int) -> None:
        super().__init__()
        self.model, self.max_seq_length = model, max_seq_length

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, N].

        Args:
            history: int64 [B, L], lines of items.csv from 0, oldest first, then anything below N.
            lengths: int64 [B], how many of them count, at least 1.
        """
        model, decoder = self.model, self.model.decoder
        llama, slots = decoder.llama, self.max_seq_length
        n_prompt, n_response = len(decoder.prompt_ids), len(decoder.response_ids)
        batch_size, length = history.shape[0], n_prompt + slots + n_response
        prompt = llama.embed_tokens(decoder.prompt_ids).expand(batch_size, -1, -1)
        response = llama.embed_tokens(decoder.response_ids).expand(batch_size, -1, -1)
        items = model.adapter(model.item_table[history])
        inputs = torch.cat([prompt, items, response], dim=1)  # [B, T, H]
        slot = torch.arange(length, device=history.device)
        of_item = (slot >= n_prompt) & (slot < n_prompt + slots)
        free = slots - lengths[:, None]
        position = slot + free * of_item  # [B, T]
        used = ~of_item | (slot - n_prompt < lengths[:, None])
        seen = (slot[None, :] <= slot[:, None]) & used[:, None, :]  # [B, T, T]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        # A free slot's position may pass the last one; nothing reads it.
        position = position.clamp(max=length - 1)
        out = llama(
            inputs_embeds=inputs, attention_mask=mask, position_ids=position, use_cache=False
        )
        return model.head(out.last_hidden_state[:, -1]) @ model.item_table.T


class SASRecGraph(nn.Module):
    """SASRec's scores as one graph: the same arguments as `Graph`'s."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, N]; histories are moved to the right, where SASRec reads them."""
        slots, model = self.model.max_seq_length, self.model
        source = torch.arange(slots, device=history.device) - (slots - lengths[:, None])  # [B, L]
        moved = history.gather(1, source.clamp(min=0))
        padded = torch.where(source >= 0, moved, model.n_items)
        return model.padded_states(padded)[:, -1] @ model.item_table.T


def save_onnx(folder: Path, graph: nn.Module, max_seq_length: int) -> Path:
    """Write recommender.onnx: history [B, L], lengths [B] -> scores [B, N], any B.

    Args:
        graph: of an LLM with its LoRA merged, as `save` leaves it, or of SASRec.
    """
    graph = graph.eval()
    size = sum(tensor.numel() * 4 for tensor in graph.state_dict().values())
    history = torch.zeros(2, max_seq_length, dtype=torch.int64)
    lengths = torch.tensor([1, max_seq_length])
    batch = {0: torch.export.Dim("batch", min=1)}
    path = folder / "recommender.onnx"
    torch.onnx.export(
        graph,
        (history, lengths),
        path,
        input_names=["history", "lengths"],
        output_names=["scores"],
        dynamic_shapes={"history": batch, "lengths": batch},
        dynamo=True,
        external_data=size > LARGEST_ONNX,
        verbose=False,
    )
    return path


def onnx_scores(path: Path, histories: list[list[int]], max_seq_length: int) -> Tensor:
    """The graph's scores [n, N] of histories (lines of items.csv), by onnxruntime on CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores = []
    for start in range(0, len(histories), ONNX_BATCH):
        part = histories[start : start + ONNX_BATCH]
        padded = torch.zeros(len(part), max_seq_length, dtype=torch.int64)
        lengths = torch.tensor([len(history) for history in part])
        for row, history in zip(padded, part):
            row[: len(history)] = torch.tensor(history)
        feed = {"history": padded.numpy(), "lengths": lengths.numpy()}
        scores.append(torch.from_numpy(session.run(["scores"], feed)[0]))
    return torch.cat(scores)
