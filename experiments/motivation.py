"""The paper's Fig. 2: how many layers a recommender needs, and whether the final norm explains the jump at the last one.

    python -m experiments.motivation                                     # the demo domain and base tiny, a few minutes on 2 cores
    python -m experiments.motivation --domain_type cloth --base_model meta-llama/Llama-2-7b-hf --layers 1,2,4,8,16,24,32 \
        --teacher_flags "--num_epochs 3 --warmup_steps 100"

(a) trains a model with the first N layers for every N. (b) takes the one with most layers and scores users from the state
after every layer with that model's own head: as they are, as the paper did, and through the model's final norm. The last
state is after the norm in both, as in Hugging Face LLaMA. SASRec is a band, the 95 % interval over users (not paired: two
points inside it may differ significantly; the report compares user by user). Runs go below
--output_dir (output/<domain>/paper by default), where finished ones are read and not run again; motivation.csv,
motivation.md and motivation.png beside them.
"""

from pathlib import Path
from typing import Any, Literal

from utils import cli

METRICS = ("HR@10", "NDCG@10", "MRR")


@cli.command
def main(
    *,
    domain_type: str = "demo",
    data_path: str | None = None,
    base_model: str = "tiny",
    layers: list[int] = [1, 2, 4, 8],  # noqa: B006  read, never changed
    seeds: list[int] = [42],  # noqa: B006
    sasrec_flags: str = "",
    teacher_flags: str = "--num_epochs 10",
    output_dir: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    eval_batch_size: cli.PositiveInt = 512,
    overwrite: bool = False,
) -> Path:
    """Train what is not there yet, score users after every layer, and draw both halves of the figure.

    Args:
        domain_type, data_path: the domain, and its CSV wherever it is.
        base_model: of every model.
        layers: the numbers of layers; the largest is the model of (b).
        seeds: a run of everything for each, SASRec included.
        sasrec_flags, teacher_flags: flags of train_sr_trad.py and finetune.py, in quotes.
        output_dir: where the runs go; output/<domain>/paper by default.
        device: auto is cuda where there is one.
        eval_batch_size: users at once in (b).
        overwrite: run again what is finished.
    """
    cli.check((min(layers) >= 1, f"--layers: expected whole numbers >= 1, got {min(layers)}"))
    from experiments.runs import open_suite

    suite = open_suite(domain_type, data_path, output_dir, base_model, device, {"sasrec": sasrec_flags, "teacher": teacher_flags}, overwrite)
    cli.check(
        ("llama_decoder_nums" not in suite.extra["teacher"], "--teacher_flags: the number of layers is --layers here"),
    )
    import pandas as pd

    from experiments import figures, rows

    points: list[dict[str, Any]] = []
    for seed in seeds:
        suite.item_table(seed)
        for n in sorted(set(layers)):
            folder = suite.run("teacher", seed, "teacher" if n == 8 else f"layers_{n}", llama_decoder_nums=n)
            points.append({"part": "trained", "layers": n, "seed": seed} | _test_metrics(folder))
        by_layer = score_every_layer(folder, suite.table(seed), suite.data, device, eval_batch_size)
        for part, values in by_layer.items():
            points += [{"part": part, "layers": n, "seed": seed, **value} for n, value in enumerate(values, start=1)]
    band = sasrec_band([suite.folder(seed) / "sasrec" for seed in seeds])
    table = pd.DataFrame(points)[["part", "layers", "seed", *METRICS]]
    table.to_csv(suite.root / "motivation.csv", index=False, float_format="%.6f")
    text = _markdown(table, band)
    (suite.root / "motivation.md").write_text(text, encoding="utf-8")
    figures.motivation(points, band, rows.FIGURE2 if suite.data["domain_type"] == "cloth" else None, suite.root / "motivation.png")
    print(text)
    print(f"wrote {suite.root / 'motivation.png'}, motivation.csv, motivation.md", flush=True)
    return suite.root / "motivation.png"


def score_every_layer(run: Path, table_path: Path, data: dict[str, Any], device: str, batch_size: int) -> dict[str, list[dict[str, float]]]:
    """Test metrics (1 + 999) from the state after each layer of a finished run, raw and through its final norm; one pass over the users."""
    import torch
    from tqdm import tqdm

    from datasets import sequences
    from datasets.inputs import read_inputs
    from datasets.prompts import read_template
    from models import base
    from models.llm4rec import build
    from utils import checkpoint, evaluation, runlog, training

    config = runlog.read_json(run / "config.json", "run")
    flags, where = config["flags"], training.choose_device(device)
    inputs = read_inputs(data["domain_type"], data["data_path"], str(table_path))
    location = base.locate(flags["base_model"], [*read_template("alpaca")])
    half = runlog.recorded_precision(run, None, where.type == "cuda")
    model = build(base=location, item_table=inputs.table(), bf16=half, **config["model"]).to(where)
    checkpoint.restore(model, checkpoint.load(run / "best")[0], run / "best")
    n_layers = len(config["model"]["layers"])
    model.regroup(n_layers)
    _, splits = sequences.prepare(inputs.data, **{name: flags[name] for name in ("train_targets", "max_seq_length", "num_candidates", "candidate_seed")})
    encode, columns = model.encoder(half), model.item_table.float().T
    found: dict[str, list[list]] = {part: [[] for _ in range(n_layers)] for part in ("raw", "normed")}
    batches = splits["test"].batches(batch_size, where)
    with torch.no_grad():
        for batch in tqdm(batches, total=-(-inputs.data.n_users // batch_size), desc="every layer", unit="batch", dynamic_ncols=True):
            states = encode(batch.history).states.float()  # [B, layers, H]
            normed = torch.cat([model.decoder.llama.norm(states[:, :-1]).float(), states[:, -1:]], dim=1)
            for part, vectors in (("raw", states), ("normed", normed)):
                users = model.head.weight.float() @ vectors.transpose(1, 2)  # [B, D, layers]
                for n in range(n_layers):
                    found[part][n].append(evaluation.rank_users(users[:, :, n], columns, batch))
    return {
        part: [{name: evaluation.collect(ranks).metrics()["sampled"][name] for name in METRICS} for ranks in every]
        for part, every in found.items()
    }


def sasrec_band(folders: list[Path]) -> dict[str, tuple[float, float, float]]:
    """SASRec's mean over seeds and its 95 % bootstrap interval over users, by metric."""
    import numpy as np

    from experiments.significance import paired_bootstrap

    ranks = np.stack([np.load(folder / "ranks.npz", allow_pickle=False)["test_sampled"] for folder in folders])
    inside = (ranks <= 10).astype(float)
    values = {"HR@10": inside, "NDCG@10": inside / np.log2(1.0 + ranks), "MRR": 1.0 / ranks}
    return {name: paired_bootstrap(values[name].mean(0), 1000)[:3] for name in METRICS}


def _test_metrics(folder: Path) -> dict[str, float]:
    from utils.runlog import read_json

    test = read_json(folder / "results.json", "results")["test"]["sampled"]
    return {name: test[name] for name in METRICS}


def _markdown(table, band: dict[str, tuple[float, float, float]]) -> str:
    from experiments.report import markdown, spread

    names = {
        "trained": "trained with the first N layers",
        "raw": "all layers trained, state after layer N as it is",
        "normed": "the same through the final norm",
    }
    lines = [["SASRec", "-", *[f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in band.values()]]]
    for (part, n), group in table.groupby(["part", "layers"], sort=False):
        lines.append([names[part], str(n), *[spread(group[name].tolist()) for name in METRICS]])
    return markdown(["what", "N", *METRICS], lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
