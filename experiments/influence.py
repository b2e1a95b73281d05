"""Which layers of a base change their input most: a list for `--layer_selection`.

    python -m experiments.influence --base_model smollm2 --n_layers 4
    python distill.py --base_model smollm2 --layer_selection 0,1,2,29

Influence of a layer = 1 - mean cosine between the states that enter and leave it (Men et al., 2024,
ShortGPT, eq. 1). The tokens are what a recommender reads before it has learnt anything: prompt,
items through a fresh adapter, response; padding does not count. One layer is in memory at a time.

Legend: B users, L item slots, N items, D item width, H LLM width, T tokens of the padded layout.
"""

from typing import TYPE_CHECKING, Literal

from engine import cli
from engine.cli import PositiveInt, Seed, flag
from utils.flags import Prompt, TeacherFiles

if TYPE_CHECKING:
    from torch import Tensor

    from models.base import Base


@cli.command
def main(
    *,
    files: TeacherFiles,
    prompt: Prompt,
    n_layers: PositiveInt = flag(4, "how many layers are listed"),
    users: PositiveInt = flag(64, "whose histories are read"),
    seed: Seed = flag(42, "of the adapter"),
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto uses cuda if available"),
) -> list[int]:
    """Print every layer's influence, and the list of those with the largest."""
    from datasets.domain import read_inputs
    from datasets.prompts import read_template, tokenise

    inputs = read_inputs(files)
    template = read_template(prompt.prompt_template_name)

    from datasets.item_table import read_table
    from datasets.sequences import training_samples
    from engine import processes
    from models.base import open_base

    chosen = processes.choose_device(device)
    base = open_base(prompt.base_model)
    samples = training_samples(inputs.data, "last", prompt.max_seq_length)
    history = samples.histories(samples.evenly(users)).to(chosen)
    table = read_table(inputs.table_path, inputs.data.item_ids)
    values = block_influence(base, *tokenise(template, base.location), history, table, seed)
    for layer, value in enumerate(values):
        print(f"layer {layer:3d}  {value:.4f}")
    cli.check((n_layers <= len(values), f"--n_layers={n_layers}: the base has {len(values)}"))
    kept = sorted(sorted(range(len(values)), key=lambda layer: -values[layer])[:n_layers])
    print(f"--layer_selection {','.join(map(str, kept))}")
    return kept


def block_influence(
    base: "Base",
    prompt_ids: list[int],
    response_ids: list[int],
    history: "Tensor",
    item_table: "Tensor",
    seed: int,
) -> list[float]:
    """The influence of every layer of the whole base.

    Args:
        history: left-padded catalogue indices [B, L], on the device to compute on.
        item_table: [N, D].
        seed: of the adapter.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from models.base import load_llama

    device, n_items = history.device, len(item_table)
    real = history != n_items
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = nn.Linear(item_table.shape[1], base.config.hidden_size)
    before, after = (real.new_ones(len(history), len(ids)) for ids in (prompt_ids, response_ids))
    mask = torch.cat([before, real, after], dim=1)  # [B, T]
    position = torch.arange(mask.shape[1], device=device).expand(len(history), -1)
    inputs = {"attention_mask": mask.long(), "position_ids": position, "use_cache": False}
    states, values = None, []
    with torch.no_grad():
        items = adapter(item_table[history.cpu().clamp(max=n_items - 1)])  # [B, L, H]
        for number in range(base.config.num_hidden_layers):
            llama = load_llama(base.location, base.config, [number], torch.float32)
            llama.norm = nn.Identity()
            if states is None:
                prompt, response = (
                    llama.embed_tokens(torch.tensor(ids)).expand(len(history), -1, -1)
                    for ids in (prompt_ids, response_ids)
                )
                states = torch.cat([prompt, items, response], dim=1).to(device)
            left = llama.to(device)(inputs_embeds=states, **inputs).last_hidden_state
            cosine = F.cosine_similarity(states[mask], left[mask], dim=-1)
            values.append(1 - float(cosine.mean()))
            states = left
    return values


if __name__ == "__main__":
    cli.run(main)
