"""The demo domain: 3,000 users, 2,000 items, sequential structure; always the same."""

from pathlib import Path

import numpy as np

from datasets.interactions import write_csv

N_USERS, N_ITEMS, N_THEMES = 3000, 2000, 40
ADJECTIVES = ["Plain", "Soft", "Bright", "Quiet", "Heavy", "Green", "Old", "Tiny", "Warm", "Swift"]
NOUNS = ["lamp", "kettle", "scarf", "notebook", "brush", "drum", "puzzle", "racket", "mug", "cable"]


def write_demo(
    path: str | Path, n_users: int = N_USERS, n_items: int = N_ITEMS, seed: int = 2024
) -> None:
    """Write a demo CSV with ids from 1.

    Items belong to themes and have an order within them. A user mostly moves a few places on in the
    same theme, sometimes jumps to the theme that follows the present one, rarely to a popular item
    anywhere. So the next item depends on the last ones, and popularity alone explains little.
    """
    rng = np.random.default_rng(seed)
    theme_of = np.arange(n_items) * N_THEMES // n_items
    weight = rng.permutation(1.0 / (10.0 + np.arange(n_items)))  # a mild popularity curve
    weight /= weight.sum()
    names = [
        f"{ADJECTIVES[theme % 10]} {NOUNS[(theme // 10 + i) % 10]} no. {i}"
        for i, theme in enumerate(theme_of)
    ]
    sequences = []
    for _ in range(n_users):
        length = 5 + min(int(rng.geometric(0.18)), 35)
        sequences.append(_walk(rng, length, n_items, theme_of, weight))
    order = rng.permutation(n_items) + 1  # ids say nothing about themes
    titles = [[names[item] for item in items] for items in sequences]
    numbered = [[int(order[item]) for item in items] for items in sequences]
    users = [f"U{user:05d}" for user in range(n_users)]
    write_csv(path, zip(users, numbered, titles, strict=True))


def _walk(
    rng: np.random.Generator, length: int, n_items: int, theme_of: np.ndarray, weight: np.ndarray
) -> list[int]:
    """One user's distinct items."""
    per_theme = n_items // N_THEMES
    items = [int(rng.choice(n_items, p=weight))]
    while len(items) < length:
        move, last = rng.random(), items[-1]
        theme = int(theme_of[last])
        if move < 0.75:  # a few places on in the same theme
            place = (last - theme * per_theme + int(rng.integers(1, 6))) % per_theme
        elif move < 0.90:  # the theme that follows this one
            theme, place = (theme * 7 + 3) % N_THEMES, int(rng.integers(per_theme))
        else:
            theme, place = divmod(int(rng.choice(n_items, p=weight)), per_theme)
        item = min(theme * per_theme + place, n_items - 1)
        if item not in items:
            items.append(item)
    return items
