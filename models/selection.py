"""Which decoder layers of a base are kept: the first, some at an interval, the last, the most influential, or a list.

Legend: B batch, L item slots, P prompt tokens, R response tokens, T = P + L + R, N items (also the padding index), H LLM width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import load_llama, read_config
from utils.cli import LAYER_WORDS, UsageError

CALIBRATION = 64  # samples that the block influence is measured on


def select_layers(
    pool: list[int], kept: int, selection: str, interval_nums: int = 1, influence: Callable[[], list[float]] | None = None,
    owner: str = "the base checkpoint",
) -> list[int]:  # fmt: skip
    """Numbers of the kept layers, ascending.

    `first` and `last` keep that end; `interval` leaves out every (interval_nums + 1)-th and keeps the first `kept` of the
    rest; `influence` keeps the `kept` with the largest block influence (of equal ones the earlier); a list such as
    `0,2,4,6` is taken as it is.

    Args:
        pool: ascending numbers of the layers there are to choose from; owner: whose they are, for messages.
        influence: gives the influence of every layer of the base, by number; called for `influence` alone.
    Raises:
        UsageError: more layers are asked for than there are to choose from, or a list that does not fit.
    """
    rest = [layer for i, layer in enumerate(pool) if (i + 1) % (interval_nums + 1) != 0] if selection == "interval" else pool
    if selection not in LAYER_WORDS:
        return _listed(pool, kept, selection, owner)
    if not 1 <= kept <= len(rest):
        rule = f" and --layer_selection=interval --interval_nums={interval_nums} leaves {len(rest)}" if selection == "interval" else ""
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
        raise UsageError(f"{flag} names {len(layers)} layers, {kept} decoder layers are asked for; make the two agree")
    if layers != sorted(set(layers)):
        raise UsageError(f"{flag}: expected ascending numbers, each once")
    foreign = [layer for layer in layers if layer not in pool]
    if foreign:
        raise UsageError(f"{flag}: {owner} has no layer {foreign[0]}; it has {pool[0]} to {pool[-1]}, {len(pool)} layers counted from 0")
    return layers


@torch.no_grad()
def block_influence(
    base: str, prompt_ids: list[int], response_ids: list[int], history: Tensor, item_table: Tensor, bf16: bool, seed: int
) -> list[float]:
    """1 - mean cosine between the states that enter and leave each layer of the whole base (Men et al., 2024, ShortGPT, eq. 1).

    The calibration tokens are what a recommender reads before it has learnt anything: prompt, items through a fresh
    adapter, response; padding does not count. One layer is in memory at a time.

    Args:
        history: left-padded catalogue indices [B, L], on the device to compute on; item_table: [N, D].
        bf16: hold and run the layers in bfloat16; seed: of the adapter.
    """
    config, dtype = read_config(base), torch.bfloat16 if bf16 else torch.float32
    device, real = history.device, history != len(item_table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = nn.Linear(item_table.shape[1], config.hidden_size)
    items = adapter(item_table.cpu()[history.cpu().clamp(max=len(item_table) - 1)])  # [B, L, H]
    ends = [real.new_ones(len(history), len(ids)) for ids in (prompt_ids, response_ids)]
    mask = torch.cat([ends[0], real, ends[1]], dim=1)  # [B, T]
    position = torch.arange(mask.shape[1], device=device).expand(len(history), -1)
    states, values = None, []
    for number in range(config.num_hidden_layers):
        llama = load_llama(base, config, [number], dtype)
        llama.norm = nn.Identity()
        if states is None:
            texts = [llama.embed_tokens(torch.tensor(ids)).expand(len(history), -1, -1) for ids in (prompt_ids, response_ids)]
            states = torch.cat([texts[0], items.to(dtype), texts[1]], dim=1).to(device)
        llama.to(device)
        after = llama(inputs_embeds=states, attention_mask=mask.long(), position_ids=position, use_cache=False).last_hidden_state
        values.append(1 - float(F.cosine_similarity(states[mask].float(), after[mask].float(), dim=-1).mean()))
        states = after
    return values
