"""Which decoder layers of a base are kept, and at the end of which layers blocks are compared.

EDIT `block_ends` for another block map.

Legend: B batch, L item slots, P prompt tokens, R response tokens, T = P + L + R (padded), N items
(also the padding index).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import load_llama, read_config
from utils.errors import UsageError
from utils.flags import LAYER_WORDS, LLM


def block_ends(n_layers: int, n_blocks: int) -> list[int]:
    """The number of layers after which each block ends: k * n_layers / n_blocks for k = 1 ..
    n_blocks.

    Teacher and student are compared at the ends of equal k.
    """
    if n_layers % n_blocks:
        raise ValueError(f"{n_blocks} blocks do not divide {n_layers} layers")
    size = n_layers // n_blocks
    return [size * k for k in range(1, n_blocks + 1)]


def select_layers(
    pool: list[int],
    kept: int,
    llm: LLM,
    influence: Callable[[], list[float]] | None = None,
    owner: str = "the base checkpoint",
) -> list[int]:
    """Numbers of the kept layers, ascending, by the rule of `--layer_selection`.

    `first` and `last` keep that end. `interval` leaves out every (interval_nums + 1)-th and keeps
    the first `kept` of the rest. `influence` keeps the `kept` with the largest block influence (of
    equal ones the earlier). A list such as `0,2,4,6` is taken as it is.

    Args:
        pool: ascending numbers of the layers to choose from.
        influence: gives the influence of every layer of the base, by number; called for `influence`
            alone.
        owner: whose layers they are, for messages.
    Raises:
        UsageError: more layers are asked for than there are to choose from, or a list does not fit.
    """
    selection, every = llm.layer_selection, llm.interval_nums + 1
    if selection not in LAYER_WORDS:
        return _listed(pool, kept, selection, owner)
    rest = pool
    rule = ""
    if selection == "interval":
        rest = [layer for i, layer in enumerate(pool) if (i + 1) % every != 0]
        flags = f"--layer_selection=interval --interval_nums={llm.interval_nums}"
        rule = f" and {flags} leaves {len(rest)}"
    if not 1 <= kept <= len(rest):
        raise UsageError(f"{kept} decoder layers asked for, {owner} has {len(pool)} layers{rule}")
    if selection == "last":
        return rest[-kept:]
    if selection == "influence":
        values = influence()
        return sorted(sorted(rest, key=lambda layer: -values[layer])[:kept])
    return rest[:kept]


def _listed(pool: list[int], kept: int, selection: str, owner: str) -> list[int]:
    layers = [int(number) for number in selection.strip("[]").split(",")]
    flag = f"--layer_selection={selection}"
    if len(layers) != kept:
        raise UsageError(
            f"{flag} names {len(layers)} layers, {kept} decoder layers are asked for;"
            " make the two agree"
        )
    if layers != sorted(set(layers)):
        raise UsageError(f"{flag}: expected ascending numbers, each once")
    foreign = [layer for layer in layers if layer not in pool]
    if foreign:
        raise UsageError(
            f"{flag}: {owner} has no layer {foreign[0]}; it has {pool[0]} to {pool[-1]},"
            f" {len(pool)} layers counted from 0"
        )
    return layers


@torch.no_grad()
def block_influence(
    base: str,
    prompt_ids: list[int],
    response_ids: list[int],
    history: Tensor,
    item_table: Tensor,
    bf16: bool,
    seed: int,
) -> list[float]:
    """1 - mean cosine between the states that enter and leave each layer of the whole base.

    Men et al. (2024), ShortGPT, eq. 1. The calibration tokens are what a recommender reads before
    it has learnt anything:
    prompt, items through a fresh adapter, response; padding does not count. One layer is in memory
    at a time.

    Args:
        history: left-padded catalogue indices [B, L], on the device to compute on.
        item_table: [N, D].
        bf16: hold and run the layers in bfloat16.
        seed: of the adapter.
    """
    config, dtype = read_config(base), torch.bfloat16 if bf16 else torch.float32
    device, n_items = history.device, len(item_table)
    real = history != n_items
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = nn.Linear(item_table.shape[1], config.hidden_size)
    items = adapter(item_table.cpu()[history.cpu().clamp(max=n_items - 1)])  # [B, L, H]
    before, after = (real.new_ones(len(history), len(ids)) for ids in (prompt_ids, response_ids))
    mask = torch.cat([before, real, after], dim=1)  # [B, T]
    position = torch.arange(mask.shape[1], device=device).expand(len(history), -1)
    inputs = {"attention_mask": mask.long(), "position_ids": position, "use_cache": False}
    states, values = None, []
    for number in range(config.num_hidden_layers):
        llama = load_llama(base, config, [number], dtype)
        llama.norm = nn.Identity()
        if states is None:
            prompt, response = (
                llama.embed_tokens(torch.tensor(ids)).expand(len(history), -1, -1)
                for ids in (prompt_ids, response_ids)
            )
            states = torch.cat([prompt, items.to(dtype), response], dim=1).to(device)
        llama.to(device)
        left = llama(inputs_embeds=states, **inputs).last_hidden_state
        cosine = F.cosine_similarity(states[mask].float(), left[mask].float(), dim=-1)
        values.append(1 - float(cosine.mean()))
        states = left
    return values
