"""The experiments: rows and names, significance, the report, and each experiment on a shrunken
demo.
"""

import csv
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

import distill
import extract_emb
import finetune
import train_sr_trad
from datasets import process
from engine import cli
from experiments import bases, paper, report, results, significance, titles
from tests.conftest import ROOT

STUDENT = cli.defaults(distill.main) | {
    "llama_decoder_nums_teacher": 8,
    "base_model": "tiny",
    "max_seq_length": 30,
    "prompt_template_name": "alpaca",
}
SHORT = "--max_steps 3 --eval_batch_size 64 --batch_size 32"
PAPERS = ("cloth", "movie", "music", "sport")
OFF = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
COS = {"norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
SASREC_KL = {"sasrec_lambda": 3.0, "sasrec_temperature": 2.0}


@pytest.mark.parametrize(
    "step, flags, expected",
    [
        ("sasrec", {"train_targets": "all", "init_std": 0.02}, "SASRec"),
        ("sasrec", {"train_targets": "last", "init_std": 1.0}, "SASRec, as released"),
        (
            "sasrec",
            {"train_targets": "last", "init_std": 1.0, "max_seq_length": 50},
            "SASRec, as released later",
        ),
        ("sasrec", {"train_targets": "last", "init_std": 0.02}, "SASRec, one target per user"),
        ("teacher", cli.defaults(finetune.main), "E4SRec-like, 8 layers"),
        (
            "teacher",
            cli.defaults(finetune.main) | {"cls_multiple_lambda": 1.0},
            "8 layers: CE + L_ms",
        ),
        ("student", STUDENT, "SLMRec 4 <- 8"),
        ("student", STUDENT | OFF, "E4SRec-like, 4 layers"),
        (
            "student",
            STUDENT | OFF | {"student_init": "teacher"},
            "4 layers: CE, from the teacher's layers",
        ),
        ("student", STUDENT | {"norm_lambda": 0.0}, "4 <- 8: D_cos + L_ms"),
        ("student", STUDENT | {"distill_lambda": 0.0, "norm_lambda": 0.0}, "4 layers: CE + L_ms"),
        ("student", STUDENT | OFF | {"logit_lambda": 1.0}, "4 <- 8: logit KL"),
        ("student", STUDENT | OFF | SASREC_KL, "4 layers: CE + SASRec KL"),
        ("student", STUDENT | SASREC_KL, "SLMRec 4 <- 8 + SASRec KL"),
        ("student", STUDENT | {"exit_norm": True}, "SLMRec 4 <- 8, normed exits"),
        (
            "student",
            STUDENT | {"student_init": "adapter"},
            "SLMRec 4 <- 8, from the teacher's adapter and head",
        ),
        ("student", STUDENT | {"distill_mode": "online"}, "SLMRec 4 <- 8, online"),
        (
            "student",
            STUDENT | {"llama_decoder_nums_student": 2, "distill_block": 2, "train_targets": "all"},
            "SLMRec 2 <- 8, B = 2, every prefix",
        ),
    ],
)
def test_rows_are_called_what_they_are(step, flags, expected):
    assert paper.label(step, flags) == expected


def test_every_row_of_the_ablation_binds_and_has_a_name_of_its_own():
    script, names = ROOT / "experiments/domains/ablation.sh", {}
    every = commands(script)
    assert [words[0] for words in every[:3]] == [
        "train_sr_trad.py",
        "extract_emb.py",
        "finetune.py",
    ]
    for script_name, *rest in every[3:-1]:
        assert script_name == "distill.py"
        flags = cli.bind(distill.main, rest)
        depths = {"student_init": flags.get("student_init") or "base"}
        names[Path(flags["output_dir"]).name] = paper.label("student", STUDENT | flags | depths)
    assert len(set(names.values())) == len(names) == 23
    for name in ("ce", "cos", "cos_norm", "cos_ms", "slmrec"):
        assert names[name] in paper.PAPER["cloth"]
    some = commands(script, ROWS="ce last", DOMAIN="cloth", SEEDS="0 1")
    students = [cli.bind(distill.main, rest) for name, *rest in some if name == "distill.py"]
    assert [flags["output_dir"] for flags in students] == [
        f"output/cloth/paper/seed{seed}/{name}" for seed in (0, 1) for name in ("ce", "last")
    ]


def test_the_papers_figures_are_those_of_its_page():
    """Read again from shared/paper.md where it is: every figure of both tables."""
    page = ROOT.parent / "shared" / "paper.md"
    if not page.exists():
        pytest.skip(f"not here: {page}")
    names = {
        "SASRec": "SASRec",
        "E4SRec (32 layers)": "E4SRec-like, 32 layers",
        "E4SRec_8": "E4SRec-like, 8 layers",
        "E4SRec_4": "E4SRec-like, 4 layers",
        "SLMRec 4<-8": "SLMRec 4 <- 8",
        "D_cos": "4 <- 8: D_cos",
        "D_cos + D_norm": "4 <- 8: D_cos + D_norm",
        "D_cos + L_ms": "4 <- 8: D_cos + L_ms",
    }
    found = 0
    for line in page.read_text().split("## Main table")[1].split("## Efficiency")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] in names:
            for domain, cell in zip(PAPERS, cells[1:]):
                assert paper.PAPER[domain][names[cells[0]]] == tuple(map(float, cell.split())), (
                    domain,
                    cells[0],
                )
                found += 1
    assert found == 8 * 4


def of_users(difference, resamples):
    """The estimate of one difference of one seed, [U]."""
    return significance.bootstrap([difference[None]], resamples)[0]


def test_paired_bootstrap_on_what_can_be_worked_out():
    mean, low, high, p = of_users(np.full(50, 0.25), 99)
    # 2 * (0 + 1) / (99 + 1): the least that 99 resamples can show
    assert (mean, low, high, p) == (0.25, 0.25, 0.25, 0.02)
    assert of_users(np.zeros(50), 100) == (0.0, 0.0, 0.0, 1.0)
    rng = np.random.default_rng(5)
    difference = rng.normal(0.02, 1.0, 4000)
    mean, low, high, p = of_users(difference, 4000)
    # the normal interval, which the bootstrap's must come near
    error = difference.std() / math.sqrt(len(difference))
    assert mean == difference.mean()
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error) and high == pytest.approx(
        mean + 1.96 * error, abs=0.1 * error
    )
    assert p == pytest.approx(math.erfc(mean / error / math.sqrt(2)), abs=0.03)
    assert of_users(-difference, 4000)[3] == pytest.approx(p, abs=1e-9)
    whole, chunk = of_users(difference, 64), significance.CHUNK
    try:
        significance.CHUNK = 4000 * 10
        assert of_users(difference, 64) == pytest.approx(whole)
    finally:
        significance.CHUNK = chunk


def test_seeds_are_resampled_with_users():
    """Three seeds that differ: the interval is wider than over users, and holds all their means."""
    rng = np.random.default_rng(0)
    users = rng.normal(0.0, 1.0, 2000)
    seeds = np.array([0.0, 0.2, 0.4])
    both = significance.bootstrap([users + seeds[:, None]], 4000)[0]
    over_users = of_users(users + 0.2, 4000)
    assert both.mean == pytest.approx(over_users.mean)
    assert both.high - both.low > 2 * (over_users.high - over_users.low)
    # the mean of three draws of three seeds: variance of the seeds / 3, beside that over users / U
    spread = math.sqrt(seeds.var() / 3 + users.var() / 2000)
    assert both.high - both.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    alone, again = significance.bootstrap([users[None] + 0.2, users + seeds[:, None]], 4000)
    assert alone == pytest.approx(over_users) and again.mean == pytest.approx(both.mean)


def test_holms_correction_by_hand():
    # ordered .01, .02, .03, .5: times 4, 3, 2, 1, never below an earlier one
    assert significance.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0] and significance.holm([]) == []


def test_mean_and_spread():
    assert report.spread([0.1, 0.2, 0.3]) == "0.2000 ± 0.1000"
    assert (report.spread([0.25]), report.spread([])) == ("0.2500", "-")


def fake_run(folder, step, flags, seed, ranks, domain="cloth", settings=None, **extra):
    """A finished run with the given test ranks under every protocol."""
    from utils.metrics import summarise

    folder.mkdir(parents=True)
    flags = flags | {"seed": seed}
    metrics = {
        protocol: summarise(np.array(ranks), (1, 5, 10, 20))
        for protocol in ("sampled", "full", "full_all")
    }
    found = {
        "seed": seed,
        "users": len(ranks),
        "test": metrics,
        "valid": metrics,
        "parameters": 10,
        "trainable_parameters": 4,
        "steps": 2,
        "best_step": 2,
        "train_seconds": 1.5,
        "inference_users_per_second": 7.0,
        "random_base": step != "sasrec",
        **extra,
    }
    layers = [*range(flags.get("llama_decoder_nums", flags.get("llama_decoder_nums_student", 0)))]
    config = {
        "step": step,
        "domain": domain,
        "data_sha256": "d" * 64,
        "flags": flags,
        "model": {"layers": layers},
    }
    if step == "student" and not paper.plain_ce(flags):
        config["teacher"] = f"output/seed{seed}/teacher"
    (folder / "config.json").write_text(json.dumps(config | (settings or {})))
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"event": "train", "step": 2, "ce": 3.0, "total": 3.0}) + "\n"
    )
    np.savez(folder / "ranks.npz", test_sampled=np.array(ranks), test_full=np.array(ranks))


def test_another_item_table_or_another_sasrec_more_makes_another_row(tmp_path):
    flags = STUDENT | OFF | {"sasrec_lambda": 3.0}
    made = {
        "one": {"sasrec_sha256": "a"},
        "two": {"sasrec_sha256": "a,b"},
        "titles": {"sasrec_sha256": "a", "items_from": "titles"},
    }
    for name, settings in made.items():
        fake_run(tmp_path / name, "student", flags, 0, [1, 2], settings=settings)
    runs, _ = results.read_runs(tmp_path)
    found = {run.name: run.label for run in runs}
    assert found["two"] == found["one"] + ", of 2 SASRecs"
    assert found["titles"] == found["one"] + ", items from titles"
    assert len({run.key for run in runs}) == 3


def test_the_report_over_seeds_beside_the_paper(tmp_path):
    teacher = cli.defaults(finetune.main) | {"domain_type": "cloth"}
    for seed, ranks in ((0, [1, 1, 2, 20]), (1, [1, 2, 4, 20])):
        fake_run(tmp_path / f"seed{seed}/slmrec", "student", STUDENT, seed, ranks)
        fake_run(tmp_path / f"seed{seed}/ce", "student", STUDENT | OFF, seed, [2, 2, 4, 20])
        fake_run(tmp_path / f"seed{seed}/teacher", "teacher", teacher, seed, [1, 1, 1, 1])
    # the same as ce of seed 0
    fake_run(tmp_path / "four", "teacher", teacher | {"llama_decoder_nums": 4}, 0, [2, 2, 4, 20])
    fake_run(tmp_path / "slow", "student", STUDENT | {"learning_rate": 1e-5}, 0, [20, 20, 20, 20])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"step": "student"}')
    for name, config, found in (
        ("odd", '{"step": ["a"]}', "{}"),
        ("bare", '{"step": "student"}', '{"steps": 3}'),
        ("list", "[1]", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "results.json").write_text(found)
    (tmp_path / "seed1/ce/metrics.jsonl").write_text('{"event": "train", "st')
    (tmp_path / "seed1/ce/ranks.npz").write_bytes(b"torn")
    text = report.main(runs=str(tmp_path), resamples=50).read_text()
    assert text == report.main(runs=str(tmp_path), resamples=50).read_text()
    above = text.split("### Significance")[0].splitlines()
    table = [line.strip("|").split("|") for line in above if line.startswith("| ")]
    lines = {cells[0].strip(): [cell.strip() for cell in cells] for cells in table}
    # HR@1: 2/4 and 1/4; MRR: (1 + 1 + 1/2 + 1/20)/4 = .6375, (1 + 1/2 + 1/4 + 1/20)/4 = .45
    assert (
        lines["SLMRec 4 <- 8"][1:3] == ["0, 1", "0.3750 ± 0.1768"]
        and lines["SLMRec 4 <- 8"][7] == "0.5437 ± 0.1326"
    )
    assert lines["SLMRec 4 <- 8"][-4:] == ["0.1669", "0.1947", "0.1807", "0.1874"]
    assert (
        lines["E4SRec-like, 4 layers"][1] == "0, 1" and lines["E4SRec-like, 8 layers"][1] == "0, 1"
    )
    assert (
        lines["SASRec"][1] == "not run"
        and lines["SASRec"][2] == "-"
        and lines["SASRec"][-4] == "0.1308"
    )
    assert lines["SLMRec 4 <- 8 [learning_rate=1e-05]"][1] == "0"
    assert lines["SASRec, as released"][-4] == "0.1308"
    assert (
        "random base" in text
        and "broken is unfinished" in text
        and "has the flags and the seed of" in text
    )
    assert (
        "bare: its config.json or results.json lacks something" in text
        and "list/config.json: damaged" in text
    )
    # the ranks of one seed are torn
    assert "| SLMRec 4 <- 8 | E4SRec-like, 4 layers |" not in text.split("### Significance")[1]
    assert (
        "SLMRec 4 <- 8 against E4SRec-like, 4 layers: ranks.npz of seed1/slmrec or seed1/ce is "
        "missing or torn" in text
    )
    shutil.copyfile(tmp_path / "seed0/ce/ranks.npz", tmp_path / "seed1/ce/ranks.npz")
    text = report.main(runs=str(tmp_path), resamples=50).read_text()
    # slmrec against ce: (1 - 1/2) + (1 - 1/2) + (1/2 - 1/4) + 0 = 1.25 and 0.5 + 0 + 0 + 0; mean
    # over seeds and users .875 / 4
    assert "| SLMRec 4 <- 8 | E4SRec-like, 4 layers | +0.2188 |" in text
    # against the teacher: -(0 + 0 + 1/2 + 19/20) / 4 = -.3625 and -(0 + 1/2 + 3/4 + 19/20) / 4 =
    # -.55, mean -.45625
    assert "| SLMRec 4 <- 8 | E4SRec-like, 8 layers | -0.456" in text
    assert "| E4SRec-like, 4 layers | E4SRec-like, 8 layers |" in text
    for name in ("metrics", "curves"):
        for suffix in ("png", "pdf"):
            assert (tmp_path / f"report_cloth_{name}.{suffix}").stat().st_size > 5000
    with open(tmp_path / "report_cloth.csv", newline="") as file:
        table = {(row["row"], row["seed"]): row for row in csv.DictReader(file)}
    assert float(table["SLMRec 4 <- 8", "0"]["sampled MRR"]) == pytest.approx(0.6375)
    assert float(table["SLMRec 4 <- 8", "1"]["sampled MRR"]) == pytest.approx(0.45)
    latex = (tmp_path / "report_cloth.tex").read_text().splitlines()
    own = [line for line in latex if line.startswith("SLMRec 4 $\\leftarrow$ 8 & 2 & ")]
    assert len(own) == 1 and "0.5437 $\\pm$ 0.1326" in own[0] and own[0].endswith("\\\\")
    assert latex[0].startswith("\\begin{tabular}{lrr") and latex[1] == "\\toprule"


def test_rows_of_the_paper_that_were_not_run_stand_there_with_its_figures(tmp_path):
    for domain in ("games", "cloth"):
        for name, weights in (("slmrec", {}), ("ce", OFF)):
            fake_run(tmp_path / domain / name, "student", STUDENT | weights, 0, [1, 2], domain)
    texts = {
        domain: report.main(runs=str(tmp_path / domain), resamples=50).read_text()
        for domain in ("games", "cloth")
    }
    row = "| 4 <- 8: D_cos + L_ms | not run |"
    assert row in texts["cloth"] and row not in texts["games"]
    (named,) = (line for line in texts["games"].splitlines() if line.startswith("Not run: "))
    assert "SASRec, as released; SASRec; E4SRec-like, 8 layers; " in named and named.endswith(".")


def rows_of(root):
    runs, notes = results.read_runs(root)
    return {row.label: row for row in results.by_domain(runs, notes)["cloth"]}, notes


def test_no_row_is_lost_and_none_is_mixed(tmp_path):
    for name, norm in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        fake_run(
            tmp_path / name / "seed0/slmrec", "student", STUDENT | {"norm_lambda": norm}, 0, [1, 2]
        )
    labels, _ = rows_of(tmp_path)
    assert set(labels) == {
        "SLMRec 4 <- 8",
        "SLMRec 4 <- 8 [norm_lambda=0.2]",
        "SLMRec 4 <- 8 [norm_lambda=0.3]",
    }
    for name in ("a", "b", "c"):
        shutil.rmtree(tmp_path / name)
    for seed, rate in (
        (0, 1e-3),
        (1, 1e-5),
    ):  # students of equal flags whose teachers differ are not seeds of one row
        fake_run(
            tmp_path / f"seed{seed}/teacher",
            "teacher",
            cli.defaults(finetune.main) | {"learning_rate": rate},
            seed,
            [1, 2],
        )
        fake_run(tmp_path / f"seed{seed}/slmrec", "student", STUDENT, seed, [1, 2])
    labels, _ = rows_of(tmp_path)
    assert sorted(labels) == [
        "E4SRec-like, 8 layers",
        "E4SRec-like, 8 layers [learning_rate=1e-05]",
        "SLMRec 4 <- 8",
        "SLMRec 4 <- 8 [seed1/slmrec]",
    ]
    shutil.rmtree(tmp_path / "seed1")
    fake_run(
        tmp_path / "two/slmrec",
        "student",
        STUDENT,
        1,
        [1, 2],
        settings={"bf16": True, "teacher": "output/seed0/teacher"},
    )
    # computed in bfloat16 on another machine
    assert "SLMRec 4 <- 8 [two/slmrec]" in rows_of(tmp_path)[0]


def test_a_flag_that_came_later_has_its_default_in_older_runs(tmp_path):
    fake_run(
        tmp_path / "seed0/slmrec",
        "student",
        {name: value for name, value in STUDENT.items() if name != "temperature"},
        0,
        [1, 2],
    )
    fake_run(tmp_path / "seed1/slmrec", "student", STUDENT, 1, [1, 2])
    assert list(rows_of(tmp_path)[0]["SLMRec 4 <- 8"].runs) == [0, 1]


@pytest.mark.parametrize(
    "n, t, expected",  # printed tables of the distribution's two-sided points
    [(2, 12.706, 0.05), (3, 4.303, 0.05), (3, 9.925, 0.01), (4, 3.182, 0.05), (5, 2.776, 0.05)]
    + [(5, 8.610, 0.001), (10, 2.262, 0.05), (11, 3.169, 0.01)],
)
def test_the_t_test_gives_the_tables_points(n, t, expected):
    values = np.arange(n) - (n - 1) / 2  # mean zero
    differences = values + t * values.std(ddof=1) / np.sqrt(n)
    assert significance.t_test(differences) == pytest.approx(expected, rel=2e-3)
    assert significance.t_test(-differences) == pytest.approx(expected, rel=2e-3)


def test_the_t_test_of_equal_differences():
    assert significance.t_test(np.zeros(3)) == 1.0
    assert significance.t_test(np.full(3, 0.25)) == 0.0


@pytest.mark.parametrize(
    "flags, settings, why",
    [({}, {"table_sha256": "other"}, "seed0/slmrec and seed0/ce use different item tables")],
)
def test_what_cannot_be_paired_is_not(tmp_path, flags, settings, why):
    fake_run(tmp_path / "seed0/slmrec", "student", STUDENT | flags, 0, [1, 2], settings=settings)
    fake_run(
        tmp_path / "seed0/ce", "student", STUDENT | OFF, 0, [1, 2], settings={"table_sha256": "one"}
    )
    labels, notes = rows_of(tmp_path)
    assert significance.compare(list(labels.values()), 10, notes) == []
    assert notes == [f"SLMRec 4 <- 8 against E4SRec-like, 4 layers: {why}"]


def test_other_candidates_are_a_table_of_their_own(tmp_path):
    for name, flags in (("a", {}), ("b", {"num_candidates": 99})):
        fake_run(tmp_path / name, "student", STUDENT | flags, 0, [1, 2])
    runs, notes = results.read_runs(tmp_path)
    assert list(results.by_domain(runs, notes)) == ["cloth", "cloth (candidates 99, seed 42)"]


def test_tables_of_other_sasrecs_are_rows_of_their_own(tmp_path):
    """A table of SASRec as released, and ours: the same flags of distill.py."""
    released = {"train_targets": "last", "init_std": 1.0}
    for name, flags in (("a", {"train_targets": "all"}), ("b", released)):
        settings = {"items_from": "SASRec", "items_flags": flags}
        fake_run(tmp_path / name, "student", STUDENT, 0, [1, 2], settings=settings)
    labels, notes = rows_of(tmp_path)
    assert sorted(labels) == ["SLMRec 4 <- 8", "SLMRec 4 <- 8, items from SASRec, as released"]
    assert not notes


def test_rows_are_compared_with_their_like(tmp_path):
    teacher = cli.defaults(finetune.main)
    for seed in (0, 1):
        fake_run(tmp_path / f"seed{seed}/teacher", "teacher", teacher, seed, [2, 2])
        fake_run(tmp_path / f"seed{seed}/ce", "student", STUDENT | OFF, seed, [4, 4])
    fake_run(tmp_path / "search", "teacher", teacher | {"learning_rate": 1e-5}, 7, [1, 1])
    every = {"train_targets": "all"}
    fake_run(
        tmp_path / "seed0/slmrec_all",
        "student",
        STUDENT | every,
        0,
        [1, 1],
        settings={"teacher": None},
    )
    fake_run(tmp_path / "seed0/ce_all", "student", STUDENT | OFF | every, 0, [2, 2])
    labels, notes = rows_of(tmp_path)
    pairs = {
        tuple(line[:3]): line[-1] for line in significance.compare(list(labels.values()), 10, notes)
    }
    assert pairs["E4SRec-like, 4 layers", "E4SRec-like, 8 layers", "-0.2500"] == "0, 1"
    assert (
        pairs["SLMRec 4 <- 8, every prefix", "E4SRec-like, 4 layers, every prefix", "+0.5000"]
        == "0"
    )
    assert pairs["E4SRec-like, 4 layers, every prefix", "E4SRec-like, 4 layers", "+0.2500"] == "0"
    assert not [pair for pair in pairs if "[" in pair[1]] and len(pairs) == 3
    assert (
        "E4SRec-like, 8 layers [learning_rate=1e-05] against E4SRec-like, 8 layers: no seed in "
        "common" in notes
    )


def test_older_runs_without_a_metric_and_a_runs_own_folder_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLED", (*report.SAMPLED, "MAP@10"))
    flags = STUDENT | {"block_map": "2:4,4:8"}
    fake_run(tmp_path / "one", "student", flags, 0, [1, 2])
    path = tmp_path / "one/results.json"
    found = json.loads(path.read_text())
    found["test"]["sampled"]["MAP@10"] = 0.75
    path.write_text(json.dumps(found))
    fake_run(tmp_path / "older", "student", STUDENT, 0, [1, 2])
    lines = report.main(runs=str(tmp_path), resamples=10).read_text().splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ")[8] for line in lines if " | 0 | " in line}
    assert rows["| SLMRec 4 <- 8"] == "-"
    assert rows["| SLMRec 4 <- 8, blocks 2:4,4:8"] == "0.7500"
    assert "SLMRec 4 <- 8, blocks" in report.main(runs=str(tmp_path / "one")).read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: np.savez(run / "ranks.npz", test_sampled=np.array([1, 2])),
        lambda run: (run / "ranks.npz").write_bytes(b""),
        lambda run: (run / "metrics.jsonl").write_text(
            '12\n{}\n{"event": "train", "step": 1, "ce": 2}\n'
        ),
        lambda run: (run / "config.json").write_text(
            (run / "config.json").read_text().replace('"data_sha256"', '"sha"')
        ),
        lambda run: (run / "results.json").write_text(
            (run / "results.json").read_text().replace('"full_all"', '"half"')
        ),
        lambda run: (run / "results.json").write_text(
            (run / "results.json").read_text().replace('"steps": 2', '"steps": 0')
        ),
    ],
)
def test_one_odd_run_does_not_take_the_report_down(tmp_path, damage):
    fake_run(tmp_path / "seed0/slmrec", "student", STUDENT, 0, [1, 2])
    fake_run(tmp_path / "seed0/ce", "student", STUDENT | OFF, 0, [1, 2])
    damage(tmp_path / "seed0/slmrec")
    assert "E4SRec-like, 4 layers" in report.main(runs=str(tmp_path), resamples=10).read_text()


def test_a_teacher_is_found_by_its_weights_and_other_depths_have_their_tables(tmp_path):
    deep = STUDENT | {
        "llama_decoder_nums_student": 1,
        "llama_decoder_nums_teacher": 32,
        "distill_block": 1,
    }
    fake_run(
        tmp_path / "t/deep",
        "teacher",
        cli.defaults(finetune.main) | {"llama_decoder_nums": 32},
        0,
        [1, 1],
        weights_sha256="w",
    )
    fake_run(tmp_path / "s/slmrec", "student", deep, 0, [2, 2], settings={"teacher_sha256": "w"})
    fake_run(tmp_path / "s/ce", "student", deep | OFF, 0, [4, 4])
    labels, notes = rows_of(tmp_path)
    found_pairs = [line[:3] for line in significance.compare(list(labels.values()), 10, notes)]
    assert ["SLMRec 1 <- 32, B = 1", "E4SRec-like, 1 layer", "+0.2500"] in found_pairs
    assert ["SLMRec 1 <- 32, B = 1", "E4SRec-like, 32 layers", "-0.5000"] in found_pairs


def test_what_the_report_reads_is_kept(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    fake_run(runs / "seed0/slmrec", "student", STUDENT, 0, [1, 300], domain="x")
    archive = str(kept / "x.zip")
    plain = report.main(runs=str(runs), keep=archive, resamples=10).read_text()
    with zipfile.ZipFile(archive) as file:
        names = ("config.json", "metrics.jsonl", "ranks.npz", "results.json")
        assert sorted(file.namelist()) == [f"seed0/slmrec/{name}" for name in names]
        ranks = np.load(io.BytesIO(file.read("seed0/slmrec/ranks.npz")))
        assert ranks["test_sampled"].dtype == np.uint16 and ranks["test_full"].tolist() == [1, 300]
    header, line = (kept / "x.csv").read_text().splitlines()
    assert header.startswith("run,row,seed,steps,best_step,valid MRR,sampled HR@1,")
    # MRR of ranks 1 and 300: (1 + 1/300) / 2
    assert line.startswith("seed0/slmrec,SLMRec 4 <- 8,0,2,2,0.501667,0.500000,")
    before = Path(archive).read_bytes()
    stale = json.loads((runs / "seed0/slmrec/results.json").read_text())
    stale["test"]["sampled"]["HR@1"] = 0.125
    inside = tmp_path / "mixed"
    shutil.copytree(runs, inside)
    shutil.copyfile(archive, inside / "x.zip")
    (inside / "seed0/slmrec/results.json").write_text(json.dumps(stale))
    assert "0.1250" in report.main(runs=str(inside), resamples=10).read_text()  # the live run wins
    report.main(runs=str(runs), keep=archive, resamples=10)
    assert Path(archive).read_bytes() == before
    tables = plain.partition("![metrics]")[0]
    again = report.main(runs=str(kept), resamples=10).read_text()
    assert again.startswith(tables)  # from the archive as from the folder


@pytest.mark.parametrize(
    "module, flags, line",
    [
        (report, {"runs": "nowhere"}, "--runs=nowhere: no such folder"),
        (report, {"runs": "."}, "no finished run below it"),
        (report, {"runs": ".", "keep": "kept"}, "--keep=kept: expected a name ending in .zip"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(module, flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UsageError) as error:
        module.main(**flags)
    assert line in str(error.value)
    assert not Path("output").exists()


def commands(script, **environment):
    done = subprocess.run(
        ["bash", script],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "DRY": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:])[1:] for line in done.stdout.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("smoke", ["", "1"])
@pytest.mark.parametrize("conditions", ["", "1"])
@pytest.mark.parametrize("domain", PAPERS)
def test_a_reproductions_flags_bind_and_its_paths_agree(domain, smoke, conditions):
    """Every file that a command reads is one that an earlier command wrote, and the student gets
    the paper's settings; with PAPER=1 also from SASRec as released and by the text's loss.
    """
    mains = {
        "train_sr_trad.py": train_sr_trad.main,
        "extract_emb.py": extract_emb.main,
        "finetune.py": finetune.main,
        "distill.py": distill.main,
        "datasets.process": process.main,
        "experiments.report": report.main,
    }
    written, bound = set(), []
    for words in commands(
        ROOT / f"experiments/domains/{domain}.sh", SEEDS="0 1", SMOKE=smoke, PAPER=conditions
    ):
        name, *rest = words[1:] if words[0] == "-m" else words
        flags = cli.bind(mains[name], rest)
        for place in ("sasrec", "teacher"):
            assert flags.get(place) is None or flags[place] in written, (place, flags[place])
        if name in ("finetune.py", "distill.py"):
            assert flags["item_table"] in written
        if name == "experiments.report":
            assert all(place.startswith(flags["runs"]) for place in written)
        else:
            written.add(flags.get("output_dir") or flags.get("item_table") or "output")
            written.discard("output")
        bound.append((name, flags))
    assert [name for name, _ in bound][-1] == "experiments.report"
    student = [flags for name, flags in bound if name == "distill.py"][-1]
    if conditions:
        assert student["block_reduction"] == "mean" and student["norm_form"] == "squared_l2"
        assert student["item_table"].endswith(
            "seed42/released_item.pkl" if smoke else "seed1/released_item.pkl"
        )
        assert student["teacher"].endswith("released_teacher")
    else:
        assert "block_reduction" not in student
    if smoke:
        assert student["domain_type"] == "demo"
    else:
        assert bound[0][0] == "datasets.process" and bound[0][1]["domain_type"] == domain
        paper = {
            "cloth": (3e-3, 1500, 50, 1.0),
            "movie": (1e-3, None, 50, 1.0),
            "music": (2e-3, 800, 100, 0.01),
            "sport": (2e-3, 2000, 50, 0.1),
        }
        assert (
            student["learning_rate"],
            student.get("max_steps"),
            student["warmup_steps"],
            student["cls_multiple_lambda"],
        ) == paper[domain]


@pytest.mark.parametrize("domain", ["beauty", "games", "toys"])
def test_our_own_domains_commands_bind(domain):
    bound = commands(ROOT / f"experiments/domains/{domain}.sh", SEEDS="0")
    mains = {"train_sr_trad.py": train_sr_trad.main, "extract_emb.py": extract_emb.main}
    mains |= {"finetune.py": finetune.main, "distill.py": distill.main}
    names = [words[0] for words in bound]
    start = ["train_sr_trad.py", "extract_emb.py", "finetune.py"]
    assert names[: len(start) + (domain != "toys")] == start[: domain != "toys"] + start
    assert names.count("distill.py") == {"beauty": 13, "games": 5, "toys": 5}[domain]
    for words in bound[:-1]:
        name, *rest = words[1:] if words[0] == "-m" else words
        flags = cli.bind(mains[name], rest)
        assert flags["data_path"].startswith("data/amazon")


@pytest.mark.parametrize("after", ["beauty_titles", "beauty_smollm2"])
def test_commands_after_beautys_bind_and_read_what_stands_there(after):
    own, drawn = (
        commands(ROOT / f"experiments/domains/{name}.sh", SEEDS="0 1 2")
        for name in (after, "beauty")
    )
    mains = {"train_sr_trad.py": train_sr_trad.main, "extract_emb.py": extract_emb.main}
    mains |= {"distill.py": distill.main, "finetune.py": finetune.main}
    mains |= {"experiments.report": report.main}
    mains |= {"experiments.bases": bases.main, "experiments.titles": titles.main}
    written = set()
    for words in drawn + own:
        name, *rest = words[1:] if words[0] == "-m" else words
        flags = cli.bind(mains[name], rest)
        read = [flags.get(place) for place in ("init_table", "sasrec", "model", "teacher")]
        read += [flags.get("item_table")] if name == "distill.py" else []
        assert {path for paths in read if paths for path in paths.split(",")} <= written
        written |= {flags.get("output_dir"), flags.get("item_table")}


def test_a_reproduction_without_its_raw_files_says_where_to_get_them(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "RAW": str(tmp_path)}
    done = subprocess.run(
        ["bash", ROOT / "experiments/domains/music.sh"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2 and re.search(
        r"error: neither data/music.csv nor .*CDs_and_Vinyl_5.json.gz is there; get it", done.stderr
    )


ROWS = {
    "SASRec": "SASRec",
    "4 layers": "E4SRec-like, 4 layers",
    "4 layers and SASRec's KL": "4 layers: CE + SASRec KL",
}


CHAIN = {
    "4 layers": "E4SRec-like, 4 layers",
    "8 layers and SASRec's KL, the teacher": "8 layers: CE + SASRec KL",
    "SLMRec 4 <- 8": "SLMRec 4 <- 8, from the teacher's adapter and head",
    "4 <- 8: logit KL, weight 3 at temperature 2": (
        "4 <- 8: logit KL, from the teacher's adapter and head"
    ),
}
CHAIN_OF_BOTH = {
    "4 <- 8: logit KL and SASRec's KL": (
        "4 <- 8: SASRec KL + logit KL, from the teacher's adapter and head"
    )
}
TWO = {
    "SASRec": "SASRec",
    "SASRec, items from titles at the start": "SASRec, items from a table at the start",
    "2 layers over two tables and their SASRecs' KL": (
        "2 layers: CE + SASRec KL, of 2 SASRecs, items from SASRec started from a table"
    ),
    "2 layers over four tables and their SASRecs' KL": (
        "2 layers: CE + SASRec KL, of 4 SASRecs, items from SASRec started from a table"
    ),
}
RELEASED = {
    "SASRec, first release: 1,100 steps at 1e-4": "SASRec, as released",
    "SASRec, later official script": "SASRec, as released later",
    "8 layers over its table, the teacher": "E4SRec-like, 8 layers",
    "4 layers": "E4SRec-like, 4 layers",
    "SLMRec 4 <- 8": "SLMRec 4 <- 8",
}
COLUMNS = ("sampled HR@10", "sampled MRR", "full HR@10", "full NDCG@10")


@pytest.mark.parametrize(
    "heading, kept, names, seeds",
    [
        ("## Beauty (", "beauty", ROWS, "01234"),
        ("## Toys (", "toys", ROWS, "01234"),
        ("## Games (", "games", ROWS, "01234"),
        ("### A chain of teachers", "chain/beauty", CHAIN, "01234"),
        ("### A chain of teachers", "chain/beauty", CHAIN_OF_BOTH, "01"),
        ("### Several tables in one student", "two_tables/beauty", TWO, "01234"),
        ("### The paper's own conditions", "released/beauty", RELEASED, "0"),
    ],
)
def test_the_page_of_results_says_what_the_kept_runs_say(heading, kept, names, seeds):
    """Rows of the page are the means over the seeds' lines of the CSV beside the kept runs."""
    section = (ROOT / "docs/results.md").read_text().split(heading)[1]
    with open(ROOT / f"docs/results/{kept}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for name, row in names.items():
        cells = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", section, re.M)[1].split(" | ")
        mine = [line for line in lines if line["row"] == row]
        assert sorted(line["seed"] for line in mine) == list(seeds)
        for shown, column in zip(cells[1:], COLUMNS, strict=True):
            mean = sum(float(line[column]) for line in mine) / len(mine)
            assert abs(float(shown) - mean) < 0.5001e-4, (name, column, mean)


@pytest.mark.slow
def test_a_finished_run_is_only_taken_for_what_it_is(inside, capsys):
    """The same command prints the results; other flags or files are refused."""
    common = cli.bind(finetune.main, SHORT.split()) | {"item_table": "output/demo/sasrec_item.pkl"}
    teacher = common | {"output_dir": "mine"}
    first = finetune.main(**teacher)
    stamp = Path("mine/results.json").stat().st_mtime_ns
    capsys.readouterr()
    assert finetune.main(**teacher) == first
    printed = capsys.readouterr().out
    assert "mine holds this command's finished run" in printed and "test sampled  HR@1" in printed
    assert Path("mine/results.json").stat().st_mtime_ns == stamp
    other = r"mine holds a finished run with other flags: --learning_rate=0.5 \(the run has 0.001\)"
    with pytest.raises(cli.UsageError, match=other):
        finetune.main(**teacher, learning_rate=0.5)
    student = common | {"teacher": "mine", "output_dir": "student"}
    first = distill.main(**student)
    assert distill.main(**student) == first
    finetune.main(**teacher, seed=7, overwrite=True)
    with pytest.raises(
        cli.UsageError, match="student holds a finished run from something else: teacher_sha256"
    ):
        distill.main(**student)
    with pytest.raises(cli.UsageError, match="mine holds a teacher run, not a student run"):
        distill.main(**student | {"output_dir": "mine"}, distill_lambda=0.0)
    with pytest.raises(cli.UsageError, match="item table not found: nowhere.pkl; extract_emb.py"):
        finetune.main(**teacher | {"item_table": "nowhere.pkl"}, seed=7)
    plain = common | OFF | {"output_dir": "plain"}
    distill.main(**plain, max_seq_length=20)
    assert distill.main(**plain, max_seq_length=20)["steps"] == 3
    with pytest.raises(cli.UsageError, match=r"--max_seq_length=30 \(the run has 20\)"):
        distill.main(**plain)  # 30 where it is not given
