"""The experiments: rows and their names, significance, the report, and the commands."""

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
from tests.conftest import OFF, ROOT, refused

INHERITED = {"base_model": "tiny", "max_seq_length": 30, "prompt_template_name": "alpaca"}
STUDENT = cli.defaults(distill.main) | INHERITED | {"llama_decoder_nums_teacher": 8}
FIRST_STEPS = ["train_sr_trad.py", "extract_emb.py", "finetune.py"]
PAPERS = ("cloth", "movie", "music", "sport")
TEACHER = cli.defaults(finetune.main)
RELEASED_SASREC = {"train_targets": "last", "init_std": 1.0}
COPIED = STUDENT | OFF | {"student_init": "teacher"}
ADAPTER = STUDENT | {"student_init": "adapter"}
TWO_LAYERS = STUDENT | {"llama_decoder_nums_student": 2, "distill_block": 2, "train_targets": "all"}
EXITS = TEACHER | {"exit_norm": True, "cls_multiple_lambda": 1.0}
SASREC_KL = {"sasrec_lambda": 3.0, "sasrec_temperature": 2.0}


@pytest.mark.parametrize(
    "step, flags, expected",
    [
        ("sasrec", {"train_targets": "all", "init_std": 0.02}, "SASRec"),
        ("sasrec", RELEASED_SASREC, "SASRec, as released"),
        ("sasrec", RELEASED_SASREC | {"max_seq_length": 50}, "SASRec, as released later"),
        ("sasrec", {"train_targets": "last", "init_std": 0.02}, "SASRec, one target per user"),
        ("sasrec", {"alpha": 0.7}, "BSARec, alpha 0.7"),
        ("teacher", EXITS, "8 layers: CE + L_ms, normed exits"),
        ("teacher", TEACHER, "E4SRec-like, 8 layers"),
        ("student", STUDENT, "SLMRec 4 <- 8"),
        ("student", STUDENT | OFF, "E4SRec-like, 4 layers"),
        ("student", COPIED, "4 layers: CE, from the teacher's layers"),
        ("student", STUDENT | {"norm_lambda": 0.0}, "4 <- 8: D_cos + L_ms"),
        ("student", STUDENT | {"distill_lambda": 0.0, "norm_lambda": 0.0}, "4 layers: CE + L_ms"),
        ("student", STUDENT | OFF | {"logit_lambda": 1.0}, "4 <- 8: logit KL"),
        ("student", STUDENT | OFF | SASREC_KL, "4 layers: CE + SASRec KL"),
        ("student", STUDENT | SASREC_KL, "SLMRec 4 <- 8 + SASRec KL"),
        ("student", STUDENT | {"exit_norm": True}, "SLMRec 4 <- 8, normed exits"),
        ("student", ADAPTER, "SLMRec 4 <- 8, from the teacher's adapter and head"),
        ("student", STUDENT | {"distill_mode": "online"}, "SLMRec 4 <- 8, online"),
        ("student", TWO_LAYERS, "SLMRec 2 <- 8, B = 2, every prefix"),
    ],
)
def test_rows_are_called_what_they_are(step, flags, expected):
    assert paper.label(step, flags) == expected


def test_every_row_of_the_ablation_binds_and_has_a_name_of_its_own():
    script, names = ROOT / "experiments/domains/ablation.sh", {}
    every = commands(script)
    assert [words[0] for words in every[:3]] == FIRST_STEPS
    for script_name, *rest in every[3:-1]:
        assert script_name == "distill.py"
        flags = cli.bind(distill.main, rest)
        depths = {"student_init": flags.get("student_init") or "base"}
        names[Path(flags["output_dir"]).name] = paper.label("student", STUDENT | flags | depths)
    assert len(set(names.values())) == len(names) == 24
    for name in ("ce", "cos", "cos_norm", "cos_ms", "slmrec"):
        assert names[name] in paper.PAPER["cloth"]
    some = commands(script, ROWS="ce last", DOMAIN="cloth", SEEDS="0 1")
    students = [cli.bind(distill.main, rest) for name, *rest in some if name == "distill.py"]
    expected = [f"seed{seed}/{name}" for seed in (0, 1) for name in ("ce", "last")]
    assert [s["output_dir"] for s in students] == [f"output/cloth/paper/{e}" for e in expected]


def report_of(root):
    return report.main(runs=str(root), resamples=50).read_text()


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
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
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


def fake_run(folder, flags=STUDENT, ranks=(1, 2), seed=0, domain="cloth", settings=(), **extra):
    """A finished run with the given test ranks under every protocol; a teacher's by its flags."""
    from utils.metrics import summarise

    folder.mkdir(parents=True)
    ranks, flags = np.array(ranks), flags | {"seed": seed}
    step = "student" if "llama_decoder_nums_student" in flags else "teacher"
    metrics = summarise(ranks, (1, 5, 10, 20))
    metrics = dict.fromkeys(("sampled", "full", "full_all"), metrics)
    found = {"seed": seed, "users": len(ranks), "test": metrics, "valid": metrics, "steps": 2}
    found |= {"parameters": 10, "trainable_parameters": 4, "best_step": 2, "train_seconds": 1.5}
    found |= {"inference_users_per_second": 7.0, "random_base": True}
    found |= {"weights_sha256": "/".join(folder.parts[-2:])} | extra
    layers = [*range(flags.get("llama_decoder_nums", flags.get("llama_decoder_nums_student")))]
    config = {"step": step, "domain": domain, "data_sha256": "d" * 64, "flags": flags}
    config["model"] = {"layers": layers}
    if step == "student" and not paper.plain_ce(flags):
        config["teacher_sha256"] = f"seed{seed}/teacher"
    (folder / "config.json").write_text(json.dumps(config | dict(settings)))
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 2, "ce": 3, "total": 3}\n')
    np.savez(folder / "ranks.npz", test_sampled=ranks, test_full=ranks)


def test_another_item_table_or_another_sasrec_more_makes_another_row(tmp_path):
    flags = STUDENT | OFF | {"sasrec_lambda": 3.0}
    made = {"one": {"sasrec_sha256": "a"}, "two": {"sasrec_sha256": "a,b"}}
    made["titles"] = made["one"] | {"items_from": "titles", "table_sha256": "t"}
    made["other titles"] = made["titles"] | {"table_sha256": "u"}
    for sha in "xy":  # of tables that no step of ours made
        made[sha] = made["one"] | {"items_from": None, "table_sha256": sha}
    fake_run(tmp_path / "later", flags | {"init_from": "run"}, settings=made["one"])
    for name, settings in made.items():
        fake_run(tmp_path / name, flags, settings=settings)
    runs, _ = results.read_runs(tmp_path)
    found = {run.name: run.label for run in runs}
    assert found["two"] == found["one"] + ", of 2 SASRecs"
    assert found["titles"] == found["one"] + ", items from titles"
    assert found["later"] == found["one"] + ", started from another run"
    assert len({run.key for run in runs}) == 7
    for sha, alpha in (("a", 0.0), ("b", 0.7)):  # which SASRec taught, by its weights
        made = cli.defaults(train_sr_trad.main) | {"alpha": alpha, "seed": 0}
        made = {"step": "sasrec", "flags": made}
        fake_run(tmp_path / f"of {sha}", TEACHER, settings=made, weights_sha256=sha)
    fake_run(tmp_path / "by b", flags, settings={"sasrec_sha256": "b"}, seed=1)
    assert all(len(row.runs) == 1 for row in rows_of(tmp_path)[0].values())


def test_a_term_of_another_branch_is_no_seed_of_the_plain_row(tmp_path):
    fake_run(tmp_path / "plain", STUDENT | OFF, settings={"teacher": None})
    fake_run(tmp_path / "without", STUDENT | OFF | {"toy_lambda": 0.0}, seed=1)
    fake_run(tmp_path / "term", STUDENT | OFF | {"toy_lambda": 0.5, "max_steps": 9}, seed=2)
    labels, _ = rows_of(tmp_path)
    plain = "E4SRec-like, 4 layers"
    term = labels[f"{plain}, toy_lambda=0.5 of other code"]
    assert [*labels[plain].runs] == [0, 1] and [*term.runs] == [2]
    page = report.main(runs=str(tmp_path), resamples=10).read_text()
    settings = page.split("### Settings")[1].partition("###")[0]
    assert settings.count("toy_lambda") == 2 and "max_steps=9, toy_lambda=0.5 |" in settings


def test_the_report_over_seeds_beside_the_paper(tmp_path):
    teacher = TEACHER | {"domain_type": "cloth"}
    for seed, ranks in ((0, [1, 1, 2, 20]), (1, [1, 2, 4, 20])):
        fake_run(tmp_path / f"seed{seed}/slmrec", STUDENT, ranks, seed=seed)
        fake_run(tmp_path / f"seed{seed}/ce", STUDENT | OFF, [2, 2, 4, 20], seed=seed)
        fake_run(tmp_path / f"seed{seed}/teacher", teacher, [1, 1, 1, 1], seed=seed)
    # the same as ce of seed 0
    fake_run(tmp_path / "four", teacher | {"llama_decoder_nums": 4}, [2, 2, 4, 20])
    fake_run(tmp_path / "slow", STUDENT | {"learning_rate": 1e-5}, [20, 20, 20, 20])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"step": "student"}')
    odd = ("odd", '{"step": ["a"]}', "{}"), ("list", "[1]", "")
    for name, config, found in (*odd, ("bare", '{"step": "student"}', '{"steps": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "results.json").write_text(found)
    (tmp_path / "seed1/ce/metrics.jsonl").write_text('{"event": "train", "st')
    (tmp_path / "seed1/ce/ranks.npz").write_bytes(b"torn")
    text = report_of(tmp_path)
    assert text == report_of(tmp_path)
    above = text.split("### Significance")[0].splitlines()
    table = [line.strip("|").split("|") for line in above if line.startswith("| ")]
    lines = {cells[0].strip(): [cell.strip() for cell in cells] for cells in table}
    # HR@1: 2/4 and 1/4; MRR: (1 + 1 + 1/2 + 1/20)/4 = .6375, (1 + 1/2 + 1/4 + 1/20)/4 = .45
    assert lines["SLMRec 4 <- 8"][1:3] == ["0, 1", "0.3750 ± 0.1768"]
    assert lines["SLMRec 4 <- 8"][7] == "0.5437 ± 0.1326"
    assert lines["SLMRec 4 <- 8"][-4:] == ["0.1669", "0.1947", "0.1807", "0.1874"]
    assert lines["E4SRec-like, 4 layers"][1] == lines["E4SRec-like, 8 layers"][1] == "0, 1"
    assert lines["SASRec"][1:3] == ["not run", "-"] and lines["SASRec"][-4] == "0.1308"
    assert lines["SLMRec 4 <- 8 [learning_rate=1e-05]"][1] == "0"
    assert lines["SASRec, as released"][-4] == "0.1308"
    lacks = "bare: its config.json or results.json lacks something"
    for said in ("random base", "broken is unfinished", lacks, "list/config.json: damaged"):
        assert said in text and "has the flags and the seed of" in text
    # the ranks of one seed are torn: the other one is compared
    pair = next(line for line in text.splitlines() if "| SLMRec 4 <- 8 | E4SRec-like, 4 l" in line)
    assert pair.endswith("| 0 |")
    assert "4 layers: ranks.npz of seed1/slmrec or seed1/ce is missing or torn" in text
    shutil.copyfile(tmp_path / "seed0/ce/ranks.npz", tmp_path / "seed1/ce/ranks.npz")
    text = report_of(tmp_path)
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
            fake_run(tmp_path / domain / name, STUDENT | weights, domain=domain)
    texts = {domain: report_of(tmp_path / domain) for domain in ("games", "cloth")}
    row = "| 4 <- 8: D_cos + L_ms | not run |"
    assert row in texts["cloth"] and row not in texts["games"]
    (named,) = (line for line in texts["games"].splitlines() if line.startswith("Not run: "))
    assert "SASRec, as released; SASRec; E4SRec-like, 8 layers; " in named and named.endswith(".")


def rows_of(root):
    runs, notes = results.read_runs(root)
    return {row.label: row for row in results.by_domain(runs, notes)["cloth"]}, notes


def test_no_row_is_lost_and_none_is_mixed(tmp_path):
    for name, norm in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        fake_run(tmp_path / name / "seed0/slmrec", STUDENT | {"norm_lambda": norm})
    labels, _ = rows_of(tmp_path)
    named = (f"SLMRec 4 <- 8 [norm_lambda=0.{n}]" for n in (2, 3))
    assert set(labels) == {"SLMRec 4 <- 8", *named}
    for name in ("a", "b", "c"):
        shutil.rmtree(tmp_path / name)
    # students of equal flags whose teachers differ are not seeds of one row
    for seed, rate in ((0, 1e-3), (1, 1e-5)):
        fake_run(tmp_path / f"seed{seed}/teacher", TEACHER | {"learning_rate": rate}, seed=seed)
        fake_run(tmp_path / f"seed{seed}/slmrec", STUDENT, seed=seed)
    labels, _ = rows_of(tmp_path)
    deep, student = "E4SRec-like, 8 layers", "SLMRec 4 <- 8"
    others = f"{deep} [learning_rate=1e-05]", f"{student} [seed1/slmrec]"
    assert set(labels) == {deep, student, *others}
    shutil.rmtree(tmp_path / "seed1")
    fake_run(tmp_path / "two/slmrec", STUDENT, seed=1, settings={"bf16": True})  # no teacher's run
    assert "SLMRec 4 <- 8 [two/slmrec]" in rows_of(tmp_path)[0]


def test_the_t_test_by_hand():
    # mean and spread are 2: t = sqrt(3); of two degrees of freedom p = 1 - t / sqrt(2 + t^2)
    differences = np.array([-2.0, 0.0, 2.0]) + 2.0
    both = [significance.t_test(sign * differences) for sign in (1, -1)]
    assert both == pytest.approx([1 - math.sqrt(3 / 5)] * 2)
    assert [significance.t_test(np.full(3, same)) for same in (0.0, 0.25)] == [1.0, 0.0]


def test_what_cannot_be_paired_is_not(tmp_path):
    fake_run(tmp_path / "seed0/slmrec", settings={"table_sha256": "other"})
    fake_run(tmp_path / "seed0/ce", STUDENT | OFF, settings={"table_sha256": "one"})
    labels, notes = rows_of(tmp_path)
    assert significance.compare(list(labels.values()), 10, notes) == []
    assert len(notes) == 1
    assert notes[0].endswith(": seed0/slmrec and seed0/ce use different item tables")


def test_other_candidates_are_a_table_of_their_own(tmp_path):
    for name, flags in (("a", {}), ("b", {"num_candidates": 99})):
        fake_run(tmp_path / name, STUDENT | flags)
    runs, notes = results.read_runs(tmp_path)
    assert list(results.by_domain(runs, notes)) == ["cloth", "cloth (candidates 99, seed 42)"]
    for name, base in (("c", "tiny"), ("d", "./x")):
        fake_run(tmp_path / name, STUDENT | OFF | {"base_model": base})
    assert {f"E4SRec-like, 4 layers{of}" for of in ("", ", base ./x")} < {*rows_of(tmp_path)[0]}


def test_tables_of_other_sasrecs_are_rows_of_their_own(tmp_path):
    """A table of SASRec as released, and ours: the same flags of distill.py."""
    released = {"train_targets": "last", "init_std": 1.0}
    for name, flags in (("a", {"train_targets": "all"}), ("b", released)):
        settings = {"items_from": "SASRec", "items_flags": flags}
        fake_run(tmp_path / name, STUDENT, settings=settings)
    settings["items_made_by"] = [{"init_table": "a"}]
    fake_run(tmp_path / "c", STUDENT, settings=settings, seed=1)
    later = {"items_flags": released | {"patience": None}, "teacher": None}  # a flag's default
    fake_run(tmp_path / "d", STUDENT, settings={"items_from": "SASRec"} | later, seed=2)
    labels, notes = rows_of(tmp_path)
    plain = "SLMRec 4 <- 8, items from SASRec, as released"
    assert [*labels[plain].runs] == [0, 2]
    assert sorted(labels) == ["SLMRec 4 <- 8", plain, f"{plain} [c]"]
    assert not notes


def test_rows_are_compared_with_their_like(tmp_path):
    teacher = TEACHER
    for seed in (0, 1):
        fake_run(tmp_path / f"seed{seed}/teacher", teacher, [2, 2], seed=seed)
        fake_run(tmp_path / f"seed{seed}/ce", STUDENT | OFF, [4, 4], seed=seed)
    fake_run(tmp_path / "search", teacher | {"learning_rate": 1e-5}, [1, 1], seed=7)
    every = {"train_targets": "all"}
    fake_run(
        tmp_path / "seed0/slmrec_all", STUDENT | every, [1, 1], settings={"teacher_sha256": None}
    )
    fake_run(tmp_path / "seed0/ce_all", STUDENT | OFF | every, [2, 2])
    labels, notes = rows_of(tmp_path)
    found = significance.compare(list(labels.values()), 10, notes)
    deep, four, every = "E4SRec-like, 8 layers", "E4SRec-like, 4 layers", ", every prefix"
    assert {(*line[:3], line[-1]) for line in found} == {
        (four, deep, "-0.2500", "0, 1"),
        (f"SLMRec 4 <- 8{every}", four + every, "+0.5000", "0"),
        (four + every, four, "+0.2500", "0"),
    }
    assert f"{deep} [learning_rate=1e-05] against {deep}: no seed in common" in notes


def test_older_runs_without_a_metric_and_a_runs_own_folder_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SAMPLED", (*report.SAMPLED, "MAP@10"))
    flags = STUDENT | {"block_map": "2:4,4:8"}
    fake_run(tmp_path / "one", flags)
    path = tmp_path / "one/results.json"
    found = json.loads(path.read_text())
    found["test"]["sampled"]["MAP@10"] = 0.75
    path.write_text(json.dumps(found))
    fake_run(tmp_path / "older", STUDENT)
    lines = report_of(tmp_path).splitlines()
    place = 1 + len(report.SAMPLED)
    rows = {line.split(" | ")[0]: line.split(" | ")[place] for line in lines if " | 0 | " in line}
    assert rows["| SLMRec 4 <- 8"] == "-"
    assert rows["| SLMRec 4 <- 8, blocks 2:4,4:8"] == "0.7500"
    assert "SLMRec 4 <- 8, blocks" in report.main(runs=str(tmp_path / "one")).read_text()


def test_a_teacher_is_found_by_its_weights_and_other_depths_have_their_tables(tmp_path):
    depths = {"llama_decoder_nums_student": 1, "llama_decoder_nums_teacher": 32}
    deep = STUDENT | depths | {"distill_block": 1}
    fake_run(tmp_path / "t/deep", TEACHER | {"llama_decoder_nums": 32}, [1, 1], weights_sha256="w")
    fake_run(tmp_path / "s/slmrec", deep, [2, 2], settings={"teacher_sha256": "w"})
    fake_run(tmp_path / "s/ce", deep | OFF, [4, 4])
    labels, notes = rows_of(tmp_path)
    found_pairs = [line[:3] for line in significance.compare(list(labels.values()), 10, notes)]
    assert ["SLMRec 1 <- 32, B = 1", "E4SRec-like, 1 layer", "+0.2500"] in found_pairs
    assert ["SLMRec 1 <- 32, B = 1", "E4SRec-like, 32 layers", "-0.5000"] in found_pairs


def test_what_the_report_reads_is_kept(tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    fake_run(runs / "seed0/slmrec", STUDENT, [1, 300], domain="x")
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
    with refused("x.csv exists; --overwrite replaces it"):
        report.main(runs=str(runs), keep=archive, resamples=10)
    report.main(runs=str(runs), keep=archive, resamples=10, overwrite=True)
    assert Path(archive).read_bytes() == before
    tables = plain.partition("![metrics]")[0]
    again = report.main(runs=str(kept), resamples=10).read_text()
    assert again.startswith(tables)  # from the archive as from the folder
    Path(archive).write_bytes(before[:-9])
    assert "x.zip: damaged (File is not a zip file)" in results.read_runs(kept, tmp_path)[1]


def test_wrong_requests_are_refused_before_any_work(here):
    for flags, line in (
        ({"runs": "nowhere"}, "--runs=nowhere: no such folder"),
        ({"runs": "."}, "no finished run below it"),
        ({"runs": ".", "keep": "kept"}, "--keep=kept: expected a name ending in .zip"),
    ):
        with refused(line):
            report.main(**flags)
    assert not Path("output").exists()


def commands(script, **environment):
    environment |= {"PATH": "/usr/bin:/bin", "DRY": "1"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:])[1:] for line in done.stdout.splitlines() if line.startswith("+ ")]


MAINS = {"train_sr_trad.py": train_sr_trad.main, "extract_emb.py": extract_emb.main}
MAINS |= {"finetune.py": finetune.main, "distill.py": distill.main}
MAINS |= {"datasets.process": process.main, "experiments.report": report.main}
MAINS |= {"experiments.bases": bases.main, "experiments.titles": titles.main}


def bound(words):
    """The name of a command of ours and its flags."""
    name, *rest = words[1:] if words[0] == "-m" else words
    return name, cli.bind(MAINS[name], rest)


@pytest.mark.parametrize("smoke", ["", "1"])
@pytest.mark.parametrize("conditions", ["", "1"])
@pytest.mark.parametrize("domain", PAPERS)
def test_a_reproductions_flags_bind_and_its_paths_agree(domain, smoke, conditions):
    """Every file that is read was written before; the student has the paper's settings."""
    script, written = ROOT / f"experiments/domains/{domain}.sh", set()
    every = [*map(bound, commands(script, SEEDS="0 1", SMOKE=smoke, PAPER=conditions))]
    for name, flags in every:
        for place in ("sasrec", "teacher"):
            assert flags.get(place) is None or flags[place] in written, (place, flags[place])
        if name in ("finetune.py", "distill.py"):
            assert flags["item_table"] in written
        if name == "experiments.report":
            assert all(place.startswith(flags["runs"]) for place in written)
        else:
            written.add(flags.get("output_dir") or flags.get("item_table") or "output")
            written.discard("output")
    assert every[-1][0] == "experiments.report"
    student = [flags for name, flags in every if name == "distill.py"][-1]
    if conditions:
        assert student["block_reduction"] == "mean" and student["norm_form"] == "squared_l2"
        assert student["item_table"].endswith(f"seed{42 if smoke else 1}/released_item.pkl")
        assert student["teacher"].endswith("released_teacher")
    else:
        assert "block_reduction" not in student
    if smoke:
        assert student["domain_type"] == "demo"
    else:
        assert every[0][0] == "datasets.process" and every[0][1]["domain_type"] == domain
        paper = {
            "cloth": (3e-3, 1500, 50, 1.0),
            "movie": (1e-3, None, 50, 1.0),
            "music": (2e-3, 800, 100, 0.01),
            "sport": (2e-3, 2000, 50, 0.1),
        }
        names = ("learning_rate", "max_steps", "warmup_steps", "cls_multiple_lambda")
        assert tuple(student.get(name) for name in names) == paper[domain]


@pytest.mark.parametrize("domain", ["beauty", "games", "toys"])
def test_our_own_domains_commands_bind(domain):
    every = commands(ROOT / f"experiments/domains/{domain}.sh", SEEDS="0")
    names, start = [words[0] for words in every], FIRST_STEPS
    assert names[: len(start) + (domain != "toys")] == start[: domain != "toys"] + start
    assert names.count("distill.py") == {"beauty": 15, "games": 8, "toys": 8}[domain]
    assert all(bound(words)[1]["data_path"].startswith("data/amazon") for words in every[:-1])


@pytest.mark.parametrize("after", ["beauty_titles", "beauty_smollm2"])
def test_commands_after_beautys_bind_and_read_what_stands_there(after):
    scripts = (ROOT / f"experiments/domains/{name}.sh" for name in ("beauty", after))
    written = set()
    for name, flags in (bound(words) for s in scripts for words in commands(s, SEEDS="0 1 2")):
        read = [flags.get(place) for place in ("init_table", "sasrec", "model", "teacher")]
        read += [flags.get("item_table")] if name == "distill.py" else []
        assert {path for paths in read if paths for path in paths.split(",")} <= written
        written |= {flags.get("output_dir"), flags.get("item_table")}


END = ", from the teacher's adapter and head"
SASREC, PLAIN = {"SASRec": "SASRec"}, {"4 layers": "E4SRec-like, 4 layers"}
ROWS = SASREC | PLAIN | {"4 layers and SASRec's KL": "4 layers: CE + SASRec KL"}
SLMREC = {"SLMRec 4 <- 8": f"SLMRec 4 <- 8{END}"}
SOFTMAX = {"4 <- 8: logit KL, weight 3 at temperature 2": f"4 <- 8: logit KL{END}"}
TEACHER_KL = {"8 layers and SASRec's KL, the teacher": "8 layers: CE + SASRec KL"}
CHAIN = TEACHER_KL | PLAIN | SLMREC | SOFTMAX
OVER = "2 layers over {} tables and their SASRecs' KL", "2 layers: CE + SASRec KL, of {} SASRecs"
SIDE = ", items from {} SASRecs, {} started from a table"
TWO = {
    OVER[0].format(w): OVER[1].format(n) + SIDE.format(n, n - 1)
    for w, n in (("two", 2), ("four", 4))
}
TWO |= {"SASRec, items from titles at the start": "SASRec, items from a table at the start"}
FROM_FOUR = "2 layers: CE + SASRec KL, every prefix, of 4 SASRecs, items from 4 SASRecs"
FOUR = {OVER[0].format("four") + ", every prefix": FROM_FOUR}
EVERY = {"the same, every prefix a sample, five epochs": f"{FROM_FOUR}, 3 started from a table"}
TITLED = SIDE.format(2, 1)
TAUGHT = {"8 layers and the KL of both, the teacher": "8 layers: CE + SASRec KL, of 2 SASRecs"}
OVER_TWO = {n: r + TITLED for n, r in (PLAIN | TAUGHT | SLMREC).items()} | SASREC
TUNED = {"SLMRec 4 <- 8, weights 300, .1, .1": f"SLMRec 4 <- 8, normed exits{END}{TITLED}"}
TUNED_CHAIN = {n: r.removesuffix(TITLED) for n, r in TUNED.items()} | PLAIN | TEACHER_KL
LAYERS = f"SLMRec 4 <- 8, normed exits, from the teacher's layers{TITLED}"
OVER_TWO |= TUNED | {"the same, from the teacher's layers": LAYERS}
TUNED_CHAIN |= {"the same, from the teacher's layers": LAYERS.removesuffix(TITLED)}
OVER_TWO |= {[*SOFTMAX][0].replace("3", "10"): f"4 <- 8: logit KL{END}{TITLED}"}
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
        ("### The chain with tuned weights", "chain_one_table/beauty", TUNED_CHAIN, "01234"),
        ("### The chain on Toys", "chain_one_table/toys", TUNED_CHAIN, "012"),
        ("### The chain on Games", "chain_one_table/games", TUNED_CHAIN | SASREC, "0123"),
        ("### Several tables in one student", "four_tables/beauty", TWO | EVERY, "01234"),
        ("## Toys (", "four_tables/toys", FOUR, "0123"),
        ("### The chain over two tables", "chain_two_tables/beauty", OVER_TWO, "01234"),
        ("### The paper's own conditions", "released/beauty", RELEASED, "01"),
    ],
)
def test_the_page_of_results_says_what_the_kept_runs_say(heading, kept, names, seeds):
    """Rows of the page are the means over the seeds' lines of the CSV beside the kept runs."""
    section = (ROOT / "docs/results.md").read_text().split(heading)[1]
    with open(ROOT / f"docs/results/{kept}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for name, row in names.items():
        cells = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", section, re.M)[1].split(" | ")
        mine = [
            line for line in lines if line["row"].partition(", items from SASRec, as")[0] == row
        ]
        assert sorted(line["seed"] for line in mine) == list(seeds)
        for shown, column in zip(cells[1:], COLUMNS, strict=True):
            mean = sum(float(line[column]) for line in mine) / len(mine)
            assert abs(float(shown) - mean) < 0.5001e-4, (name, column, mean)
