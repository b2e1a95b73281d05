"""Evaluation negatives: distinct, uniform, never met by the user, and a pure function of (key, row).

Each row gets its own bijection of 0 .. 2^k - 1 (2^k >= N): rounds of multiply by a keyed odd number, add a key, and
xor-shift, all modulo 2^k. Reading it at 0, 1, 2, ... yields every index exactly once in a pseudo-random order; values
beyond the catalogue and items that the user met are skipped and the first K others are the candidates. No state, no
rejection of duplicates, no Python per user, and the same answer whatever the batch.
"""

import numpy as np

ROUNDS = 4
BLOCK = 2**24  # cells of working memory (rows x 2^k marks, one byte each)


def draw(key: tuple[int, ...], rows: np.ndarray, owner: np.ndarray, met: np.ndarray, n_items: int, n_candidates: int) -> np.ndarray:
    """Draw `n_candidates` distinct items for each row.

    Args:
        key: what all rows share, such as (seed, split).
        rows: int64 [B], each row's own key (its place in the file).
        owner, met: pairs (index into rows, item that this row must not get), `owner` ascending.
        n_items: N, items are 0 .. N - 1.
        n_candidates: K.
    Returns:
        int64 [B, K]; where fewer than K items are left, all of them, filled up with -1.
    """
    bits = max(1, int(n_items - 1).bit_length())
    step = max(1, BLOCK >> bits)
    parts = []
    for i in range(0, len(rows), step):
        low, high = np.searchsorted(owner, [i, i + step])
        barred = np.zeros((len(rows[i : i + step]), 1 << bits), dtype=bool)
        barred[:, n_items:] = True
        barred[owner[low:high] - i, met[low:high]] = True
        parts.append(_first_free(_keys(key, rows[i : i + step]), barred, bits, n_candidates))
    return np.concatenate(parts) if parts else np.empty((0, n_candidates), dtype=np.int64)


def _first_free(keys: np.ndarray, barred: np.ndarray, bits: int, n_candidates: int) -> np.ndarray:
    """The first K values of each row's bijection that are not barred; keys uint32 [b, 2 * ROUNDS]."""
    size = 1 << bits
    worst = int(barred.sum(1).max())
    take = min(size, n_candidates + worst)  # always enough; usually a small multiple of K suffices
    guess = min(take, int(1.15 * n_candidates * size / max(1, size - worst)) + 64)
    for width in (guess, take):
        values = _permuted(keys, np.arange(width, dtype=np.uint32), bits)  # [b, width]
        free = ~np.take_along_axis(barred, values.astype(np.int64), axis=1)
        order = np.cumsum(free, axis=1, dtype=np.int32)
        if width == take or order[:, -1].min() >= n_candidates:
            break
    chosen = np.full((len(keys), n_candidates), -1, dtype=np.int64)
    row, column = np.nonzero(free & (order <= n_candidates))
    chosen[row, order[row, column] - 1] = values[row, column]
    return chosen


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


def _keys(key: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    """uint32 [b, 2 * ROUNDS] from SplitMix64 (Steele et al., 2014) over the key, the row and a counter."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state + np.uint64(part % 2**64))
        state = _mix(state + rows.astype(np.uint64))  # [b]
        counter = np.arange(1, 2 * ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(state[:, None] + counter) >> np.uint64(32)).astype(np.uint32)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
