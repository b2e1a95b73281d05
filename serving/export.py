"""Write a trained student, a teacher or SASRec as a folder that others can use.

    python -m serving.export --output_dir export/demo                   # demo domain: half a minute
    python -m serving.export --domain_type cloth --output_dir export/cloth
    python -m serving.export --domain_type cloth --model teacher --output_dir export/teacher
    python -m serving.export --output_dir export/onnx --onnx                  # recommender.onnx too

The folder has a plain Hugging Face LLaMA (`AutoModel.from_pretrained` loads it), the item table and
heads, items.csv, and a model card with the code that computes the scores. Of SASRec it has the
weights, and the code needs torch alone. That code is run on the histories of test users and must
give the model's own scores, and so must the ONNX graph, else nothing is written.
"""

import string
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from datasets.domain import split_of
from engine import cli
from engine.cli import PositiveInt, flag
from engine.errors import RunError, one_line
from engine.files import check_replaceable, making, replace_folder
from engine.run import Run, run_names
from serving.served import Served, ServedFiles, is_export, read

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SHOWN = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")
HERE = Path(__file__).parent
ONNX_READERS = "the graph is read by onnxruntime 1.18 or newer"
LAST = "The last item of every user is the target."
FIRST_AFTER = (
    "The first item of every user after one moment is the target; later ones are not used."
)
RANKED = {
    "sampled": "the target among {candidates} items that the user had not met",
    "full": "the whole catalogue, without the user's history",
    "full_all": "the whole catalogue",
}


def model_card(served: Served, code: str) -> str:
    """model_card.md, filled in.

    Args:
        code: Python that computes the scores without ours.
    """
    from utils.evaluation import beside

    run, data = served.run, served.inputs.data
    recorded = run.flags
    results = run.folder / "results.json"
    measured = run.results() if results.is_file() else {}
    if measured.get("weights_sha256") != run.weights_sha256():  # of an earlier best/, or none
        measured = {"test": {}}
    drawn = recorded["num_candidates"]
    fewest = measured.get("candidates", {}).get("fewest", drawn)  # an older run does not record it
    candidates = drawn if drawn == fewest else f"at least {fewest}"  # a small catalogue has fewer
    lines = metric_lines(f"this {run.stage}", measured["test"], candidates)
    for name, found in (beside(run, measured) if measured["test"] else {}).items():
        lines += metric_lines(name, found["test"], candidates)
    text = (HERE / "model_card.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(
        **described(run),
        domain=run.config["domain"],
        n_users=f"{data.n_users:,}",
        target=LAST if data.moment is None else FIRST_AFTER,
        split=split_of(run.flags),
        n_items=f"{data.n_items:,}",
        size=data.n_items,
        sha256=data.sha256,
        max_seq_length=recorded["max_seq_length"],
        seed=recorded["seed"],
        metrics="\n".join(lines) or "| not evaluated |",
        trained_in="bfloat16" if run.bf16 else "float32",
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
        code=code.rstrip(),
    )


def described(run: Run) -> dict[str, str]:
    """What the card says of the model itself."""
    from models.builtin import BUILT_IN

    if run.stage == "sasrec":
        shape = f"{run.flags['num_blocks']} blocks of width {run.flags['hid_dim']}"
        bsarec = run.flags.get("alpha", 0.0) > 0
        title, source = (
            ("BSARec", "Shin et al., 2024") if bsarec else ("SASRec", "Kang and McAuley, 2018")
        )
        about = f"| model | {title} ({source}), {shape} |"
        named = {"title": title, "library": "pytorch", "readers": ONNX_READERS}
        return named | {"about": about, "how": "in full"}
    spec, base = run.config["model"], run.flags["base_model"]
    licence = "none: it is random" if base in BUILT_IN else "see its own card"
    layers = ", ".join(map(str, spec["layers"]))
    return {
        "title": f"{len(spec['layers'])} LLaMA layers ({run.stage})",
        "library": "transformers",
        "readers": f"config.json is also read by transformers 4; {ONNX_READERS}",
        "about": f"| base | `{base}`, layers {layers} |\n| licence of the base | {licence} |",
        "how": spec["strategy"],
    }


def metric_lines(model: str, test: dict, candidates: int | str) -> list[str]:
    """Rows of the card's table: a protocol each, of one model's test metrics."""
    lines = []
    for protocol, metrics in test.items():
        values = " | ".join(f"{metrics[name]:.4f}" for name in SHOWN)
        lines.append(f"| {RANKED[protocol].format(candidates=candidates)} | {model} | {values} |")
    return lines


def write(folder: Path, served: Served, verify_users: int, onnx: bool) -> int:
    """Write all files into a folder, and compare their scores with the model's.

    Returns:
        of how many test users.
    Raises:
        RunError: the scores differ.
    """
    import numpy as np
    import torch  # imported late: bad flags fail at once
    from tqdm import tqdm

    from datasets.sequences import TEST, EvaluationSplit
    from models.llm4rec import LLM4Rec
    from models.sasrec import SASRec
    from serving import exported

    run, ids = served.run, served.item_ids()
    slots, of_sasrec = run.flags["max_seq_length"], run.stage == "sasrec"
    if of_sasrec:
        model = SASRec.load(run)
        table, graph = model.item_table.detach(), exported.SASRecGraph(model)
    else:
        table = served.item_table(ids)
        model = LLM4Rec.load(run, table, bf16=False)
        graph = exported.Graph(model)
    split = EvaluationSplit(served.inputs.data, TEST, slots, 0, 1)
    histories = split.samples.histories(np.arange(min(verify_users, served.inputs.data.n_users)))
    encode = model.user_encoder()
    expected = torch.cat([encode(part) @ table.T for part in histories.split(256)])
    names = served.names(ids)
    about = {"domain": run.config["domain"], "max_seq_length": slots}
    about |= {"sasrec": SASRec.shape(run)} if of_sasrec else {}
    exported.save(folder, model, torch.from_numpy(ids), served.popularity(ids), about)
    names.write(folder / "items.csv")
    name = "scores_sasrec.py" if of_sasrec else "scores.py"
    code = (HERE / name).read_text(encoding="utf-8")
    (folder / "README.md").write_text(model_card(served, code), encoding="utf-8")
    scores = exported.card_scores(code, folder)
    rows = [row[row != len(table)].tolist() for row in histories]
    found = [scores(row) for row in tqdm(rows, desc="the card's code", unit="user")]
    exported.verify(expected, torch.stack(found), "the card's code")
    if onnx:
        path = exported.save_onnx(folder, graph, slots)
        exported.verify(expected, exported.onnx_scores(path, histories), "the ONNX graph")
    return len(rows)


@cli.command
def main(
    *,
    files: ServedFiles,
    output_dir: str = flag(help="the folder to be written"),
    verify_users: PositiveInt = flag(1000, "test users whose scores are compared"),
    onnx: bool = flag(False, "also write recommender.onnx: history -> scores"),
    overwrite: bool = flag(False, "replace the folder, if it is an export"),
) -> Path:
    """Export a run."""
    folder = check_replaceable(Path(output_dir), "--output_dir")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    exported = is_export(folder)
    instead = "--overwrite replaces it" if exported else "not an export, choose another"
    lacking = [name for name in ONNX_PACKAGES if onnx and find_spec(name) is None]
    cli.check(
        (not lacking, f"--onnx needs {', '.join(lacking)}; pip install {' '.join(lacking)}"),
        (
            empty or (overwrite and exported),
            f"--output_dir={output_dir}: already exists; {instead}",
        ),
    )
    several = run_names(files.model, "model")[1:]
    cli.check((not several, f"--model={files.model}: a sum is not exported; name one model"))
    served = read(files)

    from safetensors import SafetensorError

    try:
        with making(folder) as partial:
            n_users = write(partial, served, verify_users, onnx)
            replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise RunError(f"--output_dir={output_dir}: {reason}; nothing was written") from None
    ways = "the card's code and the ONNX graph give" if onnx else "the card's code gives"
    print(f"{ways} the model's scores for {n_users:,} test users")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {output_dir}: {size / 2**20:.1f} MiB")
    return Path(output_dir)


if __name__ == "__main__":
    cli.run(main)
