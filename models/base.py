"""Base checkpoints: where they are, and reading only the tensors that are needed.

A base is a Hugging Face id, a local folder in the Hugging Face layout, or a built-in random LLaMA (`tiny`, `small`) that
is written once to disk and then read like any other.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

from utils.cli import UsageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BUILT_IN = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8},
}
BUILT_IN_FOLDER = Path("output/base")
BUILT_IN_LAYERS, BUILT_IN_SEED = 8, 0
VOCABULARY = 390  # with it the alpaca prompt has 62 + 7 tokens, as with the LLaMA tokenizer


def locate(base: str, corpus: list[str], root: Path = BUILT_IN_FOLDER) -> str:
    """The folder or Hugging Face id behind `base`; a built-in is written below `root` the first time.

    Args:
        corpus: texts that a built-in's tokenizer is made from.
    Raises:
        UsageError: a path that does not exist, a hub that does not have it, or not a LLaMA.
    """
    if base in BUILT_IN:
        folder = root / base
        if not (folder / "config.json").exists():
            _write_built_in(folder, BUILT_IN[base], corpus)
        return str(folder)
    if not Path(base).is_dir() and (base.startswith((".", "/", "~")) or base.count("/") != 1 or base.endswith("/")):
        raise UsageError(
            f"--base_model={base}: no such folder, and not one of {', '.join(BUILT_IN)} or a Hugging Face id such as meta-llama/Llama-2-7b-hf"
        )
    read_config(base)
    return base


def read_config(base: str) -> LlamaConfig:
    """The base's configuration.

    Raises:
        UsageError: no config.json, or not a LLaMA.
    """
    path = _file(base, "config.json")
    if path is None:
        raise UsageError(f"--base_model={base}: has no config.json")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path}: damaged, not JSON") from None
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != "llama":
        raise UsageError(f"--base_model={base}: model_type {found} unsupported, expected llama")
    try:
        return LlamaConfig(**content)
    except Exception as error:  # transformers checks fields in several ways
        raise UsageError(f"{path}: not a LLaMA's configuration ({_line(error)})") from None


def contents(base: str) -> list:
    """What tells a base from another wherever and whenever it was written: file names and sizes, or the hub's commit."""
    if Path(base).is_dir():
        return [entry[:2] for entry in identity(base)]
    return [base, Path(_file(base, "config.json")).parent.name]


def identity(base: str) -> list:
    """What tells the base's present files from others, without reading them: names, sizes and times, or the hub's snapshot."""
    if not Path(base).is_dir():
        return [base, _file(base, "config.json")]  # in the hub's cache the path holds the commit
    files = [Path(base) / "config.json", *sorted(Path(base).glob("*.safetensors"))]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_llama(base: str, config: LlamaConfig, layers: list[int], dtype: torch.dtype) -> LlamaModel:
    """The base cut down to `layers` (renumbered) with its embeddings and final norm; reads nothing else.

    Raises:
        UsageError: a needed tensor or the shard that holds it is missing, or has an unexpected shape.
    """
    pruned = prune_config(config, len(layers))
    with torch.device("meta"):
        llama = LlamaModel(pruned)
    wanted = {}
    for name in llama.state_dict():
        head, _, rest = name.partition(".")
        if head == "layers":
            number, _, rest = rest.partition(".")
            wanted[name] = f"layers.{layers[int(number)]}.{rest}"
        else:
            wanted[name] = name
    tensors = _read_tensors(base, list(wanted.values()), dtype)
    for name, meta in llama.state_dict().items():
        if tensors[wanted[name]].shape != meta.shape:
            raise UsageError(
                f"--base_model={base}: {wanted[name]} is {list(tensors[wanted[name]].shape)}, config.json says {list(meta.shape)}"
            )
    llama.load_state_dict({name: tensors[wanted[name]] for name in wanted}, assign=True)
    llama.rotary_emb = LlamaRotaryEmbedding(pruned)  # its buffers are computed, not stored
    return llama


def prune_config(config: LlamaConfig, n_layers: int) -> LlamaConfig:
    """A copy of the configuration for `n_layers` layers."""
    pruned = LlamaConfig(**config.to_dict())
    pruned.num_hidden_layers = n_layers
    pruned.use_cache = False
    return pruned


def _read_tensors(base: str, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by their names inside the decoder, from whichever shards hold them."""
    index = _file(base, INDEX, optional=True)
    if index is not None:
        shard_of = _weight_map(index)
    else:
        single = _file(base, SINGLE)
        if single is None:
            raise UsageError(f"--base_model={base}: has neither {INDEX} nor {SINGLE}; weights are read from safetensors only")
        with _opened(single) as shard:
            shard_of = dict.fromkeys(shard.keys(), SINGLE)
    prefix = "model." if any(name.startswith("model.") for name in shard_of) else ""  # LlamaForCausalLM's or LlamaModel's
    stored = {name: prefix + name for name in names}
    missing = [stored[name] for name in names if stored[name] not in shard_of]
    if missing:
        raise UsageError(f"--base_model={base}: lacks the tensor {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    tensors = {}
    for shard_name in sorted({shard_of[stored[name]] for name in names}):
        mine = [name for name in names if shard_of[stored[name]] == shard_name]
        path = _file(base, shard_name)
        if path is None:
            raise UsageError(f"--base_model={base}: {shard_name} is missing; it holds {stored[mine[0]]}")
        with _opened(path) as shard:
            there = set(shard.keys())
            for name in mine:
                if stored[name] not in there:
                    raise UsageError(f"--base_model={base}: {shard_name} lacks the tensor {stored[name]} that the index places there")
                tensors[name] = shard.get_tensor(stored[name]).to(dtype)
    return tensors


def _weight_map(index: str) -> dict[str, str]:
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()):
        raise UsageError(f"{index}: damaged, expected JSON with a weight_map from tensors to files")
    return weight_map


def _opened(path: str):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged or not safetensors ({_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _file(base: str, name: str, optional: bool = False) -> str | None:
    """A local path of a file of the base, downloaded from the hub if need be; None where the base has no such file.

    Offline nobody knows whether the hub has a file that is not in the cache: then an optional one counts as absent.
    """
    if Path(base).is_dir():
        path = Path(base) / name
        return str(path) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return hf_hub_download(base, name)
    except LocalEntryNotFoundError:
        if optional:
            return None
        raise UsageError(f"--base_model={base}: no such folder here, and the Hugging Face hub cannot be reached for {name}") from None
    except EntryNotFoundError:
        return None
    except (GatedRepoError, RepositoryNotFoundError):
        raise UsageError(
            f"--base_model={base}: not found on the Hugging Face hub, or gated; ask for access and run `hf auth login`"
        ) from None
    except OSError as error:
        raise UsageError(f"--base_model={base}: {_line(error)}") from None


def _write_built_in(folder: Path, shape: dict[str, int], corpus: list[str]) -> None:
    """A random LLaMA and a byte-level tokenizer that cuts the default prompt into about as many tokens as LLaMA's."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = _train_tokenizer(corpus)
    config = LlamaConfig(
        **shape, num_hidden_layers=BUILT_IN_LAYERS, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BUILT_IN_SEED)
        llama = LlamaModel(config)
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    llama.save_pretrained(partial)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        if not (folder / "config.json").exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train_tokenizer(corpus: list[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
