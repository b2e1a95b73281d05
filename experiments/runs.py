"""What the experiments share: the scripts' runs below one folder, a folder a seed; a finished run is read, not repeated.

    python -m experiments.runs python finetune.py --domain_type beauty ... --output_dir FOLDER

says whether FOLDER holds that command's finished run: status 0 yes, 3 no; 2 where it holds one with other flags or files.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets.demo import ensure_demo
from datasets.interactions import canonical_domain, find_csv, read_csv
from utils import cli, runlog

SCRIPTS = {"sasrec": train_sr_trad.main, "teacher": finetune.main, "student": distill.main}
_STEPS = {"train_sr_trad.py": "sasrec", "finetune.py": "teacher", "distill.py": "student"}


def finished_before(step: str, flags: dict[str, Any], data_sha256: str) -> bool:
    """Whether --output_dir holds a finished run of a script with the same flags, data, item table and teacher.

    Args:
        step: which script; flags: those given; data_sha256: of the data's CSV as it is now.
    Raises:
        UsageError: it holds a finished run with other flags or from other files, or such a file is missing.
    """
    flags = cli.defaults(SCRIPTS[step]) | flags
    root = Path("output") / canonical_domain(flags["domain_type"])
    folder = Path(flags["output_dir"] or root / step)
    if not runlog.finished(folder):
        return False
    run, inputs = runlog.read_json(folder / "config.json", "run"), {"data_sha256": data_sha256}
    if run.get("step") != step:
        raise cli.UsageError(f"{folder} holds a finished {run.get('step')} run, not a {step} run; choose another --output_dir")
    recorded = cli.defaults(SCRIPTS[step]) | run["flags"]  # a flag that came after the run has its default
    taught = run.get("teacher") not in (None, "online")
    if step == "student":  # what was not given came from the teacher, whose weights are compared below, or is distill.py's own
        flags |= {name: recorded[name] if taught else own for name, own in distill.INHERITED.items() if flags[name] is None}
    other = runlog.differences(run | {"flags": recorded}, flags, inherited=False)
    if other:
        raise cli.UsageError(f"{folder} holds a finished run with other flags: {other}; --overwrite, or choose another --output_dir")
    if step != "sasrec":
        table = Path(flags["item_table"] or root / "sasrec_item.pkl")
        cli.check((table.is_file(), f"item table not found: {table}; extract_emb.py writes it"))
        inputs["table_sha256"] = runlog.file_sha256(table)
    if taught and run.get("teacher_sha256"):
        results = Path(flags["teacher"] or root / "teacher") / "results.json"
        inputs["teacher_sha256"] = runlog.read_json(results, "teacher's results").get("weights_sha256") or "nothing"
    runlog.check_same(folder, inputs, "what is there now")
    return True


@dataclass(frozen=True)
class Suite:
    """Runs of one domain: root/seed<S>/{sasrec, sasrec_item.pkl, teacher, ...}.

    data: the scripts' domain_type and data_path; data_sha256: of that CSV; extra: script's step -> flags it always gets;
    overwrite: run again what is finished.
    """

    root: Path
    data: dict[str, Any]
    data_sha256: str
    extra: dict[str, dict[str, Any]]
    overwrite: bool

    def run(self, step: str, seed: int, name: str, **flags: Any) -> Path:
        """Run a step into its folder, unless a finished run of the same flags and files is there; an unfinished one goes on.

        Raises:
            UsageError: the folder holds a run with other flags or from other files.
        """
        folder = self.folder(seed) / name
        flags = self.data | self.extra[step] | flags | {"seed": seed, "output_dir": str(folder)}
        if step != "sasrec":
            flags["item_table"] = str(self.table(seed))
        done = not self.overwrite and finished_before(step, flags, self.data_sha256)
        print(f"\n== {folder}: {'finished before' if done else step}", flush=True)
        if not done:
            SCRIPTS[step](**flags, overwrite=self.overwrite)
        return folder

    def item_table(self, seed: int) -> Path:
        """Steps 1 and 2."""
        table = self.table(seed)
        sasrec = self.run("sasrec", seed, "sasrec")
        trained = runlog.read_json(sasrec / "results.json", "SASRec results")["weights_sha256"]
        notes = table.with_suffix(".json")
        if not table.is_file() or not notes.is_file() or runlog.read_json(notes, "item table notes").get("sasrec_sha256") != trained:
            extract_emb.main(**self.data, sasrec=str(sasrec), item_table=str(table))
        return table

    def folder(self, seed: int) -> Path:
        return self.root / f"seed{seed}"

    def table(self, seed: int) -> Path:
        return self.folder(seed) / "sasrec_item.pkl"


def open_suite(
    domain_type: str, data_path: str | None, output_dir: str | None, base_model: str, device: str, texts: dict[str, str], overwrite: bool
) -> Suite:
    """Check the flags meant for each script and find the data, before any work.

    Args:
        texts: script's step -> a command line's flags for it, e.g. {"sasrec": "--num_epochs 3"}.
    Raises:
        UsageError: a flag that its script does not have, or the data is missing.
    """
    extra: dict[str, dict[str, Any]] = {}
    for step, text in texts.items():
        try:
            extra[step] = cli.bind(SCRIPTS[step], shlex.split(text))
        except (cli.UsageError, ValueError) as error:
            raise cli.UsageError(f"--{step}_flags={text}: {error}") from None
        own = [name for name in extra[step] if name in (*runlog.PLACES, "domain_type", "seed", "base_model", "device", "overwrite", "eval_only")]
        if own:
            raise cli.UsageError(f"--{step}_flags={text}: --{own[0]} is set by the experiment")
        extra[step] |= {"device": device} | ({"base_model": base_model} if step != "sasrec" else {})
    domain = canonical_domain(domain_type)
    ensure_demo(domain, data_path)
    root = Path(output_dir or f"output/{domain}/paper")
    data = {"domain_type": domain, "data_path": data_path}
    return Suite(root, data, read_csv(find_csv(domain, data_path)).sha256, extra, overwrite)


def _asked() -> None:
    """The command of this module's docstring."""
    script = next((word for word in sys.argv[1:] if Path(word).name in _STEPS), None)
    if script is None:
        raise cli.UsageError(f"expected a command with one of {', '.join(_STEPS)}")
    step = _STEPS[Path(script).name]
    flags = cli.bind(SCRIPTS[step], sys.argv[sys.argv.index(script) + 1 :])
    if flags.get("overwrite"):
        sys.exit(3)
    data = find_csv(canonical_domain(flags.get("domain_type", cli.defaults(SCRIPTS[step])["domain_type"])), flags.get("data_path"))
    sys.exit(0 if finished_before(step, flags, read_csv(data).sha256) else 3)


if __name__ == "__main__":
    try:
        _asked()
    except cli.UsageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
