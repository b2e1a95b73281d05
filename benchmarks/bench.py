"""What the rows of benchmarks/throughput.py share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Race, race, training_step
from datasets import sequences
from datasets.interactions import Interactions
from models.catalogue import catalogue_cross_entropy
from models.llm4rec import LLM4Rec

DIM = 128  # width of the item table


class Bench:
    """What the rows share: the domain, the models' shape, batches of real lengths, and the table
    that fills up.

    Args:
        batches: sample indices of every timed batch, int64 [repeats + 1, B]; the first warms up.
    """

    def __init__(
        self, data: Interactions, shape: measure.Shape, batch_size: int, repeats: int, rest: float
    ) -> None:
        self.data, self.shape, self.device, self.rest = data, shape, shape.item_table.device, rest
        self.samples = sequences.training_samples(data, "last", shape.slots)
        rng = np.random.default_rng(0)
        self.batches = [
            rng.choice(len(self.samples), batch_size, replace=False) for _ in range(repeats + 1)
        ]
        self.rate = measure.matrix_rate(self.device, torch.float32)
        self.rows: list[dict[str, Any]] = []

    def race(self, ours, theirs, inputs: list | None = None) -> Race:
        return race(
            ours, theirs, self.batches if inputs is None else inputs, self.device, self.rest
        )

    def add(
        self,
        name: str,
        unit: str,
        timed: Race,
        per: float = 1.0,
        operations: float | None = None,
        llm: bool = False,
        **more: Any,
    ) -> None:
        """A row; `per` turns seconds into the unit: units a call for a rate, 1 for seconds, 1000
        for milliseconds.

        Args:
            operations: that must be done, for the floor. llm: also tell prompt, response, lengths
                and tokens.
        """
        rate = unit.endswith("/s")
        ours, theirs = ((per / t if rate else per * t) for t in (timed.ours, timed.plain))
        row = {"row": name, "unit": unit, "ours": ours, "plain": theirs, "ratio": timed.ratio}
        if llm:
            lengths = [self.samples.lengths()[rows] for rows in self.batches[1:]]
            tokens = np.array([self.shape.tokens(n) for n in lengths])
            row |= {
                "prompt": len(self.shape.prompt_ids),
                "response": len(self.shape.response_ids),
                "tokens": float(tokens[:, 0].mean()),
                "mean_history": float(np.mean(np.concatenate(lengths))),
                "token_ratio": float((tokens[:, 1] / tokens[:, 0]).mean()),
            }
        if operations is not None:
            floor = operations / self.rate
            row |= {
                "gflop": operations / 1e9,
                "floor_ms": floor * 1e3,
                "of_matrix_rate": floor / timed.ours,
            }
        self.rows.append(row | more)
        print(f"{name:58s} {ours:12.2f} {theirs:12.2f} {unit:8s} {timed.ratio:7.2f} x", flush=True)

    def operations(self, n_layers: int, strategy: str, training: bool = True) -> float:
        """The mean of the timed batches."""
        each = [
            self.shape.operations(self.samples.lengths()[rows], n_layers, strategy, training)
            for rows in self.batches[1:]
        ]
        return float(np.mean(each))

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Histories on the CPU, where ours packs them, and targets on the device."""
        return self.samples.histories(rows), self.samples.targets(rows).to(self.device)

    def step(self, model: LLM4Rec, bf16: bool = False) -> Callable[..., None]:
        """Ours with cross-entropy alone."""

        def loss(rows):
            history, target = self.batch(rows)
            return catalogue_cross_entropy(model(history).user, model.item_table, target)

        return training_step(model, loss, bf16)
