"""The built-in random bases, `tiny` and `small`: for trying out, and for research without weights.

A base is written once to disk, with a tokenizer, and then read like any other.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from engine.files import save_whole

BUILT_IN = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8},
}
FOLDER = Path("output/base")
LAYERS, SEED = 8, 0
VOCABULARY = 390  # with it the alpaca prompt has 62 + 7 tokens, as with the LLaMA tokenizer
TEMPLATE = Path(__file__).parent.parent / "templates" / "alpaca.json"


def ensure_built_in(name: str, root: Path = FOLDER) -> Path:
    """The folder of a built-in base, written the first time."""
    folder = root / name
    if not (folder / "config.json").exists():
        _write(folder, BUILT_IN[name])
    return folder


def _write(folder: Path, shape: dict[str, int]) -> None:
    """A random LLaMA, and a tokenizer that cuts the prompt into as many tokens as LLaMA's."""
    from transformers import PreTrainedTokenizerFast

    texts = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    tokenizer = _train_tokenizer([texts["prompt"], texts["response"]])
    config = LlamaConfig(
        **shape,
        num_hidden_layers=LAYERS,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        llama = LlamaModel(config)
    save_whole(folder, llama, PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def _train_tokenizer(corpus: list[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([single, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer
