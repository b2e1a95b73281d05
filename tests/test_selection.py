"""Which layers are kept, and a student that starts from its teacher's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import distill
import finetune
from engine import checkpoint, cli
from engine.errors import UsageError
from models.selection import block_map, select_layers
from tests.conftest import OFF, SHORT, refused
from utils.flags import LLM


def test_which_layers_each_rule_keeps():
    assert select_layers([*range(6)], 2, LLM(layer_selection="interval")) == [0, 2]
    assert select_layers([0, 2, 4, 6], 2, LLM(layer_selection="last")) == [4, 6]


def test_block_ends_of_both_sides():
    assert block_map(4, 8, 4) == ([1, 2, 3, 4], [2, 4, 6, 8])
    assert block_map(4, 8, 2) == ([2, 4], [4, 8])
    assert block_map(4, 8, 1) == ([4], [8])
    assert block_map(4, 8, 4, "1:2,3:7,4:8") == ([1, 3, 4], [2, 7, 8])
    assert block_map(3, None, 3) == ([1, 2, 3], [1, 2, 3])  # exits alone, without a teacher
    assert block_map(3, None, 4, "2:4,3:8") == ([2, 3], [4, 8])


def test_a_block_map_that_does_not_fit_is_refused():
    for pairs, line in (
        (None, "--distill_block=3 does not divide llama_decoder_nums_student 4 (4 % 3 = 1); use"),
        (None, "use one of 1, 2, 4, or name their ends, as --block_map 2:4,4:8"),
        ("2:4,3:8", "expected ascending pairs student:teacher that end with 4:8"),
        ("0:4,4:8", "expected ascending pairs"),
    ):
        with refused(line):
            block_map(4, 8, 3, pairs)
    with refused("llama_decoder_nums_teacher 8 (8 % 3 = 2); use one of 1, or name their ends, as"):
        block_map(3, 8, 3)
    assert block_map(3, 8, 3, "1:4,3:8") == ([1, 3], [4, 8])  # what it offers


def test_exits_alone_ask_for_no_teachers_layers_and_a_repeat_may_have_a_teacher(inside):
    alone = {"distill_lambda": 0, "norm_lambda": 0, "student_init": "base"}
    shape = {"llama_decoder_nums_student": 3, "distill_block": 3}
    result = distill.main(**SHORT, **alone, **shape, output_dir="alone")
    again = {"eval_only": True, "llama_decoder_nums_student": 3, "output_dir": "alone"}
    assert distill.main(**again)["test"] == result["test"]
    words = ["--config=alone", "--distill_lambda=1", "--distill_block=1", "--output_dir=taught"]
    distill.main(**cli.bind(distill.main, words))
    flags = json.loads(Path("taught/config.json").read_text())["flags"]
    assert flags["llama_decoder_nums_teacher"] == 8


def test_a_student_resumes_without_its_teachers_weights(inside, monkeypatch):
    """Live where its states were cached, then from the cache where the weights were removed."""
    whole = distill.main(**SHORT, output_dir="whole")["test"]
    with monkeypatch.context() as patch:
        patch.setattr("utils.evaluation.finish", lambda *_, **__: None)  # it died before
        distill.main(**SHORT, output_dir="cut")
        distill.main(**SHORT, teacher_cache="off", output_dir="cut")
    shutil.rmtree("output/demo/teacher/best")
    assert distill.main(**SHORT, output_dir="cut")["test"] == whole


def test_an_edited_block_map_never_meets_old_states(inside, capsys):
    """Row 32 of the second catalogue: the ends of both sides are in config.json and the cache."""
    still = SHORT | {"log_steps": 1}
    equal = distill.main(**still, output_dir="equal")
    capsys.readouterr()
    pairs = distill.main(**still, block_map="1:1,4:8", output_dir="pairs")
    assert "teacher states: none in" in capsys.readouterr().out
    model = json.loads(Path("pairs/config.json").read_text())["model"]
    assert (model["block_ends"], model["teacher_block_ends"]) == ([1, 4], [1, 8])
    assert pairs["valid"] != equal["valid"]
    with pytest.raises(UsageError, match="--block_map=2:2,4:8 .the run has 1:1,4:8."):
        distill.main(**still, block_map="2:2,4:8", output_dir="pairs")
    assert distill.main(eval_only=True, output_dir="pairs")["test"] == pairs["test"]


def test_what_does_not_fit_is_named():
    for selection, kept, line in (
        ("0,2", 3, "--layer_selection=0,2: expected 3 ascending numbers of decoder layers"),
        ("2,0", 2, "--layer_selection=2,0: expected 2 ascending numbers"),
        ("1,1", 2, "--layer_selection=1,1: expected 2 ascending numbers"),
        ("[0, 8]", 2, "the base checkpoint has 0 to 7, 8 layers counted from 0"),
        ("last", 9, "9 decoder layers asked for, the base checkpoint has 8 layers"),
    ):
        with refused(line):
            select_layers([*range(8)], kept, LLM(layer_selection=selection))


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_student_starts_where_the_teachers_layers_are(inside, strategy):
    """A learning rate of almost nothing leaves the start visible in the checkpoint."""
    finetune.main(**SHORT, train_strategy=strategy, output_dir="t")
    still = SHORT | {"learning_rate": 1e-12, "warmup_steps": 0, "train_strategy": strategy}
    still |= {"teacher": "t", "student_init": "teacher"}
    result = distill.main(**still, layer_selection="1,3,5,7", output_dir="s")
    teacher, student = checkpoint.load("t/best")[0], checkpoint.load("s/best")[0]
    inner = "mlp.up_proj.weight" if strategy == "full" else "mlp.up_proj.lora_A.default.weight"
    name = "decoder.llama.layers.{}." + inner
    pairs = [(name.format(mine), name.format(own)) for mine, own in enumerate([1, 3, 5, 7])]
    for mine, own in [*pairs, ("adapter.weight", "adapter.weight")]:
        torch.testing.assert_close(student[mine], teacher[own], atol=1e-8, rtol=0)
    assert json.loads(Path("s/config.json").read_text())["model"]["layers"] == [1, 3, 5, 7]
    assert distill.main(eval_only=True, output_dir="s")["test"] == result["test"]
    distill.main(**still, **OFF, layer_selection="last", output_dir="ce")
    assert json.loads(Path("ce/config.json").read_text())["model"]["layers"] == [4, 5, 6, 7]


def recorded_start(run):
    return json.loads(Path(run, "config.json").read_text())["flags"]["student_init"]


def test_a_start_from_the_teachers_ends_keeps_the_bases_layers(inside):
    """A learning rate of almost nothing leaves the start visible in the checkpoint."""
    still = SHORT | {"learning_rate": 1e-12, "warmup_steps": 0}
    of_base = distill.main(**still, student_init="base", output_dir="base")
    distill.main(**still, output_dir="ends")  # the default
    assert recorded_start("ends") == "adapter"
    assert distill.main(**still, student_init="base", output_dir="base") == of_base
    with pytest.raises(UsageError, match="--student_init=adapter .the run has base.; choose"):
        distill.main(**still, output_dir="base")
    for name, more in (("ce", OFF), ("init", {"init_from": "base"})):
        distill.main(**still, **more, output_dir=name)
        assert recorded_start(name) == "base"
    teacher = checkpoint.load("output/demo/teacher/best")[0]
    base, ends = checkpoint.load("base/best")[0], checkpoint.load("ends/best")[0]
    assert set(base) == set(ends)
    for name, value in ends.items():
        taken = name.startswith(("adapter.", "head."))
        source = teacher if taken else base
        torch.testing.assert_close(value, source[name], atol=1e-8, rtol=0)
    assert not torch.allclose(base["adapter.weight"], teacher["adapter.weight"], atol=1e-3)
    up = "decoder.llama.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(ends[up], teacher[up], atol=1e-4)


def test_starting_from_a_teacher_refuses_what_cannot_be(inside):
    copy = {"student_init": "teacher"}
    with refused("=teacher starts from a trained teacher: give base, or --distill_mode=offline"):
        distill.main(**SHORT, **copy, distill_mode="online", overwrite=True)
    finetune.main(**SHORT, llama_decoder_nums=4, output_dir="t")
    with refused("the teacher has 0 to 3, 4 layers"):
        distill.main(**SHORT, **copy, teacher="t", layer_selection="1,3,5,7", output_dir="s")
    two = {"llama_decoder_nums_student": 2, "distill_block": 2, "layer_selection": "1,3"}
    distill.main(**SHORT, **two, distill_mode="online", output_dir="o")
    assert json.loads(Path("o/config.json").read_text())["model"]["layers"] == [1, 3]


def test_a_start_from_the_teachers_layers_needs_its_lora(inside):
    finetune.main(**SHORT, train_strategy="lora", output_dir="t")
    flags = {"teacher": "t", "train_strategy": "lora", "student_init": "teacher"}
    with refused("--student_init=teacher: the teacher was trained with lora_alpha 16, not 64"):
        distill.main(**SHORT, **flags, lora_alpha=64, output_dir="s")
