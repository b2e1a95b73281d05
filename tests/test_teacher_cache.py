"""The frozen teacher's states on disk: those of the teacher itself, whole or absent, its own."""

import errno
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import finetune
from datasets.sequences import Samples
from engine import checkpoint, tensor_cache
from engine.errors import UsageError
from models import teachers
from models.losses import Output
from tests.conftest import SHORT, hashes, log_of, refused, small_model

CPU = torch.device("cpu")


def samples(n=50, n_items=23, slots=8):
    rng = np.random.default_rng(0)
    length = rng.integers(1, 12, n)
    end = np.cumsum(length + 1) - 1
    items = rng.integers(0, n_items, end[-1] + 1).astype(np.int32)
    return Samples(SimpleNamespace(items=items, n_items=n_items), end, length, slots)


@pytest.mark.usefixtures("float64_norm")
@pytest.mark.parametrize("batch_size", [7, 64])
def test_cached_outputs_are_the_live_ones_in_whatever_batches(tmp_path, batch_size):
    data = samples()
    encode = small_model(layers=4, n_blocks=2, seed=9).requires_grad_(False).encoder()
    cached = tensor_cache.open_or_build(tmp_path, {"a": 1}, lambda: encode, data, batch_size)
    again = tensor_cache.open_or_build(tmp_path, {"a": 1}, None, data, batch_size)  # not loaded
    for rows in np.random.default_rng(1).permutation(len(data)).reshape(5, 10):
        live = encode(data.histories(rows))._asdict()
        for name, found in cached.rows(rows, CPU).items():
            torch.testing.assert_close(found, live.pop(name), atol=1e-12, rtol=1e-10)
            assert torch.equal(found, again.rows(rows, CPU)[name])
        assert not live


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_bit_for_bit_in_their_dtype_and_without_exits(tmp_path, dtype):
    data = samples(n_items=10**6)  # all histories differ
    user, states = torch.randn(50, 3).to(dtype), torch.randn(50, 2, 4).to(dtype)
    where = {tuple(history): i for i, history in enumerate(data.histories(np.arange(50)).tolist())}

    def encode(history):
        rows = [where[tuple(row)] for row in history.tolist()]
        return Output(user[rows], states[rows], user.new_empty(len(rows), 0, 3))

    assert len(where) == 50
    kept = tensor_cache.open_or_build(tmp_path, {}, lambda: encode, data, 8)
    rows = np.array([3, 49, 0, 3])
    expected = {"user": user[rows], "states": states[rows], "exits": user.new_empty(4, 0, 3)}
    found = kept.rows(rows, CPU)
    assert list(found) == list(expected)
    for name, given in found.items():
        assert given.dtype == dtype and torch.equal(given, expected[name])


def test_a_field_that_a_teacher_does_not_have_is_not_stored(tmp_path):
    """As an added field of Output with the default None, where SASRec is the teacher."""
    data = samples()

    def encode(history):
        return Output(history[:, -1:].float(), None, history[:, None, :0].float())

    found = tensor_cache.open_or_build(tmp_path, {}, lambda: encode, data, 8).rows([0, 1], CPU)
    assert list(found) == ["user", "exits"]


def test_an_edit_of_the_code_that_computes_states_makes_other_states(tmp_path):
    path = tmp_path / "decoder.py"
    hashes = []
    for text in ("mean", "sum", "mean"):
        path.write_text(text)
        hashes.append(teachers._code(path))
    assert hashes[0] == hashes[2] != hashes[1]
    names = {path.name for path in teachers.LLM_CODE}  # all that stands between a file and a state
    assert names >= {"sequences.py", "base.py", "packed.py", "llm4rec.py", "decoder.py", "lora.py"}


def made(tmp_path, data, identity=None, encode=None, calls=None):
    def teacher():
        if calls is not None:
            calls.append(1)
        return encode or plain

    def plain(history):
        history = history.float()
        return Output(history[:, -1:], history[:, None], history[:, None, :0])

    return tensor_cache.open_or_build(tmp_path, identity or {"teacher": "one"}, teacher, data, 8)


SPOILT = [
    ("states.bin", lambda b: b[:-1]),
    ("user.bin", None),
    ("meta.json", lambda b: b[:20]),
    ("meta.json", lambda b: b.replace(b'"one"', b'"two"')),
]


@pytest.mark.parametrize("name, spoil", SPOILT)
def test_a_cut_or_foreign_file_is_made_again(tmp_path, capsys, name, spoil):
    data, calls = samples(), []
    before = made(tmp_path, data, calls=calls).rows(np.arange(50), CPU)
    (folder,) = tmp_path.glob("[!.]*")
    content = (folder / name).read_bytes()
    (folder / name).unlink() if spoil is None else (folder / name).write_bytes(spoil(content))
    capsys.readouterr()
    after = made(tmp_path, data, calls=calls).rows(np.arange(50), CPU)
    assert f"{folder} is not whole; computing them again" in capsys.readouterr().out
    assert len(calls) == 2 and all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / name).read_bytes() == content


def test_another_identity_has_another_folder(tmp_path):
    data, calls = samples(), []
    made(tmp_path, data, {"weights": "a"}, calls=calls)
    made(tmp_path, data, {"weights": "b"}, calls=calls)
    made(tmp_path, data, {"weights": "a"}, calls=calls)
    assert len(calls) == 2 and len(list(tmp_path.glob("[!.]*"))) == 2


def test_a_teacher_that_fails_half_way_leaves_nothing(tmp_path):
    looks = []

    def encode(history):
        looks.append(1)
        if len(looks) == 4:
            raise KeyboardInterrupt
        history = history.float()
        return Output(history[:, :2], history[:, None], history[:, None, :0])

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, samples(), encode=encode)
    assert [path.name for path in tmp_path.glob("[!.]*")] == []


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UsageError, match="--teacher_cache: .* 0.00 GiB free, .* or use off"):
        made(tmp_path / "cache", samples())
    assert list((tmp_path / "cache").glob("[!.]*")) == []


def test_a_folder_under_another_identitys_name_is_not_used(tmp_path, capsys):
    data = samples()
    made(tmp_path, data, {"weights": "a"})
    (first,) = tmp_path.glob("[!.]*")
    made(tmp_path, data, {"weights": "b"})
    (second,) = set(tmp_path.glob("[!.]*")) - {first}
    shutil.rmtree(second)
    first.rename(second)
    made(tmp_path, data, {"weights": "b"})
    said = f"{second} is not whole; computing them again"
    assert said in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".tmp-abc-1").mkdir()
    made(tmp_path, samples())
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_cache, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        made(tmp_path, samples())
    assert [path.name for path in tmp_path.glob("[!.]*")] == []


def test_a_checkpoint_caught_between_two_renames_still_evaluates(inside):
    Path("output/demo/student/best").rename("output/demo/student/.old-best")
    Path("output/demo/student/results.json").unlink()
    manifest = json.loads(Path("output/demo/student/.old-best/manifest.json").read_text())
    assert distill.main(eval_only=True)["weights_sha256"] == manifest[checkpoint.WEIGHTS]


def test_a_second_run_needs_no_teacher_weights_and_says_so(inside, capsys):
    shutil.rmtree("output/demo/teacher_states")
    distill.main(**SHORT, overwrite=True)
    said = capsys.readouterr().out
    assert "120 samples, 0.00 GiB to output/demo/teacher_states/" in said
    for name in ("best/weights.safetensors", "best", "last"):
        path = Path("output/demo/teacher") / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
        other = {"distill_lambda": 0.3, "seed": 5, "output_dir": "other", "overwrite": True}
        distill.main(**SHORT, **other, student_init="base")
        said = capsys.readouterr().out
        assert "teacher states: read from output/demo/teacher_states/" in said
        assert "the teacher is not loaded" in said
    with pytest.raises(UsageError, match="starts from its weights, unless --student_init=base"):
        distill.main(**SHORT, output_dir="third")
    shutil.rmtree("output/demo/teacher_states")
    with pytest.raises(UsageError, match="checkpoint not found: output/demo/teacher/best"):
        distill.main(**SHORT, output_dir="third", student_init="base")


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_scripts_losses_are_those_of_the_live_teacher(inside, strategy):
    short = SHORT | {"max_steps": 20, "log_steps": 1, "eval_steps": 20, "logit_lambda": 0.5}
    finetune.main(**SHORT, train_strategy=strategy, output_dir="guide/teacher")
    short |= {"teacher": "guide/teacher", "train_strategy": strategy}
    distill.main(**short, teacher_cache="off", output_dir="live")
    assert not Path("guide/teacher_states").exists()
    for run in ("cached", "again"):
        distill.main(**short, output_dir=run)
    logs = [log_of(run) for run in ("live", "cached", "again")]
    for log in logs[:2]:
        assert [line.pop("event") for line in log] == ["train"] * 20 + ["valid"]
    # the KL of two near models is a small difference of large float32 numbers
    for one, other in zip(*logs[:2]):
        assert one.pop("logit_kl", 0.0) == pytest.approx(other.pop("logit_kl", 0.0), abs=1e-5)
        assert one == pytest.approx(other, rel=1e-5)
    assert log_of("cached") == log_of("again")
    assert hashes(Path("cached/best")) == hashes(Path("again/best"))


def test_a_teacher_trained_again_is_not_taken_for_the_first(inside, capsys):
    finetune.main(**SHORT, seed=7, overwrite=True)
    capsys.readouterr()
    distill.main(**SHORT, overwrite=True)
    said = capsys.readouterr().out
    assert "teacher states: none in output/demo/teacher_states for this teacher" in said
    assert len(list(Path("output/demo/teacher_states").glob("*/meta.json"))) == 2


def test_a_named_folder_is_used_and_a_file_refused(inside):
    distill.main(**SHORT, teacher_cache="my states", output_dir="s")
    assert len(list(Path("my states").glob("[!.]*"))) == 1
    with pytest.raises(UsageError, match="--teacher_cache=: expected text"):
        distill.main(**SHORT, teacher_cache="", output_dir="t")
    with refused("--teacher_cache=data/demo.csv: expected a folder, auto or off"):
        distill.main(**SHORT, teacher_cache="data/demo.csv", output_dir="t")


def test_outputs_of_other_fields_are_not_read(inside, monkeypatch, capsys):
    """Where somebody adds a field to `Output`, what is on disk has too few."""
    distill.main(**SHORT, output_dir="a")
    assert "teacher states: read from" in capsys.readouterr().out
    monkeypatch.setattr(Output, "_fields", (*Output._fields, "other"))
    distill.main(**SHORT, output_dir="b")
    assert "teacher states: read from" not in capsys.readouterr().out
