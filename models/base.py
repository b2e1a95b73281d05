"""Base checkpoints: where they are, and reading only the tensors that are needed.

A base is a Hugging Face id, a local folder in the Hugging Face layout (experiments/bases.py makes
such folders), or a built-in random LLaMA (models/builtin.py). Its family is one of FAMILIES:
decoders whose layers have LLaMA's residuals and MLP. What they do to queries and keys is the
library's own modules (models/decoder.py).
"""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from engine import cli
from engine.errors import UsageError, one_line
from engine.files import file_sha256, read_json
from models.builtin import BUILT_IN, FOLDER, ensure_built_in

MADE = {"smollm2": FOLDER / "smollm2"}  # by `make`
PROVEN = ("llama", "mistral", "qwen2", "qwen3")  # against the library's forward, by the tests
# EDIT for another one, as (*PROVEN, "granite"); each load is compared with the library's
FAMILIES = PROVEN
WEIGHT_TYPES = ("F64", "F32", "BF16", "F16")
COMPUTED = ".rotary_emb.inv_freq"  # older checkpoints store it
SAMPLES, SAMPLE = 64, 4096  # pieces of a shard that its fingerprint covers, and their bytes
FINGERPRINT = "2-"  # with pieces of every tensor; before 2026-11-28 it had none of some
logging.set_verbosity_error()  # load_llama judges what was read
logging.disable_progress_bar()


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
        return file_sha256(config_file(self.location))

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
        commit = config_file(base).parent.name
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
    if not Path(base).is_dir():
        config_file(base)  # what is not there is said first
    if _file_of(base, "adapter_config.json"):  # transformers would load the base that it names
        raise UsageError(
            f"--base_model={base}: has a LoRA adapter (adapter_config.json), which nothing here"
            " reads; merge it into the weights (peft: merge_and_unload) and save, or remove it"
        )
    path = config_file(base)
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
    rates = [f"{name} is {rate}" for name, rate in content.items() if "dropout" in name and rate]
    if rates:
        raise UsageError(f"{path}: {', '.join(rates)}, and nothing here applies it; write 0")
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
    """The base cut down to `layers` (renumbered) with its embeddings and final norm; layers after
    the last one are not read. Raises UsageError: a needed tensor is missing, has an unexpected
    shape, or is quantised; a kept layer has more tensors; a file is missing or damaged.
    """
    upto = prune_config(config, range(max(layers) + 1))
    kind = MODEL_MAPPING[type(config)]
    options = {"config": upto, "dtype": dtype, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both judged below
    try:
        llama, about = kind.from_pretrained(base, **options)
        _refuse_quantised(base)  # now that a hub's files are here
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--base_model={base}: its weights cannot be read ({one_line(error)})"
        ) from None
    for name, found, expected in about["mismatched_keys"]:
        raise UsageError(
            f"--base_model={base}: {name} is {list(found)}, config.json says {list(expected)}"
        )
    _refuse_other_tensors(base, about["missing_keys"], about["unexpected_keys"], layers)
    llama.layers = torch.nn.ModuleList(llama.layers[layer] for layer in layers)
    for number, layer in enumerate(llama.layers):
        layer.self_attn.layer_idx = number
    pruned = prune_config(config, layers)
    pruned._attn_implementation = llama.config._attn_implementation
    for module in llama.modules():
        if hasattr(module, "config"):
            module.config = pruned
    return llama.train()


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


def _refuse_other_tensors(
    base: str, missing: Collection[str], more: Collection[str], layers: Collection[int]
) -> None:
    """Refuse a checkpoint that lacks tensors, or has more of them in a kept layer than are read."""
    if missing:
        others = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise UsageError(f"--base_model={base}: lacks the tensor {min(missing)}{others}")
    inside = re.compile(rf"(?:model\.)?layers\.(?:{'|'.join(map(str, layers))})\.")
    unread = [name for name in sorted(more) if inside.match(name) and not name.endswith(COMPUTED)]
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


def _refuse_quantised(base: str) -> None:
    """Refuse weights in a type that the library would convert without their scales."""
    for path in sorted(config_file(base).parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            names = shard.keys()
            for name in names:
                kind = shard.get_slice(name).get_dtype()
                if kind not in WEIGHT_TYPES:
                    raise UsageError(
                        f"--base_model={base}: {name} is {kind}, quantised; use the checkpoint in"
                        " bf16, fp16 or fp32 that it was made from"
                    )


def config_file(base: str) -> Path:
    """The base's config.json, downloaded from the hub if need be. Raises UsageError: neither a
    folder nor the hub has it.
    """
    if Path(base).is_dir():
        cli.check(
            ((Path(base) / "config.json").is_file(), f"--base_model={base}: has no config.json")
        )
    try:
        found = cached_file(base, "config.json")
    except OSError as error:  # missing, gated, or without a network
        raise UsageError(
            f"--base_model={base}: no such folder, and on the hub: {one_line(error)}"
        ) from None
    if found is None:
        raise UsageError(
            f"--base_model={base}: has no config.json on the hub; a repository in the Hugging Face"
            " layout is needed, such as meta-llama/Llama-2-7b-hf"
        )
    return Path(found)


def _file_of(base: str, name: str) -> str | None:
    """A file of the base, in its folder or on the hub; None where it has none."""
    return cached_file(
        base,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
