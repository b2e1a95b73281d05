"""Reading a base checkpoint: only what is needed, by name, from the shards that hold it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaModel

from benchmarks import efficiency
from datasets.prompts import Template, read_template, tokenise
from engine.errors import UsageError
from experiments import bases
from models import base
from models.builtin import ensure_built_in
from models.llm4rec import LLM4Rec, specify
from models.lora import inject_lora
from models.selection import select_layers
from tests.conftest import TARGETS, refused, small_config
from utils import flags
from utils.flags import LLM, LoRA

INDEX = "model.safetensors.index.json"
WORDS = ["[UNK]", "Below", "is", "an", "instruction", "item", "Response"]
LORA = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "lora_target_modules": TARGETS}
SMALL = {"ends": [2], "exit_heads": False}
PROMPT = flags.Prompt(max_seq_length=8, base_model="x")


def choice(selection: str, interval: int, strategy: str = "auto") -> LLM:
    return LLM(layer_selection=selection, interval_nums=interval, train_strategy=strategy)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """16 layers in 8 shards of two, a final norm that is not all ones, and a fast tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(3)
    model = LlamaForCausalLM(small_config(layers=16))
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {}
    for name in tensors:
        parts = name.split(".")
        # the norm sits in the last shard
        number = int(parts[2]) // 2 if "layers" in name else (0 if "embed" in name else 7)
        shard_of[name] = f"model-{number + 1:05d}-of-00008.safetensors"
    for shard in set(shard_of.values()):
        mine = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    numbers = {word: i for i, word in enumerate(WORDS)}
    word_level = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.add_special_tokens(["<s>"])
    # as LLaMA's: a sentence starts with <s> unless special tokens are declined
    special = {"single": "<s> $A", "special_tokens": [("<s>", word_level.token_to_id("<s>"))]}
    word_level.post_processor = processors.TemplateProcessing(**special)
    options = {"bos_token": "<s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=word_level, **options).save_pretrained(folder)
    return folder


def opened(checkpoint):
    return base.open_base(str(checkpoint))


def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.mark.parametrize(
    "selection, interval, kept, expected",
    [
        ("first", 1, 4, [0, 1, 2, 3]),
        ("interval", 1, 4, [0, 2, 4, 6]),
        ("interval", 3, 5, [0, 1, 2, 4, 5]),
        ("0,7,15", 1, 3, [0, 7, 15]),
        ("last", 1, 3, [13, 14, 15]),
    ],
)
def test_kept_layers_equal_the_full_load(checkpoint, selection, interval, kept, expected):
    config = base.read_config(str(checkpoint))
    layers = select_layers([*range(config.num_hidden_layers)], kept, choice(selection, interval))
    assert layers == expected
    full = LlamaModel.from_pretrained(checkpoint, dtype=torch.float32)
    llama = base.load_llama(str(checkpoint), config, layers, torch.float32)
    assert not any(p.is_meta for p in [*llama.parameters(), *llama.buffers()])
    full.layers = torch.nn.ModuleList([full.layers[i] for i in layers])
    for i, layer in enumerate(full.layers):
        layer.self_attn.layer_idx = i
    full.config.num_hidden_layers = len(layers)
    ids = torch.tensor([[1, 5, 9, 2]])
    found, expected = (m(ids, use_cache=False).last_hidden_state for m in (llama, full))
    assert torch.equal(found, expected)
    assert (llama.norm.weight != 1).all()
    assert [layer.self_attn.layer_idx for layer in llama.layers] == list(range(kept))
    assert all(layer.self_attn.config is llama.config for layer in llama.layers)
    assert llama.config._attn_implementation == full.config._attn_implementation == "sdpa"


def test_dtype_and_what_is_trained(checkpoint):
    spec = specify(opened(checkpoint), PROMPT, ([1], [2]), LLM(), LoRA(**LORA), **SMALL)
    assert spec["strategy"] == "lora"
    model = LLM4Rec.build(opened(checkpoint), torch.randn(23, 6), spec, bf16=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(("adapter", "head")) for name in trained)
    assert {name.split(".")[-4] for name in trained if "lora_" in name} == set(TARGETS)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("kept, selection", [(17, "first"), (-1, "last")])
def test_layer_counts_out_of_range_are_refused(kept, selection):
    with refused("the base checkpoint has 16 layers"):
        select_layers([*range(16)], kept, choice(selection, 1))


def test_faulty_checkpoints_are_named(checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    config = base.read_config(str(folder))

    def load(layers=(0, 1)):
        return base.load_llama(str(folder), config, list(layers), torch.float32)

    first = folder / "model-00001-of-00008.safetensors"
    tensors, whole = load_file(first), first.read_bytes()
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, first, metadata={"format": "pt"})
    with refused("copy: lacks the tensor layers.1.mlp.up_proj.weight"):
        load()
    wrong = {"model.layers.1.mlp.up_proj.weight": removed[:5].contiguous()}
    save_file(tensors | wrong, first, metadata={"format": "pt"})
    with refused("up_proj.weight is [5, 32], config.json says [48, 32]"):
        load()
    first.write_bytes(whole[:100])
    with refused("copy: its weights cannot be read"):
        load()
    first.write_bytes(whole)
    load([0, 15])
    (folder / "model-00002-of-00008.safetensors").unlink()
    with pytest.raises(UsageError, match="its weights cannot be read .*model-00002-of-00008"):
        load()
    (folder / INDEX).write_text("{oops")
    with refused("copy: its weights cannot be read"):
        load()
    (folder / INDEX).unlink()
    with pytest.raises(UsageError, match="its weights cannot be read .*model.safetensors"):
        load()
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="has no config.json"):
        base.read_config(str(folder))


@pytest.mark.parametrize("text", ["cannot reach the hub", "first line\nsecond"])
def test_a_hub_that_fails_is_one_line(monkeypatch, text):
    def fail(*_):
        raise OSError(text)

    monkeypatch.setattr(base, "cached_file", fail)
    with refused(f"someone/llama: no such folder, and on the hub: {' '.join(text.split())}"):
        base.read_config("someone/llama")
    for found, line in ((None, "no config.json on the hub"), ("file", "a LoRA adapter")):
        monkeypatch.setattr(base, "cached_file", lambda *_, found=found, **__: found)
        with refused(f"--base_model=someone/llama: has {line}"):
            base.read_config("someone/llama")


def test_unknown_bases():
    for name in ("./no", "no", "some/one"):
        with refused(f"{name}: no such folder"):
            base.open_base(name)


def test_prompt_ids_are_the_templates_without_special_tokens(checkpoint):
    texts = read_template("alpaca")
    asked = "history, predict next possible item to be purchased.\n\n### Input:\n"
    assert texts.prompt.endswith("### Instruction:\nGiven the user\u2019s purchase " + asked)
    assert texts.response == "\n### Response:\n"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenise(texts, str(checkpoint))
    assert ids == tuple(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts)
    short = Template("Below is an item", "Response")
    assert tokenise(short, str(checkpoint)) == ([1, 2, 3, 5], [6])
    assert tokenizer("Response")["input_ids"] == [tokenizer.bos_token_id, 6]  # what must not happen


def test_a_tokenizer_of_another_base_is_refused(checkpoint, tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    with refused("knows nothing of the prompt: every token is [UNK]"):
        tokenise(read_template("alpaca"), str(tmp_path))
    n = opened(checkpoint).config.vocab_size
    with refused(f"gives token {n}, its config.json says vocab_size {n}"):
        specify(opened(checkpoint), PROMPT, ([n], [1]), choice("first", 1), LoRA(), **SMALL)


def test_bad_templates_are_refused(tmp_path):
    path, lacks = tmp_path / "mine.json", "expected the texts prompt and response, found prompt"
    for content, said in (("{", "not JSON"), ('{"prompt": "a"}', lacks), ("[]", "not a JSON obj")):
        path.write_text(content)
        with pytest.raises(UsageError, match=said):
            read_template(str(path))


def test_built_in_bases_load_like_any_other_and_keep_the_prompts_length(tmp_path):
    texts = read_template("alpaca")
    location = str(ensure_built_in("tiny", tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert str(ensure_built_in("tiny", tmp_path)) == location
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert [len(ids) for ids in tokenise(texts, location)] == [62, 7]
    config = base.read_config(location)
    llama = base.load_llama(location, config, [0, 1], torch.float32)
    full = LlamaModel.from_pretrained(location, dtype=torch.float32)
    assert torch.equal(llama.layers[1].mlp.up_proj.weight, full.layers[1].mlp.up_proj.weight)
    assert str(ensure_built_in("tiny", tmp_path / "again")) != location
    for name, content in before.items():
        assert (tmp_path / "again/tiny" / name).read_bytes() == content, name


@pytest.mark.parametrize("n, total, lora", [(4, 0.944, 2.9), (8, 1.756, 5.8), (32, 6.631, 23.2)])
def test_parameter_counts_are_the_papers(n, total, lora):
    """LLaMA-2-7B: all but the adapters in billions, LoRA alone in millions (the paper's table)."""
    config = LlamaConfig(**efficiency.LLAMA_2_7B, num_hidden_layers=32)
    with torch.device("meta"):
        llama = LlamaModel(base.prune_config(config, range(n)))
        llama.requires_grad_(False)
        inject_lora(llama, 16, 16, 0.0, TARGETS)
    sizes = [(p.numel(), p.requires_grad) for p in llama.parameters()]
    assert round(sum(size for size, _ in sizes) / 1e9, 3) == total
    assert round(sum(size for size, trained in sizes if trained) / 1e6, 2) == lora


def test_a_random_twin_has_the_shape_and_the_tokens_but_not_the_weights(checkpoint, tmp_path):
    folder = str(tmp_path / "twin")
    made = {"kind": "twin", "base_model": str(checkpoint), "output_dir": folder, "seed": 11}
    bases.main(**made)
    config, every = base.read_config(str(checkpoint)), [str(checkpoint), folder]
    read = (base.load_llama(name, config, [0, 5], torch.float32) for name in every)
    original, random = read
    weights = {name: w for name, w in original.state_dict().items() if w.dim() > 1}
    assert not any(random.state_dict()[name].equal(w) for name, w in weights.items())
    prompt = read_template("alpaca")
    ids = [tokenise(prompt, folder) for folder in every]
    assert ids[0] == ids[1]
    assert not opened(checkpoint).is_random
    assert base.open_base(folder).is_random
    with pytest.raises(UsageError, match="already exists"):
        bases.main(**made)


@pytest.mark.usefixtures("float64_norm")
def test_a_folded_base_computes_the_same_from_weights_of_usual_spread(checkpoint, tmp_path):
    uneven, folded = tmp_path / "uneven", tmp_path / "folded"
    config = base.read_config(str(checkpoint))
    config.initializer_range = 0.05  # the weights have 0.3
    original = base.load_llama(str(checkpoint), config, [*range(16)], torch.float32)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 1.7)
    original.save_pretrained(uneven)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(uneven)
    bases.main(kind="folded", base_model=str(uneven), output_dir=str(folded))
    again = base.read_config(str(folded))
    factor = (again.rms_norm_eps / config.rms_norm_eps) ** 0.5
    assert factor == pytest.approx(0.05 / 0.3, rel=0.05)
    read = base.load_llama(str(folded), again, [*range(16)], torch.float32)
    gains = [w for name, w in read.named_parameters() if "layernorm" in name]
    assert len(gains) == 32 and all((gain == 1).all() for gain in gains)
    assert read.norm.weight.equal(original.norm.weight)
    ids = torch.randint(0, 60, (2, 9))
    # Folding rounds every weight to float32; 16 layers add up these errors.
    found, expected = (m.double()(ids).last_hidden_state for m in (read, original))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_a_tokenizer_model_alone_is_enough(tmp_path):
    """LLaMA-2's older folders have sentencepiece's file and no tokenizer.json."""
    import sentencepiece

    texts = read_template("alpaca")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{texts.prompt}\n{texts.response}\n" * 20)
    folder = tmp_path / "base"
    folder.mkdir()
    options = {"input": str(corpus), "model_prefix": str(folder / "tokenizer"), "vocab_size": 400}
    options |= {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    options |= {"normalization_rule_name": "identity", "minloglevel": 3}
    sentencepiece.SentencePieceTrainer.train(**options)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenise(texts, str(folder)) == tuple(plain.encode(list(texts)))
