"""Reading a base checkpoint: only what is needed, by name, from the shards that hold it."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaModel

from benchmarks.plain import plain_twin
from datasets.prompts import Template, read_template, tokenise
from engine.errors import UsageError
from experiments import bases
from models import base
from models.builtin import ensure_built_in
from models.llm4rec import LLM4Rec, specify
from models.lora import inject_lora
from models.selection import select_layers
from tests.conftest import TARGETS, histories, small_config
from utils import flags
from utils.flags import LLM, LoRA

WORDS = ["[UNK]", "Below", "is", "an", "instruction", "item", "Response"]
LORA = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "lora_target_modules": TARGETS}
SMALL = {"ends": [2], "exit_heads": False}
PROMPT = flags.Prompt(max_seq_length=8, base_model="x")


def choice(selection: str, interval: int, strategy: str = "auto") -> LLM:
    return LLM(layer_selection=selection, interval_nums=interval, train_strategy=strategy)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """16 layers in 8 shards of two layers each, a final norm that is not all ones, and a fast
    tokenizer.
    """
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
        save_file(
            {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard},
            folder / shard,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": shard_of})
    )
    word_level = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.add_special_tokens(["<s>"])
    # as LLaMA's: a sentence starts with <s> unless special tokens are declined
    word_level.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", word_level.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<s>", unk_token="[UNK]"
    ).save_pretrained(folder)
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
def test_kept_layers_equal_the_full_load_and_other_shards_may_be_absent(
    checkpoint, tmp_path, selection, interval, kept, expected
):
    folder = copied(checkpoint, tmp_path)
    config = base.read_config(str(folder))
    layers = select_layers([*range(config.num_hidden_layers)], kept, choice(selection, interval))
    assert layers == expected
    needed = {f"model-{i // 2 + 1:05d}-of-00008.safetensors" for i in layers} | {
        "model-00001-of-00008.safetensors",
        "model-00008-of-00008.safetensors",
    }
    full = LlamaModel.from_pretrained(folder, dtype=torch.float32)
    for shard in folder.glob("model-*.safetensors"):
        if shard.name not in needed:
            shard.unlink()
    llama = base.load_llama(str(folder), config, layers, torch.float32)
    assert not any(p.is_meta for p in [*llama.parameters(), *llama.buffers()])
    full.layers = torch.nn.ModuleList([full.layers[i] for i in layers])
    for i, layer in enumerate(full.layers):
        layer.self_attn.layer_idx = i
    full.config.num_hidden_layers = len(layers)
    ids = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(
        llama(input_ids=ids, use_cache=False).last_hidden_state,
        full(input_ids=ids, use_cache=False).last_hidden_state,
    )
    assert (llama.norm.weight != 1).all()
    assert [layer.self_attn.layer_idx for layer in llama.layers] == list(range(kept))


@pytest.mark.parametrize("selection", ["first", "interval"])
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_loaded_recommender_equals_its_plain_twin(checkpoint, selection, strategy, float64_norm):
    llm = choice(selection, 2, strategy)
    shape = {"ends": [2, 4], "exit_heads": True}
    ids = [1, 2, 3], [4, 5]
    spec = specify(opened(checkpoint), PROMPT, ids, llm, LoRA(**LORA), **shape)
    torch.manual_seed(0)
    model = LLM4Rec.build(opened(checkpoint), torch.randn(23, 6), spec, bf16=False).double()
    plain, _ = plain_twin(model, (3, 5, TARGETS) if strategy == "lora" else None)
    batch = histories([3, 8, 1])
    torch.testing.assert_close(model(batch), plain(batch), atol=1e-12, rtol=1e-12)


def test_dtype_and_what_is_trained(checkpoint):
    spec = specify(opened(checkpoint), PROMPT, ([1], [2]), LLM(), LoRA(**LORA), **SMALL)
    assert spec["strategy"] == "lora"
    model = LLM4Rec.build(opened(checkpoint), torch.randn(23, 6), spec, bf16=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(("adapter", "head")) for name in trained)
    assert {name.split(".")[-4] for name in trained if "lora_" in name} == set(TARGETS)
    assert all(
        p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        for p in model.parameters()
    )


@pytest.mark.parametrize(
    "kept, selection, interval",
    [(17, "first", 1), (0, "first", 1), (-1, "last", 1), (9, "interval", 1)],
)
def test_layer_counts_out_of_range_are_refused(kept, selection, interval):
    with pytest.raises(UsageError, match="the base checkpoint has 16 layers"):
        select_layers([*range(16)], kept, choice(selection, interval))


def test_faulty_checkpoints_are_named(checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    config = base.read_config(str(folder))

    def load(layers=(0, 1)):
        return base.load_llama(str(folder), config, list(layers), torch.float32)

    (folder / "model-00002-of-00008.safetensors").unlink()
    load()
    with pytest.raises(
        UsageError, match="model-00002-of-00008.safetensors is missing; it holds model.layers.2"
    ):
        load([0, 1, 2])
    first = folder / "model-00001-of-00008.safetensors"
    tensors = load_file(first)
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, first)
    with pytest.raises(UsageError, match="lacks the tensor model.layers.1.mlp.up_proj.weight"):
        load()
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": removed[:5].contiguous()}, first)
    with pytest.raises(
        UsageError, match=r"up_proj.weight is \[5, 32\], config.json says \[48, 32\]"
    ):
        load()
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UsageError, match="damaged or not safetensors"):
        load()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        UsageError, match="neither model.safetensors.index.json nor model.safetensors"
    ):
        load()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UsageError, match="model_type gpt2 unsupported"):
        base.read_config(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="has no config.json"):
        base.read_config(str(folder))


def test_from_the_hub_only_the_needed_files_are_fetched(checkpoint, monkeypatch):
    fetched = []

    def download(repository, name):
        assert repository == "someone/llama"
        fetched.append(name)
        if not (checkpoint / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(checkpoint / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = base.read_config("someone/llama")
    llama = base.load_llama("someone/llama", config, [0, 1, 2, 3], torch.float32)
    assert len(llama.layers) == 4
    assert set(fetched) == {
        "config.json",
        base.INDEX,
        *(f"model-0000{i}-of-00008.safetensors" for i in (1, 2, 8)),
    }


@pytest.mark.parametrize(
    "error, message",
    [
        (
            huggingface_hub.errors.LocalEntryNotFoundError("x"),
            "the Hugging Face hub cannot be reached for config.json",
        ),
        (OSError("first line\nsecond"), "someone/llama: first line second$"),
    ],
)
def test_a_hub_that_fails_is_one_line(monkeypatch, error, message):
    def download(repository, name):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UsageError, match=message):
        base.read_config("someone/llama")


def test_unknown_bases():
    with pytest.raises(UsageError, match="no such folder"):
        base.open_base("./nowhere")
    with pytest.raises(UsageError, match="no such folder"):
        base.open_base("nowhere")
    with pytest.raises(
        UsageError,
        match="someone/llama: no such folder here, and the Hugging Face hub cannot be reached",
    ):
        base.open_base("someone/llama")


def test_an_unknown_lora_target_is_refused(checkpoint):
    lora = LoRA(**LORA | {"lora_target_modules": ["gate_proj", "nope"]})
    spec = specify(
        opened(checkpoint), PROMPT, ([1], [2]), LLM(train_strategy="lora"), lora, **SMALL
    )
    with pytest.raises(UsageError, match="nope matches no projection; there are .*gate_proj"):
        LLM4Rec.build(opened(checkpoint), torch.randn(23, 6), spec, bf16=False)


def test_prompt_ids_are_the_templates_without_special_tokens(checkpoint):
    texts = read_template("alpaca")
    assert texts.prompt.endswith(
        "### Instruction:\nGiven the user\u2019s purchase history, predict next possible item to "
        "be purchased.\n\n### Input:\n"
    )
    assert texts.response == "\n### Response:\n"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenise(texts, str(checkpoint))
    assert ids == tuple(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts)
    short = Template("Below is an item", "Response")
    assert tokenise(short, str(checkpoint)) == ([1, 2, 3, 5], [6])
    assert tokenizer("Response")["input_ids"] == [tokenizer.bos_token_id, 6]  # what must not happen


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ('{"prompt": "a"}', "expected the texts prompt and response, found prompt"),
        ("[]", "not a JSON object"),
    ],
)
def test_bad_templates_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_template(str(path))
    with pytest.raises(UsageError, match="available: alpaca"):
        read_template("nope")


def test_a_base_without_tokenizer_is_refused(checkpoint, tmp_path):
    folder = copied(checkpoint, tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(UsageError, match="no usable tokenizer"):
        tokenise(read_template("alpaca"), str(folder))


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


@pytest.mark.parametrize(
    "layers, total, lora", [(4, 0.944, 2.90), (8, 1.756, 5.80), (32, 6.631, 23.20)]
)
def test_parameter_counts_are_the_papers(layers, total, lora):
    """LLaMA-2-7B: decoder, embeddings and LoRA in billions, LoRA alone in millions (paper's
    efficiency table).
    """
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        llama = LlamaModel(base.prune_config(config, layers))
        llama.requires_grad_(False)
        inject_lora(llama, 16, 16, 0.0, TARGETS)
    sizes = [(p.numel(), p.requires_grad) for p in llama.parameters()]
    assert round(sum(n for n, _ in sizes) / 1e9, 3) == total
    assert round(sum(n for n, trained in sizes if trained) / 1e6, 2) == lora


def test_a_random_twin_has_the_shape_and_the_tokens_but_not_the_weights(checkpoint, tmp_path):
    twins = {keep: tmp_path / str(keep) for keep in (False, True)}
    for keep, folder in twins.items():
        made = {"kind": "twin", "base_model": str(checkpoint), "output_dir": str(folder)}
        bases.main(**made, keep_embeddings=keep, seed=11)
    config = base.read_config(str(checkpoint))
    original, random, layers_only = (
        base.load_llama(str(folder), config, [0, 5], torch.float32)
        for folder in (checkpoint, *twins.values())
    )
    weights = {name: w for name, w in original.state_dict().items() if w.dim() > 1}

    def shared(twin):
        return {name for name, w in weights.items() if twin.state_dict()[name].equal(w)}

    assert shared(random) == set() and shared(layers_only) == {"embed_tokens.weight"}
    prompt = read_template("alpaca")
    ids = [tokenise(prompt, str(folder)) for folder in (checkpoint, *twins.values())]
    assert ids[0] == ids[1] == ids[2]
    assert not opened(checkpoint).is_random
    assert base.open_base(str(twins[True])).is_random
    with pytest.raises(UsageError, match="already exists"):
        bases.main(**made)


@pytest.mark.usefixtures("float64_norm")
def test_a_folded_base_computes_the_same_from_weights_of_a_fresh_models_spread(
    checkpoint, tmp_path
):
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
    torch.testing.assert_close(
        read.double()(ids).last_hidden_state,
        original.double()(ids).last_hidden_state,
        atol=2e-5,
        rtol=2e-5,
    )
    with pytest.raises(UsageError, match="already exists"):
        bases.main(kind="folded", base_model=str(uneven), output_dir=str(folded))


def test_a_tokenizer_model_alone_is_enough(tmp_path):
    """LLaMA-2's older folders have sentencepiece's file and no tokenizer.json."""
    import sentencepiece

    texts = read_template("alpaca")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{texts.prompt}\n{texts.response}\n" * 20)
    folder = tmp_path / "base"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenise(texts, str(folder)) == tuple(plain.encode(list(texts)))
