"""Base checkpoints: where they are, and reading only the tensors that are needed.

A base is a Hugging Face id, a local folder in the Hugging Face layout (experiments/bases.py makes
such folders), or a built-in random LLaMA (models/builtin.py). Its family is one of FAMILIES:
decoders whose layers have LLaMA's residuals and MLP. What they do to queries and keys is the
library's own modules (models/decoder.py).
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from engine.errors import UsageError, one_line
from engine.files import file_sha256, read_json
from models.builtin import BUILT_IN, FOLDER, ensure_built_in

MADE = {"smollm2": FOLDER / "smollm2"}  # by `make`
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROVEN = ("llama", "mistral", "qwen2", "qwen3")  # against the library's forward, by the tests
# EDIT for another one, as (*PROVEN, "granite"); its first load is compared with the library's
FAMILIES = PROVEN
WEIGHT_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints store it
SAMPLES, SAMPLE = 64, 4096  # pieces of a shard that its fingerprint covers, and their bytes
FINGERPRINT = "2-"  # with pieces of every tensor; before 2026-11-28 it had none of some


class Base(NamedTuple):
    """A base checkpoint.

    name: as `--base_model` has it. location: its folder, or its Hugging Face id.
    """

    name: str
    location: str
    config: PreTrainedConfig

    @property
    def is_random(self) -> bool:
        """Whether the layers have random weights: a built-in base's, or a twin's."""
        return self.name in BUILT_IN or getattr(self.config, "random_layers", False)

    def describe(self) -> dict[str, Any]:
        """What config.json says of it: whether its weights are random, where it is, and a hash."""
        about = {"random_base": self.is_random, "base": self.location}
        if self.name not in BUILT_IN:
            about["base_config_sha256"] = self.config_sha256()
        return about | {"base_sha256": fingerprint(self.location)}

    def config_sha256(self) -> str:
        """Hash of config.json, which decides on positions, heads and norms."""
        return file_sha256(_file(self.location, "config.json"))

    def check_unchanged(self, config: dict[str, Any]) -> None:
        """Refuse another base than the one that a run was trained on.

        Where the base was trained in full its weights are in the checkpoint: its config.json alone
        is compared.

        Args:
            config: the run's config.json.
        Raises:
            UsageError: the base differs.
        """
        in_full = config["model"]["strategy"] == "full"
        recorded = config.get("base_config_sha256" if in_full else "base_sha256")
        if recorded is None:
            return
        if in_full:
            found = self.config_sha256()
        else:
            found = fingerprint(self.location, every_tensor=recorded.startswith(FINGERPRINT))
        if found != recorded:
            raise UsageError(
                f"--base_model={self.name}: {self.location} is another base than the one"
                f" that the run was trained on (its fingerprint is {found[:12]}..., the run has"
                f" {recorded[:12]}...); put the right one back"
            )


def open_base(name: str) -> Base:
    """The base behind `--base_model`. Raises UsageError: a path that does not exist, a hub that
    does not have it, or a family that is not read here.
    """
    if name in BUILT_IN:
        location = str(ensure_built_in(name))
    elif name in MADE:
        location = str(MADE[name])
        if not Path(location, "config.json").is_file():
            raise UsageError(f"--base_model={name}: no base in {location}; `make {name}` makes it")
    else:
        location = name
        if name.endswith(".gguf"):
            raise UsageError(
                f"--base_model={name}: a GGUF file; python -m experiments.bases --kind gguf"
                f" --base_model {name} --output_dir FOLDER makes a base of it"
            )
        is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
        if not Path(name).is_dir() and (is_path or name.endswith("/")):
            raise UsageError(
                f"--base_model={name}: no such folder, and not one of"
                f" {', '.join((*BUILT_IN, *MADE))}"
                " or a Hugging Face id such as meta-llama/Llama-2-7b-hf"
            )
    return Base(name, location, read_config(location))


def fingerprint(base: str, every_tensor: bool = True) -> str:
    """sha256 over config.json, and the names, sizes, headers and samples of the weight files.

    Cheap for any size. A hub's snapshot is known by its commit.

    Args:
        every_tensor: sample each tensor; False is the fingerprint of runs before 2026-11-28.
    """
    if not Path(base).is_dir():
        commit = Path(_file(base, "config.json")).parent.name
        found = hashlib.sha256(json.dumps([base, commit]).encode()).hexdigest()
        return FINGERPRINT * every_tensor + found
    digest = hashlib.sha256((Path(base) / "config.json").read_bytes())
    for path in sorted(Path(base).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            about = file.read(min(header, size))
            digest.update(about)
            starts = [size * i // SAMPLES for i in range(SAMPLES)]
            if every_tensor:
                starts += [header + 8 + start for start in _tensor_starts(about)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return FINGERPRINT * every_tensor + digest.hexdigest()


def _tensor_starts(header: bytes) -> list[int]:
    """Where the tensors of a safetensors file start after its header; none if it is damaged."""
    try:
        tensors = json.loads(header)
        return sorted(t["data_offsets"][0] for n, t in tensors.items() if n != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def read_config(base: str) -> PreTrainedConfig:
    """The base's configuration. Raises UsageError: no config.json, or a family that is not read
    here.
    """
    if (Path(base) / "adapter_config.json").is_file():
        raise UsageError(
            f"--base_model={base}: has a LoRA adapter (adapter_config.json), which nothing here"
            " reads; merge it into the weights (peft: merge_and_unload) and save, or remove it"
        )
    path = _file(base, "config.json")
    if path is None:
        raise UsageError(f"--base_model={base}: has no config.json")
    content = read_json(path, "base")
    found = content.get("model_type")
    if found not in FAMILIES:
        raise UsageError(
            f"--base_model={base}: model_type {found} unsupported, expected"
            f" {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]}; to try a family with LLaMA's layers,"
            " add it to FAMILIES in models/base.py"
        )
    if content.get("quantization_config"):
        method = content["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise UsageError(
            f"--base_model={base}: is quantised ({method}); its scales are not read here, use the"
            " checkpoint in bf16, fp16 or fp32 that it was made from"
        )
    try:
        return CONFIG_MAPPING[found](**content)
    except Exception as error:  # transformers checks fields in several ways
        raise UsageError(f"{path}: not a {found}'s configuration ({one_line(error)})") from None


def new_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The library's decoder of this configuration, without a language model's head."""
    return MODEL_MAPPING[type(config)](config)


def load_llama(
    base: str, config: PreTrainedConfig, layers: list[int], dtype: torch.dtype
) -> PreTrainedModel:
    """The base cut down to `layers` (renumbered) with its embeddings and final norm; reads nothing
    else. Raises UsageError: a needed tensor or the shard that holds it is missing, or has an
    unexpected shape.
    """
    pruned = prune_config(config, layers)
    with torch.device("meta"):
        llama = new_decoder(pruned)
    stored = {}  # name in the pruned model -> name in the checkpoint
    for name in llama.state_dict():
        layer = re.match(r"layers\.(\d+)\.", name)
        stored[name] = f"layers.{layers[int(layer[1])]}.{name[layer.end() :]}" if layer else name
    tensors = _read_tensors(base, list(stored.values()), dtype)
    for name, expected in llama.state_dict().items():
        found = tensors[stored[name]]
        if found.shape != expected.shape:
            raise UsageError(
                f"--base_model={base}: {stored[name]} is {list(found.shape)},"
                f" config.json says {list(expected.shape)}"
            )
    llama.load_state_dict({name: tensors[stored[name]] for name in stored}, assign=True)
    llama.rotary_emb = type(llama.rotary_emb)(pruned)  # its buffers are computed, not stored
    return llama


def prune_config(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of the configuration for these layers."""
    content, n = config.to_dict(), config.num_hidden_layers
    for name, value in content.items():
        if isinstance(value, list) and len(value) == n:  # an entry per layer
            content[name] = [value[layer] for layer in layers]
    if content.get("layer_types"):  # attention windows are longer than our sequences
        content["layer_types"] = ["full_attention"] * len(layers)
    return type(config)(**content | {"num_hidden_layers": len(layers), "use_cache": False})


def longest(config: PreTrainedConfig) -> tuple[int, str]:
    """How many tokens the base attends over, and what bounds them.

    Qwen2 and Qwen3 have a window only where their configuration uses one.
    """
    window = getattr(config, "sliding_window", None)
    positions = config.max_position_embeddings
    if window and window < positions:
        return window, "tokens in its attention window"
    return positions, "positions"


def _read_tensors(base: str, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by their names inside the decoder, from whichever shards hold them."""
    shard_of = _shards(base)
    # LlamaForCausalLM's names or LlamaModel's
    prefix = "model." if any(name.startswith("model.") for name in shard_of) else ""
    _refuse_unread(base, prefix, names, list(shard_of))
    missing = [prefix + name for name in names if prefix + name not in shard_of]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UsageError(f"--base_model={base}: lacks the tensor {missing[0]}{more}")
    tensors = {}
    for shard_name in sorted({shard_of[prefix + name] for name in names}):
        mine = [name for name in names if shard_of[prefix + name] == shard_name]
        path = _file(base, shard_name)
        if path is None:
            raise UsageError(
                f"--base_model={base}: {shard_name} is missing; it holds {prefix + mine[0]}"
            )
        with _opened(path) as shard:
            there = set(shard.keys())
            for name in mine:
                if prefix + name not in there:
                    raise UsageError(
                        f"--base_model={base}: {shard_name} lacks the tensor {prefix + name}"
                        " that the index places there"
                    )
                tensor = shard.get_tensor(prefix + name)
                if tensor.dtype not in WEIGHT_TYPES:
                    raise UsageError(
                        f"--base_model={base}: {prefix + name} is {tensor.dtype}, quantised;"
                        " use the checkpoint in bf16, fp16 or fp32 that it was made from"
                    )
                tensors[name] = tensor.to(dtype)
    return tensors


def _refuse_unread(base: str, prefix: str, names: list[str], stored: list[str]) -> None:
    """Refuse a checkpoint that has more tensors in a kept layer than are read."""
    kept = {name.split(".")[1] for name in names if name.startswith("layers.")}
    known = {prefix + name for name in names}
    unread = []
    for name in stored:
        _, _, rest = name.partition(f"{prefix}layers.")
        inside = name.startswith(f"{prefix}layers.") and rest.split(".")[0] in kept
        if inside and name not in known and not name.endswith(COMPUTED):
            unread.append(name)
    if not unread:
        return
    reason = "nothing here reads them"
    if any("scale" in name or "zero" in name or "g_idx" in name for name in unread):
        reason = "the weights are quantised; use the checkpoint in bf16, fp16 or fp32"
    elif any("lora" in name for name in unread):
        reason = "LoRA is not merged; merge it into the weights (peft: merge_and_unload) and save"
    raise UsageError(
        f"--base_model={base}: has {len(unread)} more tensors in the kept layers, such as"
        f" {unread[0]}: {reason}"
    )


def _shards(base: str) -> dict[str, str]:
    """Tensor name in the checkpoint -> the file that holds it."""
    index = _file(base, INDEX, optional=True)
    if index is not None:
        weight_map = _weight_map(index)
        if (Path(base) / SINGLE).is_file() and SINGLE not in weight_map.values():
            raise UsageError(
                f"--base_model={base}: has both {INDEX} and {SINGLE}, and they may be of different"
                " weights; remove one of them"
            )
        return weight_map
    single = _file(base, SINGLE)
    if single is None:
        raise UsageError(
            f"--base_model={base}: has neither {INDEX} nor {SINGLE};"
            " weights are read from safetensors only"
        )
    with _opened(single) as shard:
        return dict.fromkeys(shard.keys(), SINGLE)


def _weight_map(index: str) -> dict[str, str]:
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        if all(Path(shard).name == shard for shard in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UsageError(f"{index}: damaged, expected JSON with a weight_map from tensors to files")


def _opened(path: str):
    if not os.access(path, os.R_OK):
        raise UsageError(f"{path}: cannot be read: missing, or without permission")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged or not safetensors ({one_line(error)})") from None


def _file(base: str, name: str, optional: bool = False) -> str | None:
    """A local path of a file of the base, downloaded from the hub if need be; None where the base
    has no such file.

    Offline it is not known whether the hub has a file that is not in the cache; an optional one
    then counts as absent.
    """
    if Path(base).is_dir():
        path = Path(base) / name
        return str(path) if path.is_file() else None
    from huggingface_hub import errors, hf_hub_download

    try:
        return hf_hub_download(base, name)
    except errors.LocalEntryNotFoundError:
        if optional:
            return None
        raise UsageError(
            f"--base_model={base}: no such folder here, and the Hugging Face hub cannot be reached"
            f" for {name}"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise UsageError(
            f"--base_model={base}: not found on the Hugging Face hub, or gated;"
            " ask for access and run `hf auth login`"
        ) from None
    except OSError as error:
        raise UsageError(f"--base_model={base}: {one_line(error)}") from None
