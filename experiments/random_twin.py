"""A base's random twin: the same shape and tokenizer, weights as a fresh model has them.

A run on it shows what the base's own weights are worth. The folder is a base like any other.

    python -m experiments.random_twin --base_model smollm2 --output_dir output/base/smollm2_random
    python -m experiments.random_twin --base_model smollm2 --keep_embeddings true \
        --output_dir output/base/smollm2_random_layers
    python finetune.py --base_model output/base/smollm2_random
"""

from utils import cli
from utils.files import new_folder, save_whole
from utils.flags import Seed, flag


@cli.command
def main(
    *,
    base_model: str = flag(help="as finetune.py reads it"),
    output_dir: str = flag(help="the folder of the twin; it must not exist"),
    keep_embeddings: bool = flag(False, "only the layers are random; tokens keep their vectors"),
    seed: Seed = flag(0, "of the weights"),
) -> dict:
    """Write a base's random twin."""
    folder = new_folder(output_dir, "--output_dir")

    import torch
    from transformers import AutoTokenizer

    from models import base

    location = base.locate(base_model)
    config = base.read_config(location)
    torch.manual_seed(seed)
    config.random_layers = True  # for tables: see models.base.is_random
    twin = base.new_decoder(config)
    if keep_embeddings:
        original = base.load_llama(location, config, [], torch.float32)
        twin.embed_tokens.load_state_dict(original.embed_tokens.state_dict())
    save_whole(folder, twin, AutoTokenizer.from_pretrained(location))
    print(f"wrote {folder}: {config.num_hidden_layers} random layers of the shape of {base_model}")
    return {"base": base.contents(str(folder))}


if __name__ == "__main__":
    cli.run(main)
