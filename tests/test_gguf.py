"""A GGUF file becomes a base with the same weights, whole or not at all."""

import math
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import finetune
from datasets.prompts import read_template, tokenise
from engine.errors import UsageError
from experiments import bases
from models import base
from tests.conftest import ROOT, SHORT, small_config

TEXT = (
    "It had rained all night, and in the morning the river stood a foot above the road. The mayor"
    " called a meeting at the town hall, but few people came, because most of them were carrying"
    " their furniture upstairs."
)


def write_file(path: Path, without: str = "no tensor", more: str = "") -> LlamaForCausalLM:
    """A tiny LLaMA with grouped queries as llama.cpp writes it, in float32; returns it.

    Args:
        without: leave out the tensors whose names begin so.
        more: name of a tensor that the model does not have.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(small_config(2, 2, vocab_size=300, max_position_embeddings=512))
    writer = library.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    letters = [chr(c) for c in range(33, 33 + 94)] + [chr(c) for c in range(161, 161 + 166)]
    letters[0], letters[1] = "Ġ", "Ċ"  # blank and line end, as byte-level tokenizers write them
    tokens = [*letters, "12", *(f"<{i}>" for i in range(299 - len(letters)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 300)
    writer.add_token_merges(["1 2"])
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{a}_proj": f"attn_{b}" for a, b in zip("qkv", "qkv")}
    names |= {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the two halves that are rotated together
            tensor = tensor.view(heads, 2, 4, 32).transpose(1, 2).reshape(tensor.shape)
        parts = name.removeprefix("model.").removesuffix(".weight")
        if parts.startswith("layers."):
            _, number, inner = parts.split(".", 2)
            parts = f"blk.{number}.{names[inner]}"
        whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        stored = f"{whole.get(parts, parts)}.weight"
        if not stored.startswith(without):
            writer.add_tensor(stored, np.ascontiguousarray(tensor.numpy()))
    if more:
        writer.add_tensor(more, np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def made(file: str, folder: str = "made") -> str:
    return str(bases.main(kind="gguf", base_model=file, output_dir=folder))


def test_weights_and_digits_survive(here):
    model = write_file(Path("mine.gguf"))
    place = made("mine.gguf")
    llama = base.load_llama(place, base.read_config(place), [0, 1], torch.float32)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(llama.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(place)
    digits = tokenizer("12", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits) == ["1", "2"]  # though there is a merge


def test_what_cannot_be_read_is_one_line(here, monkeypatch):
    Path("text.gguf").write_text("no model")
    Path("cut.gguf").write_bytes(b"GGUF" + bytes(100))
    write_file(Path("mine.gguf"))
    write_file(Path("half.gguf"), without="blk.1.")
    write_file(Path("more.gguf"), more="blk.0.attn_q.bias")
    write_file(Path("scaled.gguf"), more="rope_freqs.weight")
    for name, message in (
        ("none.gguf", "--base_model=none.gguf: file not found"),
        ("text.gguf", "text.gguf: transformers cannot read it"),
        ("cut.gguf", "cut.gguf: transformers cannot read it"),
        ("half.gguf", "half.gguf: lacks 9 tensors, such as that of model.layers.1"),
        ("more.gguf", "has 22 tensors, the base 21 weights"),
        ("scaled.gguf", "has rope_freqs.weight, scaled rotary positions"),
    ):
        with pytest.raises(UsageError, match=message):
            made(name)
    with pytest.raises(UsageError, match="a GGUF file; python -m experiments.bases --kind gguf"):
        base.open_base("mine.gguf")
    with pytest.raises(UsageError, match="no base in output/base/smollm2; `make smollm2` makes it"):
        base.open_base("smollm2")
    monkeypatch.setattr(bases, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(UsageError, match="--kind=gguf needs gguf; pip install gguf"):
        made("mine.gguf")
    assert not Path("made").exists()


@pytest.fixture
def smollm2(monkeypatch):
    monkeypatch.chdir(ROOT)
    if not (base.MADE["smollm2"] / "config.json").is_file():
        pytest.skip("no output/base/smollm2: make smollm2 brings it")
    return base.open_base("smollm2").location


def perplexity(model: LlamaForCausalLM, tokenizer) -> float:
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return math.exp(float(model(ids, labels=ids).loss))


@pytest.mark.slow
def test_smollm2_has_read_text_and_keeps_its_tokens(smollm2):
    ids = tokenise(read_template("alpaca"), smollm2)
    assert [len(part) for part in ids] == [55, 5]
    model, tokenizer = (c.from_pretrained(smollm2) for c in (AutoModelForCausalLM, AutoTokenizer))
    assert perplexity(model, tokenizer) < 60
    assert perplexity(LlamaForCausalLM(model.config), tokenizer) > 10_000


def test_a_teacher_of_smollm2_trains(smollm2, inside):
    short = SHORT | {"max_steps": 1, "llama_decoder_nums": 1}
    result = finetune.main(**short, base_model=str(ROOT / smollm2), output_dir="t")
    assert result["trainable_parameters"] < result["parameters"] / 10  # LoRA by default
