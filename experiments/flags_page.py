"""docs/flags.md, made from utils/flags.py and the scripts' signatures.

python -m experiments.flags_page                  # write the page; a test says when it is stale
"""

from pathlib import Path

import distill
import export
import extract_emb
import finetune
import recommend
import train_sr_trad
from datasets import convert, process
from utils import cli

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
SCRIPTS = {
    "train_sr_trad": train_sr_trad.main,
    "extract_emb": extract_emb.main,
    "finetune": finetune.main,
    "distill": distill.main,
    "recommend": recommend.main,
    "export": export.main,
    "datasets.convert": convert.main,
    "datasets.process": process.main,
}
START = "<!-- made by experiments.flags_page, do not edit -->"
END = "<!-- end of flags -->"


@cli.command
def main() -> Path:
    """Write the flags between the two markers of docs/flags.md."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(text), encoding="utf-8")
    print(f"wrote {PAGE}")
    return PAGE


def with_tables(text: str) -> str:
    """The page with its tables made again."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """A table per group: flag, value, default of each script that has it, text."""
    groups: dict[str, dict[str, dict[str, cli.Flag]]] = {}
    for script, command in SCRIPTS.items():
        for name, flag in cli.flags_of(command).items():
            title = f"{script} only"
            if flag.group:
                title = f"{flag.group.__doc__} ({flag.group.kind})"
            groups.setdefault(title, {}).setdefault(name, {})[script] = flag
    lines = []
    for title, flags in groups.items():
        lines += [f"### {title}", "", "| flag | value | default | what |", "|---|---|---|---|"]
        for name, by_script in flags.items():
            first = next(iter(by_script.values()))
            cells = [f"`{name}`", cli.describe(first.hint), _defaults(by_script), first.help]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _defaults(by_script: dict[str, cli.Flag]) -> str:
    """One value where all scripts agree, else a value per script."""
    shown = {script: _value(flag.default) for script, flag in by_script.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{script} {value}" for script, value in shown.items())


def _value(default: object) -> str:
    if default is None:
        return "-"
    if default is cli.REQUIRED:
        return "required"
    if isinstance(default, list):
        return ",".join(map(str, default)) or "-"
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    cli.run(main)
