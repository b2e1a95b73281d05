"""Evaluation negatives: distinct, uniform, never seen, and a pure function of (key, row).

Each row gets its own bijection of 0 .. 2^k - 1 (2^k >= N): rounds of multiply by a keyed odd
number, add a key, and xor-shift, all modulo 2^k. Reading it at 0, 1, 2, ... yields every index
exactly once in a pseudo-random order. Values beyond the catalogue and items that the user has seen
are skipped; the first K others are the candidates. The inverse bijection gives the place of a seen
item in that order, so a row costs its K candidates, whatever N. There is no state, no rejection of
duplicates and no Python per user, and the batch does not change the answer. LEAVE ALONE: published
numbers depend on it.
"""

import numpy as np

ROUNDS = 4
BLOCK = 2**18  # values worked on at once: they stay in the processor's cache


def draw(
    key: tuple[int, ...],
    rows: np.ndarray,
    owner: np.ndarray,
    seen: np.ndarray,
    n_items: int,
    n_candidates: int,
) -> np.ndarray:
    """Draw `n_candidates` distinct items for each row.

    Args:
        key: what all rows share, such as (seed, split).
        rows: int64 [B], each row's own key (its place in the file).
        owner, seen: pairs (index into rows, item that this row must not get), `owner` ascending.
        n_items: N, items are 0 .. N - 1.
        n_candidates: K.
    Returns:
        int64 [B, K]; where fewer than K items are left, all of them, filled up with -1.
    """
    bits = max(1, int(n_items - 1).bit_length())
    size, counts = 1 << bits, np.bincount(owner, minlength=len(rows))
    longest = int(counts.max(initial=0))
    # always enough; the smaller `width` below nearly always is
    enough = min(size, n_candidates + size - n_items + longest)
    width = min(enough, int(1.15 * n_candidates * size / max(1, n_items - longest)) + 64)
    keys, first = _keys(key, rows), np.cumsum(counts) - counts
    chosen = np.full((len(rows), n_candidates), -1, dtype=np.int64)
    step = max(1, BLOCK // width)
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        pairs = slice(first[i], first[i] + counts[part].sum())
        barred = owner[pairs] - i, seen[pairs]
        if not _fill(chosen[part], keys[part], barred, n_items, bits, width):
            _fill(chosen[part], keys[part], barred, n_items, bits, enough)
    return chosen


def uniform(key: tuple[int, ...], rows: np.ndarray, n_items: int, n: int) -> np.ndarray:
    """Independent uniform items, a function of (key, row) alone: the same in any batch and on any
    process.

    Returns:
        int64 [len(rows), n].
    """
    return (_draws(key, rows, n) % np.uint64(n_items)).astype(np.int64)


def _fill(
    chosen: np.ndarray,
    keys: np.ndarray,
    barred: tuple[np.ndarray, np.ndarray],
    n_items: int,
    bits: int,
    width: int,
) -> bool:
    """Write the first K free values among `width` of each row's bijection into `chosen` [b, K];
    False if a row has fewer.

    Args:
        keys: uint32 [b, 2 * ROUNDS]; barred: pairs (row, item).
    """
    values = _permuted(keys, np.arange(width, dtype=np.uint32), bits)  # [b, width]
    free = values < n_items
    row, item = barred
    position = _positions(keys[row], item.astype(np.uint32), bits)
    near = position < width
    free[row[near], position[near]] = False
    nth = np.cumsum(free, axis=1, dtype=np.int32)
    row, column = np.nonzero(free & (nth <= chosen.shape[1]))
    chosen[row, nth[row, column] - 1] = values[row, column]
    return nth[:, -1].min() >= chosen.shape[1]


def _permuted(keys: np.ndarray, positions: np.ndarray, bits: int) -> np.ndarray:
    """Each row's bijection of 0 .. 2^bits - 1 at `positions`; uint32 [b, len(positions)]."""
    mask, shift = np.uint32((1 << bits) - 1), np.uint32((bits + 1) // 2)
    values = np.broadcast_to(positions, (len(keys), len(positions))).copy()
    for r in range(ROUNDS):
        values *= keys[:, 2 * r, None] | np.uint32(1)  # odd: invertible modulo 2^bits
        values += keys[:, 2 * r + 1, None]
        values &= mask
        values ^= values >> shift  # shift >= 1: invertible
    return values


def _positions(keys: np.ndarray, values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_permuted`: the place of each value in its bijection.

    Args:
        keys: [n, 2 * ROUNDS]. values: uint32 [n], as the result.
    """
    mask, shift = np.uint32((1 << bits) - 1), np.uint32((bits + 1) // 2)
    odd = keys[:, ::2] | np.uint32(1)
    inverse = odd.copy()  # right modulo 2^3; Newton's step doubles the bits
    for _ in range(4):
        inverse *= np.uint32(2) - odd * inverse
    for r in reversed(range(ROUNDS)):
        values = values ^ (values >> shift)  # its own inverse, since 2 * shift >= bits
        values = (values - keys[:, 2 * r + 1]) * inverse[:, r] & mask
    return values


def _keys(key: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    """uint32 [b, 2 * ROUNDS], each row's own."""
    return (_draws(key, rows, 2 * ROUNDS) >> np.uint64(32)).astype(np.uint32)


def _draws(key: tuple[int, ...], rows: np.ndarray, n: int) -> np.ndarray:
    """uint64 [b, n] from SplitMix64 (Steele et al., 2014) over key, row and counter."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state + np.uint64(part % 2**64))
        state = _mix(state + rows.astype(np.uint64))  # [b]
        counter = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(state[:, None] + counter)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
