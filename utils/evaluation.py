"""From user vectors to ranks and metrics: all protocols in one pass over the users.

Legend: B users of a batch, U all users, N items, D item width, S items met, K candidates.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import checkpoint, processes
from engine.errors import RunError
from engine.files import read_json
from engine.run import Run, run_names
from utils.flags import Runtime
from utils.metrics import TOP, beyond_accuracy, summarise

Encode = Callable[[Tensor], Tensor]  # history [B, L] -> user vectors [B, D]

PROTOCOLS = {"sampled": (5, 10), "full": (5, 10, 20), "full_all": (5, 10, 20)}  # -> cut-offs
NO_SCORE = 0  # in place of a rank
SHOWN = {  # in the table at a run's end: split, protocol and metric
    "valid MRR": ("valid", "sampled", "MRR"),
    "test MRR": ("test", "sampled", "MRR"),
    "test HR@10": ("test", "sampled", "HR@10"),
    "full HR@10": ("test", "full", "HR@10"),
    "full NDCG@10": ("test", "full", "NDCG@10"),
}
CPU_TILE, TILE = 2**23, 2**26  # scores held at once; larger blocks are slow to allocate on CPU
FEWEST_USERS = 8  # per tile, so that a pass over ten million items serves several users


class Batch(NamedTuple):
    """One batch of users: the history on the CPU, the rest on one device.

    history: [B, L], what the model reads; it is packed on the CPU.
    target: [B], catalogue index of the true next item.
    seen: [B, S], everything the user met before the target; filled up with the target itself.
    candidates: [B, K], negatives; filled up with -1.
    """

    history: Tensor
    target: Tensor
    seen: Tensor
    candidates: Tensor


class Popularity:
    """The recommender that gives every user the most popular items.

    Args:
        counts: how often each item occurs, [N]; as a table of width one.
    """

    def __init__(self, counts: Tensor) -> None:
        self.item_table = counts.float()[:, None]

    def user_encoder(self) -> Encode:
        return lambda history: self.item_table.new_ones(len(history), 1)


class Ranks(NamedTuple):
    """Rank of each user's target under each protocol, each int64 [U], >= 1."""

    sampled: np.ndarray
    full: np.ndarray
    full_all: np.ndarray

    def metrics(self, users: np.ndarray | slice = slice(None)) -> dict[str, dict[str, float]]:
        """Of all users, or of some."""
        found = self._asdict()
        return {name: summarise(found[name][users], PROTOCOLS[name]) for name in PROTOCOLS}


def evaluate(
    model: Any, split: Any, runtime: Runtime, limit: int | None = None, shown: Tensor | None = None
) -> Ranks:
    """Rank the targets of a split's users by a model.

    Args:
        model: has `item_table` [N, D], and `user_encoder()`, an Encode in evaluation mode with the
            present weights. A score is the product of a user vector and a row.
        split: datasets.sequences.EvaluationSplit.
        limit: at most so many batches.
        shown: int64 [N] on the model's device; counts in how many lists of TOP items each item is.
    Raises:
        RunError: a score is not finite.
    """
    encode, table = model.user_encoder(), model.item_table.detach()
    batch_size, share = runtime.eval_batch_size, (processes.rank(), processes.world())
    batches = split.batches(batch_size, table.device, limit, share)
    if runtime.shard:
        rounds = -(-split.n_batches(batch_size, limit) // processes.world())
        spare = next(split.batches(1, table.device, 1)).history
        batches = _in_step(batches, rounds, encode, spare)
    ranks = rank_all(encode, table, batches, shown)
    if shown is not None:
        processes.sum_in_place([shown])
    return ranks


def finish(run: Run, model: Any, data: Any, runtime: Runtime, fitted: dict | None = None, **extra):
    """Evaluate best/ on valid and test; write results.json and ranks.npz, print the test metrics.

    Args:
        data: the data of the run (datasets.inputs.RunData).
        fitted: what `fit` returned; None where the run is only evaluated, which keeps the recorded
            training.
        extra: more entries of results.json; of seconds None keeps what is recorded.
    Returns:
        The content of results.json.
    """
    trained = dict(fitted or {})
    valid = trained.pop("valid", None) or evaluate(model, data.splits["valid"], runtime)
    started = time.perf_counter()
    shown = torch.zeros(len(model.item_table), dtype=torch.int64, device=model.item_table.device)
    split = data.splits["test"]
    test = evaluate(model, split, runtime, shown=shown)
    inference = time.perf_counter() - started
    earlier = run.results() if run.eval_only and (run.folder / "results.json").exists() else {}
    if fitted is None:
        trained = {name: earlier.get(name) for name in ("steps", "best_step", "train_seconds")}
        trained |= {"plan": earlier["plan"]} if "plan" in earlier else {}
    results = {
        "step": run.stage,
        "domain": run.config["domain"],
        "seed": run.config["flags"]["seed"],
        "data_sha256": run.config["data_sha256"],
        "random_base": run.config.get("random_base", False),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": checkpoint.weights_sha256(run.folder / "best"),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    results |= trained | {name: earlier.get(name) if v is None else v for name, v in extra.items()}
    results |= {
        "candidates": {"asked": split.n_candidates, "fewest": split.fewest_candidates()},
        "users": len(test.sampled),
        "valid": valid.metrics(),
        "test": test.metrics(),
        "inference_seconds": round(inference, 3),
        "inference_users_per_second": round(len(test.sampled) / inference, 1),
    }
    given = shown.cpu().numpy(), split.popularity(), test.full, split.targets()
    results["lists"] = beyond_accuracy(*given)
    again = split.repeated()
    results["repeated_targets"] = round(float(again.mean()), 6)
    if again.any():
        others = ": metrics of the others are test_first_time" * (not again.all())
        if others:
            results["test_first_time"] = test.metrics(~again)
        print(
            f"{again.mean():.1%} of the test users had met their target before{others}; lists"
            " leave such items out, but for --exclude none"
        )
    arrays = {"reviewerID": np.array(split.data.users)}
    for name, ranks in (("valid", valid), ("test", test)):
        for protocol, values in ranks._asdict().items():
            arrays[f"{name}_{protocol}"] = values.astype(np.int32)
    results = run.complete(results, arrays)
    _print_beside(run, results)
    return results


def beside(run: Run, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of popularity and of SASRec by name, where a finished run of SASRec is named by
    this one's flags, beside it or the domain's, of the same data and with the same candidates.
    """
    flags, known = run.config["flags"], results
    drawn = flags
    if run.stage != "sasrec":
        named = flags.get("sasrec")
        folders = [Path(name) for name in run_names(named, "sasrec")] if named else []
        folders += [run.folder.with_name("sasrec"), Path("output", results["domain"], "sasrec")]
        folder = next((path for path in folders if (path / "results.json").is_file()), None)
        if folder is None:
            return {}
        known = read_json(folder / "results.json", "results")
        drawn = Run("sasrec", folder, read_json(folder / "config.json", "run")).flags
    alike = all(known.get(name) == results.get(name) for name in ("data_sha256", "candidates"))
    alike = alike and drawn.get("candidate_seed") == flags.get("candidate_seed")
    finished = known is results or known.get("steps") is not None
    if not alike or not finished:
        return {}
    rows = {"popularity": known.get("popularity"), "SASRec": None if known is results else known}
    return {name: found for name, found in rows.items() if found}


def _print_beside(run: Run, results: dict[str, Any]) -> None:
    """This run beside popularity and SASRec, as a table, and a line for each that is ahead."""
    rows = beside(run, results)
    own = results["valid"]["sampled"]["MRR"]
    print("\n" + " " * 14 + "".join(f"{name:>13s}" for name in SHOWN))
    for name, found in (rows | {f"this {run.stage}": results}).items():
        values = [found[split][protocol][metric] for split, protocol, metric in SHOWN.values()]
        print(f"{name:14s}" + "".join(f"{value:13.4f}" for value in values))
    for name, found in rows.items():
        other = found["valid"]["sampled"]["MRR"]
        if round(other, 4) > round(own, 4):
            print(f"behind {name} on validation: MRR {own:.4f}, {name} has {other:.4f}")
    if results["test"]["sampled"]["HR@1"] == 1.0:
        alone = results["candidates"]["fewest"] == 0
        why = "there is no other item" if alone else "does the history give the target away?"
        print(f"every target ranks first: {why}")


@torch.no_grad()
def rank_all(
    encode: Encode, item_table: Tensor, batches: Iterable[Batch], shown: Tensor | None = None
) -> Ranks:
    """Rank every target: sampled (its candidates), full (history excluded), full_all (nothing).

    rank = 1 + number of other ranked items whose score is >= the target's. The target's score is
    read from the same product, so ties count against the model and a constant model scores zero.
    The target is never excluded.

    Args:
        item_table: [N, D], row = catalogue index.
        batches: user batches, in user order.
        shown: see `evaluate`.
    Raises:
        RunError: a score is not finite.
    """
    columns = item_table.float().T
    found = [rank_users(encode(batch.history), columns, batch, shown) for batch in batches]
    shares = processes.gather([part.cpu() for part in found])  # every world-th batch each
    turns = itertools.zip_longest(*shares)
    ranks = torch.cat([part for turn in turns for part in turn if part is not None], dim=1).numpy()
    if (ranks == NO_SCORE).any():
        user = int((ranks == NO_SCORE).any(0).argmax())
        raise RunError(
            f"a score of user {user} is NaN or infinite: the model or the item table holds"
            " non-finite values"
        )
    return Ranks(*ranks)


@torch.no_grad()
def score_spreads(models: list[Any], histories: Tensor) -> list[float]:
    """How loud models are: the standard deviation of a user's scores over the catalogue, mean over
    users. A sum of raw scores would follow the louder model.

    Args:
        models: each with a `max_seq_length`, the part of a history that it reads.
        histories: left-padded catalogue indices, as long as the longest that a model reads.
    """
    spreads = []
    for model in models:
        users = model.user_encoder()(histories[:, -model.max_seq_length :]).float()
        spreads.append(float((users @ model.item_table.detach().float().T).std(dim=1).mean()))
    return spreads


def rank_users(users: Tensor, columns: Tensor, batch: Batch, shown: Tensor | None = None) -> Tensor:
    """Ranks [3, B] (sampled, full, full_all) of one batch; `rank_all` checks them.

    Nothing here waits for the device: where a score is not finite the ranks are NO_SCORE.

    Args:
        users: user vectors [B, D].
        columns: the item table's transpose, float32 [D, N].
        shown: see `evaluate`.
    """
    rows = users_per_tile(columns)
    tiles = []
    for i in range(0, len(users), rows):
        part = slice(i, i + rows)
        scores = users[part].float() @ columns  # [b, N]
        tiles.append(
            rank_tile(scores, batch.target[part], batch.seen[part], batch.candidates[part])
        )
        if shown is not None:  # `scores` are those of the full protocol now
            best, items = scores.topk(min(TOP, scores.shape[1]))
            listed = torch.isfinite(best).long().flatten()  # fewer where the history has the rest
            shown.scatter_add_(0, items.flatten(), listed)
    return torch.cat(tiles, dim=1)


def users_per_tile(columns: Tensor) -> int:
    """How many users' scores against an item table's transpose [D, N] are held at once."""
    tile = CPU_TILE if columns.device.type == "cpu" else TILE
    return max(FEWEST_USERS, tile // columns.shape[1])


def _in_step(
    batches: Iterable[Batch], rounds: int, encode: Encode, spare: Tensor
) -> Iterator[Batch]:
    """Yield the batches of this process, then encode `spare` until `rounds` forwards are done: a
    sharded model needs every process in every forward.
    """
    done = 0
    for batch in batches:
        yield batch
        done += 1
    for _ in range(done, rounds):
        encode(spare)


def rank_tile(scores: Tensor, target: Tensor, seen: Tensor, candidates: Tensor) -> Tensor:
    """Ranks [3, b] from scores [b, N], which lose the history's: as `full` ranks them."""
    own = scores.gather(1, target[:, None])  # [b, 1]
    finite = torch.isfinite(scores.sum(1))  # a sum shows it 20 times sooner than all terms
    drawn = scores.gather(1, candidates.clamp(min=0))
    sampled = 1 + ((drawn >= own) & (candidates >= 0)).sum(1)
    # Ones and zeros as floats: their sum is many times faster than that of booleans, and exact
    # below 2^24 items. It counts the target itself once.
    ahead = torch.empty_like(scores)
    full_all = torch.ge(scores, own, out=ahead).sum(1)
    scores.scatter_(1, seen, -torch.inf).scatter_(1, target[:, None], own)
    full = torch.ge(scores, own, out=ahead).sum(1)
    ranks = torch.stack([sampled, full.long(), full_all.long()])
    return ranks.masked_fill(~finite, NO_SCORE)
