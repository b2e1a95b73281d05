"""The prompt as data: a template's two texts and their token ids."""

from pathlib import Path
from typing import NamedTuple

from engine.errors import UsageError
from engine.files import read_json

TEMPLATES = Path(__file__).parent.parent / "templates"


class Template(NamedTuple):
    """The texts that the LLM reads before and after the items."""

    prompt: str
    response: str


def read_template(name: str) -> Template:
    """The texts of templates/<name>.json, or of a JSON file given by its path. Raises UsageError:
    no such file, or it lacks one of the two texts.
    """
    path = Path(name) if name.endswith(".json") else TEMPLATES / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.json")))
        raise UsageError(
            f"--prompt_template_name={name}: no file {path}; available: {there},"
            " or a path ending in .json"
        )
    content = read_json(path, "prompt template")
    texts = [content.get("prompt"), content.get("response")]
    if not all(isinstance(text, str) and text for text in texts):
        raise UsageError(
            f"{path}: expected the texts prompt and response, found {', '.join(content)}"
        )
    return Template(*texts)


def tokenise(texts: Template, base: str) -> tuple[list[int], list[int]]:
    """Token ids of the two texts, each alone and without special tokens, by `base`'s tokenizer.

    Args:
        base: a local folder or a Hugging Face id.
    Raises:
        UsageError: the base has no tokenizer, or a text has no tokens.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    # Of tokenizer.model alone the library takes another class, which drops the first blank.
    there = {path.name for path in Path(base).glob("tokenizer*")}
    alone = "tokenizer.model" in there and not {"tokenizer.json", "tokenizer_config.json"} & there
    kind = LlamaTokenizer if alone else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(base, trust_remote_code=False)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    except Exception as error:  # tokenizers raises a plain Exception for a damaged file
        reason = str(error).strip().split("\n")[0][:120]
        raise UsageError(
            f"--base_model={base}: no usable tokenizer; expected tokenizer.json, or"
            f" tokenizer.model, beside the weights ({reason})"
        ) from None
    if not all(ids):
        raise UsageError(
            f"--base_model={base}: its tokenizer makes no tokens of the prompt template"
        )
    if {*ids[0], *ids[1]} == {tokenizer.unk_token_id}:
        raise UsageError(
            f"--base_model={base}: its tokenizer knows nothing of the prompt: every token is"
            f" {tokenizer.unk_token}; put the base's own there"
        )
    return ids
