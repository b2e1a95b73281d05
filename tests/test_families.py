"""Other backbones than LLaMA: the same numbers as the library's forward, through all the steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import distill
import finetune
from benchmarks.plain import plain_twin
from engine.errors import UsageError
from models import base, llm4rec
from models.builtin import ensure_built_in
from serving import export, recommend
from serving.exported import card_scores
from tests.conftest import ROOT, SHORT, TARGETS, histories, refused, small_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "num_hidden_layers": 4, "vocab_size": 400}
SHAPE |= {"max_position_embeddings": 512, "initializer_range": 0.3}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama 3.2": LlamaConfig(**SHAPE, rope_parameters=ROPE, tie_word_embeddings=True),
    "smollm2": LlamaConfig(**SHAPE | {"num_attention_heads": 8}, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=300),
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None, head_dim=12),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12),
}
LORA = ["q_proj", "v_proj", *TARGETS]


def build(name: str, strategy: str):
    """A model around a random decoder whose biases and norms do something."""
    model = small_model(config=CONFIGS[name], strategy=strategy, targets=LORA)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.usefixtures("float64_norm")
@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_the_librarys(name, strategy):
    model = build(name, strategy)
    plain, names = plain_twin(model, (3, 5, LORA) if strategy == "lora" else None)
    batch = histories([8, 1, 5, 3])
    ours, theirs = model.train()(batch), plain.train()(batch)
    for a, b, c in zip(ours, theirs, model.encoder()(batch)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(c, b, atol=1e-11, rtol=1e-11)
    slopes = [torch.randn_like(value) for value in ours]
    for outputs in (model.train()(batch), theirs):
        sum((value * slope).sum() for value, slope in zip(outputs, slopes)).backward()
    own = dict(plain.named_parameters())
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if strategy == "full":
        assert any("q_norm" in key for key in trained) == (name == "qwen3")
        assert any("q_proj.bias" in key for key in trained) == (name == "qwen2")
    for key, parameter in trained.items():
        other = own[names[key]].grad
        torch.testing.assert_close(parameter.grad, other, atol=1e-9, rtol=1e-9)


def save_base(name: str, folder: Path, tmp_path: Path) -> None:
    """A checkpoint with a language model's names, in bfloat16, and a tokenizer."""
    shutil.copytree(ensure_built_in("tiny", tmp_path / "bases"), folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    decoder = base.new_decoder(CONFIGS[name]).bfloat16()
    CONFIGS[name].save_pretrained(folder)
    tensors = {f"model.{key}": value for key, value in decoder.state_dict().items()}
    if not CONFIGS[name].tie_word_embeddings:
        tensors["lm_head.weight"] = decoder.embed_tokens.weight.clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llama 3.2", "mistral", "qwen2", "qwen3"])
def test_every_step_runs_on_it(inside, tmp_path, name):
    save_base(name, Path("mine"), tmp_path)
    flags = SHORT | {"base_model": "mine", "lora_dropout": 0.0}
    chosen = {"layer_selection": "interval", "interval_nums": 2, "llama_decoder_nums": 3}
    taught = finetune.main(**flags, **chosen, output_dir="t")
    config = json.loads(Path("t/config.json").read_text())
    assert config["model"]["layers"] == [0, 1, 3] and config["model"]["strategy"] == "lora"
    assert not config["random_base"]
    assert finetune.main(eval_only=True, output_dir="t")["test"] == taught["test"]
    student = {"llama_decoder_nums_student": 2, "block_map": "1:1,2:3"}
    for cache in ("auto", "off"):  # the cached teacher and the running one
        distill.main(**SHORT, teacher="t", **student, teacher_cache=cache, output_dir=f"s_{cache}")
    cached, live = (json.loads(Path(f"s_{c}/results.json").read_text()) for c in ("auto", "off"))
    assert cached["test"]["full"]["MRR"] == pytest.approx(live["test"]["full"]["MRR"], rel=1e-3)
    expected = recommend.main(model="s_auto", history=["12", "99"], k=3)
    export.main(model="s_auto", output_dir="out", verify_users=50)
    scores = card_scores((ROOT / "serving/scores.py").read_text(), Path("out"))([11, 98])
    scores[[11, 98]] = -torch.inf
    assert [line + 1 for line in scores.topk(3).indices] == [row["item_id"] for row in expected]


LIMITS = [("sliding_window", "tokens in its attention window"), ("max_position_embeddings", "pos")]


@pytest.mark.parametrize("limit, unit", LIMITS)
def test_a_sequence_longer_than_the_base_reads_is_refused(inside, tmp_path, limit, unit):
    save_base("mistral", Path("mine"), tmp_path)
    config = json.loads(Path("mine/config.json").read_text()) | {limit: 90}
    Path("mine/config.json").write_text(json.dumps(config))
    with refused(f"62 + 30 + 7 tokens, the base has 90 {unit}"):
        finetune.main(**SHORT, base_model="mine", llama_decoder_nums=2, output_dir="t")


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "qwen2_moe", "bert", "gpt2"])
def test_what_is_not_supported_names_what_is(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with refused(f"model_type {kind} unsupported, expected {', '.join(base.FAMILIES[:-1])} or"):
        base.read_config(str(tmp_path))


def test_an_added_family_is_proved_on_its_first_load(tmp_path, monkeypatch):
    """LLaMA's arithmetic loads; what scales or is built otherwise is refused."""
    from transformers import GraniteConfig, Olmo2Config, SmolLM3Config, StableLmConfig

    known = ("mistral", "granite", "olmo2", "stablelm", "smollm3")
    monkeypatch.setattr(base, "FAMILIES", known)
    monkeypatch.setattr(llm4rec, "PROVEN", ())
    configs = {
        "mistral": CONFIGS["mistral"],
        "granite": GraniteConfig(**SHAPE, attention_multiplier=12**-0.5),
        "scaled": GraniteConfig(**SHAPE, attention_multiplier=12**-0.5, residual_multiplier=0.5),
        "norms after the layers": Olmo2Config(**SHAPE),
        "a part of each head rotated": StableLmConfig(**SHAPE),
        "layer 2 without": SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 0, 1], pad_token_id=0),
    }
    spec = {"layers": [0, 2], "prompt_ids": [1, 2, 3], "response_ids": [4], "n_blocks": 1}
    spec |= {"exit_heads": False, "strategy": "full"}
    lora = {"lora_r": 2, "lora_alpha": 2, "lora_dropout": 0.0, "lora_target_modules": ["up_proj"]}
    for name, config in configs.items():
        torch.manual_seed(0)
        decoder = base.new_decoder(config)
        config.save_pretrained(tmp_path / name)
        save_file(dict(decoder.state_dict()), tmp_path / name / "model.safetensors")
        opened = base.open_base(str(tmp_path / name))
        for strategy, bf16 in (("full", False), ("lora", False), ("lora", True)):
            given = opened, torch.randn(9, 4), spec | lora | {"strategy": strategy}, bf16
            if name in ("mistral", "granite"):
                assert llm4rec.LLM4Rec.build(*given).decoder.n_layers == 2
                continue
            with pytest.raises(UsageError, match=f"model_type {config.model_type} compute someth"):
                llm4rec.LLM4Rec.build(*given)
