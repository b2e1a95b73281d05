"""A base that computes the same, with weights and states of a fresh model's size.

The gains of each layer's norms are multiplied into the projections that read them. The states that
layers add to are scaled by one factor, which gives the projections that write to them the spread of
fresh weights. A norm divides by its input's length, so the last state stays the same. Training does
not: Adam moves every weight by about the learning rate, whatever the weight's size, and beside long
states the item adapter's output is short.

    python -m experiments.folded_base --base_model smollm2 --output_dir output/base/smollm2_folded
    python finetune.py --base_model output/base/smollm2_folded --train_strategy full
"""

from utils import cli
from utils.files import new_folder, save_whole
from utils.flags import flag

READERS = {  # of each norm's output
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # add to the states


def fold(decoder) -> float:
    """Fold a LlamaModel's gains and scale its states; the last norm's gain stays.

    Its config then has the epsilon that belongs to such states: save it, and read it again.

    Returns:
        The factor on the states' length.
    """
    import torch

    writers = [layer.get_submodule(name) for layer in decoder.layers for name in WRITERS]
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


@cli.command
def main(
    *,
    base_model: str = flag(help="as finetune.py reads it"),
    output_dir: str = flag(help="the folder of the folded base; it must not exist"),
) -> dict:
    """Write a base that computes the same, with weights and states of a fresh model's size."""
    folder = new_folder(output_dir, "--output_dir")

    import torch
    from transformers import AutoTokenizer

    from models import base

    location = base.locate(base_model)
    config = base.read_config(location)
    layers = [*range(config.num_hidden_layers)]
    decoder = base.load_llama(location, config, layers, torch.float32)
    if base.is_random(base_model, location):
        decoder.config.random_layers = True  # for tables: see models.base.is_random
    factor = fold(decoder)
    save_whole(folder, decoder, AutoTokenizer.from_pretrained(location))
    print(f"wrote {folder}: states are {factor:.3g} times as long as in {base_model}")
    return {"base": base.contents(str(folder)), "factor": factor}


if __name__ == "__main__":
    cli.run(main)
