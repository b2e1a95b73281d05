"""Which decoder layers of a base are kept, and at the end of which layers blocks are compared.

EDIT `block_map` for another block map.
"""

from engine.errors import UsageError
from utils.flags import LAYER_RULES, LLM


def block_map(
    n_student: int, n_teacher: int | None, n_blocks: int, pairs: str | None = None
) -> tuple[list[int], list[int]]:
    """After how many layers each block ends, of the student and of the teacher.

    Block k of B ends after k * N / B layers of the student and k * M / B of the teacher. The two
    are compared there.

    Args:
        n_student, n_teacher: N and M; None without a teacher, whose ends mean nothing then.
        n_blocks: B.
        pairs: the ends themselves, student:teacher, such as 2:4,4:8; instead of B equal blocks.
    Raises:
        UsageError: B does not divide N or M; pairs do not ascend, or do not end at N:M.
    """
    if pairs is None or n_blocks == 1:
        student = equal_blocks(n_student, n_blocks, "llama_decoder_nums_student", n_teacher or 0)
        if n_teacher is None:
            return student, student
        return student, equal_blocks(n_teacher, n_blocks, "llama_decoder_nums_teacher", n_student)
    ends = [[int(number) for number in pair.split(":")] for pair in pairs.split(",")]
    student, teacher = (list(side) for side in zip(*ends))
    ascending = all(side == sorted(set(side)) and side[0] > 0 for side in (student, teacher))
    last = [n_student, n_teacher or teacher[-1]]
    if not ascending or ends[-1] != last:
        raise UsageError(
            f"--block_map={pairs}: expected ascending pairs student:teacher that end with"
            f" {last[0]}:{last[1]}, the numbers of layers"
        )
    return student, teacher


def equal_blocks(
    n_layers: int, n_blocks: int, flag: str = "llama_decoder_nums", other: int = 0
) -> list[int]:
    """The ends of B equal blocks of one model.

    Args:
        flag: what says the number of layers, for messages.
        other: the number of layers of the other model, which B must divide too; 0 where blocks are
            there for exits alone, which one block has not.
    Raises:
        UsageError: B does not divide the number of layers.
    """
    rest = n_layers % n_blocks
    if rest:
        least = 1 if other else 2
        fits = [d for d in range(least, n_layers + 1) if n_layers % d == 0 and other % d == 0]
        divisors = f"one of {', '.join(map(str, fits))}" if fits else "--cls_multiple_lambda 0"
        a, b = (other, n_layers) if flag.endswith("teacher") else (n_layers, other)
        ends = f", or name their ends, as --block_map {a // 2}:{b // 2},{a}:{b}"
        ends = ends if min(a, b) > 1 else ""
        raise UsageError(
            f"--distill_block={n_blocks} does not divide {flag} {n_layers}"
            f" ({n_layers} % {n_blocks} = {rest}); use {divisors}{ends}"
        )
    size = n_layers // n_blocks
    return [size * k for k in range(1, n_blocks + 1)]


def select_layers(
    pool: list[int], n_layers: int, llm: LLM, owner: str = "the base checkpoint"
) -> list[int]:
    """Numbers of the kept layers, ascending, by the rule of `--layer_selection`.

    `first` and `last` keep that end. `interval` leaves out every (interval_nums + 1)-th and keeps
    the first `n_layers` of the rest. A list such as `0,2,4,6` is taken as it is.

    Args:
        pool: ascending numbers of the layers to choose from.
        owner: whose layers they are, for messages.
    Raises:
        UsageError: more layers are asked for than there are to choose from, or a list does not fit.
    """
    selection, every = llm.layer_selection, llm.interval_nums + 1
    if selection not in LAYER_RULES:
        return _listed(pool, n_layers, selection, owner)
    rest = pool
    rule = ""
    if selection == "interval":
        rest = [layer for i, layer in enumerate(pool) if (i + 1) % every != 0]
        flags = f"--layer_selection=interval --interval_nums={llm.interval_nums}"
        rule = f" and {flags} leaves {len(rest)}"
    if not 1 <= n_layers <= len(rest):
        raise UsageError(
            f"{n_layers} decoder layers asked for, {owner} has {len(pool)} layers{rule}"
        )
    return rest[-n_layers:] if selection == "last" else rest[:n_layers]


def _listed(pool: list[int], n_layers: int, selection: str, owner: str) -> list[int]:
    layers = [int(number) for number in selection.strip("[]").split(",")]
    if len(layers) != n_layers or layers != sorted(set(layers)) or not {*layers} <= {*pool}:
        whole = pool == [*range(pool[0], pool[-1] + 1)]
        there = f"{pool[0]} to {pool[-1]}" if whole else ", ".join(map(str, pool))
        raise UsageError(
            f"--layer_selection={selection}: expected {n_layers} ascending numbers of"
            f" decoder layers, each once; {owner} has {there}, {len(pool)} layers counted from 0"
        )
    return layers
