"""Fig. 2: how many layers a recommender needs, and whether the final norm explains the jump at the
last one.

    python -m experiments.motivation                     # demo domain, base tiny: 90 s on 2 cores
    python -m experiments.motivation --domain_type cloth --base_model meta-llama/Llama-2-7b-hf \
        --layers 1,2,4,8,16,24,32 --teacher_flags "--num_epochs 3 --warmup_steps 100"

(a) trains a model with the first N layers for every N. (b) takes the one with most layers and
scores users from the state after every layer with that model's own head: as they are, as the paper
did, and through the model's final norm. The last state is after the norm in both, as in Hugging
Face LLaMA. SASRec is a band, the 95 % interval over users (not paired: two points inside it may
differ significantly; the report compares user by user). Runs go below --output_dir
(output/<domain>/paper by default), where finished ones are read and not repeated; motivation.csv,
motivation.md and motivation.png beside them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import cli
from engine.cli import PositiveInt, flag
from experiments.suite import Suite, SuiteFlags, open_suite
from utils.flags import Evaluation, TeacherFiles

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("HR@10", "NDCG@10", "MRR")
NAMES = {
    "trained": "trained with the first N layers",
    "raw": "all layers trained, state after layer N as it is",
    "normed": "the same through the final norm",
}
Band = dict[str, tuple[float, float, float]]  # metric -> SASRec's mean, low, high


@cli.command
def main(
    *,
    given: SuiteFlags,
    layers: list[int] = flag(
        [1, 2, 4, 8], "the numbers of layers; the largest is the model of (b)"
    ),
    eval_batch_size: PositiveInt = flag(512, "users per batch in (b)"),
) -> Path:
    """Train what is not there yet, score users after every layer, and draw both halves of the
    figure.
    """
    cli.check((min(layers) >= 1, f"--layers: expected whole numbers >= 1, got {min(layers)}"))
    suite = open_suite(given, {"sasrec": given.sasrec_flags, "teacher": given.teacher_flags})
    free = "llama_decoder_nums" not in suite.extra["teacher"]
    cli.check((free, "--teacher_flags: the number of layers is --layers here"))
    import pandas as pd

    from experiments import figures, paper

    points: list[dict[str, Any]] = []
    for seed in given.seeds:
        suite.item_table(seed)
        for n in sorted(set(layers)):
            name = "teacher" if n == 8 else f"layers_{n}"
            folder = suite.run("teacher", seed, name, llama_decoder_nums=n)
            point = {"part": "trained", "layers": n, "seed": seed}
            points.append(point | _test_metrics(folder))
        by_layer = score_every_layer(folder, suite, seed, given.device, eval_batch_size)
        for part, values in by_layer.items():
            for n, value in enumerate(values, start=1):
                points.append({"part": part, "layers": n, "seed": seed, **value})
    band = sasrec_band([suite.folder(seed) / "sasrec" for seed in given.seeds])
    table = pd.DataFrame(points)[["part", "layers", "seed", *METRICS]]
    table.to_csv(suite.root / "motivation.csv", index=False, float_format="%.6f")
    text = _markdown(table, band)
    (suite.root / "motivation.md").write_text(text, encoding="utf-8")
    theirs = paper.FIGURE2 if suite.data["domain_type"] == "cloth" else None
    drawn = figures.motivation(points, band, theirs, suite.root / "motivation.png")
    print(text)
    print(f"wrote {drawn}, motivation.csv, motivation.md", flush=True)
    return drawn


def score_every_layer(
    folder: Path, suite: Suite, seed: int, device_name: str, batch_size: int
) -> dict[str, list[dict[str, float]]]:
    """Test metrics (1 + 999) from the state after each layer of a run, raw and normed.

    One pass over the users.
    """
    import torch
    from tqdm import tqdm

    from datasets import sequences
    from datasets.inputs import read_inputs
    from datasets.item_table import read_table
    from engine import processes
    from engine.run import Run
    from models.llm4rec import LLM4Rec
    from utils import evaluation

    device = processes.choose_device(device_name)
    run = Run.read("teacher", folder, "--output_dir")
    flags = run.flags
    inputs = read_inputs(TeacherFiles(**suite.data, item_table=str(suite.table(seed))))
    table = read_table(inputs.table_path, inputs.data.item_ids)
    model = LLM4Rec.load(run, table, run.bf16).to(device)
    n_layers = model.decoder.n_layers
    model.return_states_at([*range(1, n_layers + 1)])
    protocol = Evaluation(
        num_candidates=flags["num_candidates"], candidate_seed=flags["candidate_seed"]
    )
    splits = sequences.evaluation_splits(inputs.data, flags["max_seq_length"], protocol)
    encode, columns = model.encoder(), model.item_table.float().T
    ranks: dict[str, list[list]] = {
        part: [[] for _ in range(n_layers)] for part in ("raw", "normed")
    }
    total = -(-inputs.data.n_users // batch_size)
    batches = splits["test"].batches(batch_size, device)
    options = {"desc": "every layer", "unit": "batch", "dynamic_ncols": True}
    with torch.no_grad():
        for batch in tqdm(batches, total=total, **options):
            states = encode(batch.history).states.float()  # [B, layers, H]
            inner = model.decoder.llama.norm(states[:, :-1]).float()
            normed = torch.cat([inner, states[:, -1:]], dim=1)
            for part, vectors in (("raw", states), ("normed", normed)):
                users = model.head.weight.float() @ vectors.transpose(1, 2)  # [B, D, layers]
                for n in range(n_layers):
                    ranks[part][n].append(evaluation.rank_users(users[:, :, n], columns, batch))
    return {part: [_sampled(of_layer) for of_layer in every] for part, every in ranks.items()}


def _sampled(ranks: list) -> dict[str, float]:
    from utils.evaluation import collect

    metrics = collect(ranks).metrics()["sampled"]
    return {name: metrics[name] for name in METRICS}


def sasrec_band(folders: list[Path]) -> Band:
    """SASRec's mean over seeds and its 95 % bootstrap interval over users, by metric."""
    import numpy as np

    from experiments.significance import bootstrap

    ranks = []
    for folder in folders:
        with np.load(folder / "ranks.npz", allow_pickle=False) as arrays:
            ranks.append(arrays["test_sampled"])
    ranks = np.stack(ranks)  # [seeds, U]
    inside = (ranks <= 10).astype(float)
    values = {"HR@10": inside, "NDCG@10": inside / np.log2(1.0 + ranks), "MRR": 1.0 / ranks}
    return {name: bootstrap([values[name].mean(0)[None]], 1000)[0][:3] for name in METRICS}


def _test_metrics(folder: Path) -> dict[str, float]:
    from engine.files import read_json

    test = read_json(folder / "results.json", "results")["test"]["sampled"]
    return {name: test[name] for name in METRICS}


def _markdown(table: "pd.DataFrame", band: Band) -> str:
    from experiments.report import markdown, spread

    sasrec = [f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in band.values()]
    lines = [["SASRec", "-", *sasrec]]
    for (part, n), group in table.groupby(["part", "layers"], sort=False):
        lines.append([NAMES[part], str(n), *[spread(group[name].tolist()) for name in METRICS]])
    return markdown(["what", "N", *METRICS], lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
