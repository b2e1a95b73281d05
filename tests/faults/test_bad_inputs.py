"""The catalogue of bad inputs, row by row: one line that names what is wrong and what to do, and
nothing written.

Each case is (row of the catalogue, scripts it is for, what is done, words of the answer). T, E, F,
D are the four scripts. Rows without a case stand in docs/reliability.md with their reason. Calls
are in process where that is the same.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import extract_emb
import finetune
import train_sr_trad
from engine import checkpoint, cli
from tests.conftest import SHORT, hashes

pytestmark = pytest.mark.slow
MAINS = {"T": train_sr_trad.main, "E": extract_emb.main, "F": finetune.main, "D": distill.main}
PKL, NOTES = Path("output/demo/sasrec_item.pkl"), Path("output/demo/sasrec_item.json")
# rows about the item table, the base and the prompt: a teacher's would tell first
ALONE = (*range(20, 38), *range(54, 58), 64, 73)
HEAD = "reviewerID,asin\n"
GOOD = 'a,"[1, 2, 3, 4]"\n'


def text(content):
    data = content.encode() if isinstance(content, str) else content
    return lambda: (Path("bad.csv").write_bytes(data), {"data_path": "bad.csv"})[1]


def flags(**values):
    return lambda: values


def table(value, key="item_embedding"):
    """Put another item table in place, without notes of where it came from."""

    def make():
        NOTES.unlink()
        PKL.write_bytes(pickle.dumps({key: value} if key else value))
        return {}

    return make


def rows_of(change):
    full = torch.randn(161, 128)
    return table(change(full.clone()))


class Runs:
    def __reduce__(self):
        return os.system, ("touch stolen",)


def nested(payload):
    """A tensor whose storage is a pickle that runs code, as torch's own reducer would open it."""

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(payload),)

    return Storage()


def spoiled(path, change):
    def make():
        file = Path(path)
        data = file.read_bytes()
        file.write_bytes(change(data))
        return {}

    return make


def base(**changes):
    """A copy of the tiny base with files changed (bytes), removed (None) or changed in their JSON
    (dict).
    """

    def make():
        folder = Path(shutil.copytree("output/base/tiny", "my base"))
        files = {
            "config": "config.json",
            "weights": "model.safetensors",
            "tokenizer": "tokenizer.json",
            "index": "model.safetensors.index.json",
        }
        for name, change in changes.items():
            path = folder / files[name]
            if change is None:
                path.unlink()
            elif isinstance(change, dict):
                path.write_text(
                    json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change)
                )
            else:
                path.write_bytes(change)
        return {"base_model": "./my base"}

    return make


def damaged_teacher():
    return spoiled("output/demo/teacher/best/weights.safetensors", lambda data: data[:1000])()


def edited_teacher(change):
    def make():
        path = Path("output/demo/teacher/config.json")
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
        shutil.rmtree("output/demo/teacher_states")
        return {}

    return make


def renamed_adapters():
    finetune.main(**SHORT, train_strategy="lora", output_dir="other")
    tensors, meta = checkpoint.load("other/best")
    renamed = {
        name.replace("decoder.llama.", "decoder.llama.model."): tensor
        for name, tensor in tensors.items()
    }
    checkpoint.save("other/best", renamed, meta)
    return {"teacher": "other"}


def without_item_embedding():
    checkpoint.save("output/demo/sasrec/best", {"x": torch.ones(1)}, {"step": 1})
    return {}


def template(content):
    return lambda: (Path("t.json").write_text(content), {"prompt_template_name": "t.json"})[1]


def outputs(kind):
    def make():
        Path("plain file").write_text("x")
        return {"output_dir": {"file": "plain file", "below": "plain file/run"}[kind]}

    return make


CASES = [
    (
        1,
        "TFD",
        flags(data_path="nowhere.csv"),
        "data file not found: nowhere.csv (from --data_path)",
    ),
    (
        1,
        "T",
        flags(domain_type="nowhere"),
        "nowhere.csv (from --domain_type nowhere); looked in data, dataset/sequential; "
        "available: demo",
    ),
    (2, "TFD", flags(data_path="data"), "data is a directory, expected a CSV"),
    (3, "TFD", text(""), "bad.csv is empty; expected a header with reviewerID,asin"),
    (4, "TFD", text(HEAD), "bad.csv: 0 users"),
    (
        5,
        "TFD",
        text("reviewerID,asins\n" + GOOD),
        "missing column asin; found reviewerID, asins; is 'asins' meant as asin?",
    ),
    (6, "TFD", text('reviewerID;asin\na;"[1,2]"\n'), "looks ';'-separated"),
    (6, "TFD", text('reviewerID\tasin\na\t"[1,2]"\n'), r"looks '\t'-separated"),
    (7, "TFD", text((HEAD + GOOD).encode("utf-16")), "not UTF-8 at byte 0"),
    (7, "TFD", text(os.urandom(10) + b"\xff" * 200), "not UTF-8 at byte"),
    (9, "TFD", text(HEAD + "a,[1,2,3]\n"), "row 2 has 4 fields, expected 2; quote the list"),
    (10, "TFD", text(HEAD + GOOD + "b,\"['a', 'b']\"\n"), "row 3: asin is not a valid JSON list"),
    (11, "TFD", text(HEAD + GOOD + "b,\n"), "row 3: asin is empty"),
    (12, "TFD", text(HEAD + "a,5\n"), "row 2: asin is '5', expected a list of whole numbers"),
    (12, "TFD", text(HEAD + 'a,"{""a"": 1}"\n'), "expected a list of whole numbers"),
    (12, "TFD", text(HEAD + 'a,"""x"""\n'), "expected a list of whole numbers"),
    (13, "TFD", text(HEAD + 'a,"[1, [2], 3]"\n'), "element 1 of asin is '[2]' (list)"),
    (14, "TFD", text(HEAD + 'a,"[""12"", 3]"\n'), "element 0 of asin is '12' (str)"),
    (15, "TFD", text(HEAD + 'a,"[1.0, 2.5]"\n'), "element 0 of asin is '1.0' (float)"),
    (16, "TFD", text(HEAD + 'a,"[1, NaN, Infinity]"\n'), "element 1 of asin is 'nan' (float)"),
    (17, "TFD", text(HEAD + 'a,"[1, true]"\n'), "element 1 of asin is 'True' (bool)"),
    (18, "TFD", text(HEAD + GOOD + 'b,"[1, -3]"\n'), "row 3: item id -3 < 0"),
    (20, "FD", table(torch.randn(40, 128)), "max id 160 but the item table has 40 rows"),
    (
        21,
        "TFD",
        text(HEAD + f'a,"[1, {2**64}]"\n'),
        "row 2: item id 18446744073709551616 > 2147483646",
    ),
    (22, "TFD", text(HEAD + f'a,"[{"9" * 5000}]"\n'), "row 2: asin is not a valid JSON list"),
    (22, "TFD", text(HEAD + f'a,"{"[" * 100_000}"\n'), "row 2: asin is not a valid JSON list"),
    (24, "TFD", text(HEAD + 'a,"[1, 2, 3]"\n'), "no user has 4 items or more"),
    (
        25,
        "TFD",
        text(HEAD + GOOD + 'b,"[1, 2]"\n' + GOOD),
        "reviewerID 'a' appears in rows 2 and 4",
    ),
    (
        28,
        "FD",
        lambda: (PKL.unlink(), {})[1],
        "item table not found: output/demo/sasrec_item.pkl; extract_emb.py writes it",
    ),
    (29, "FD", table(Runs()), "refused, not a plain tensor (forbidden global posix.system)"),
    (30, "FD", table(nested(Runs())), "refused, not a plain tensor"),
    (
        31,
        "FD",
        table({"a": torch.ones(161, 8), "b": torch.ones(161, 8)}, key=None),
        "which is the item table? found 2 entries: a, b; write it as torch.save",
    ),
    (31, "FD", table([1, 2, 3], key=None), "which is the item table? found list"),
    (
        31,
        "FD",
        table([[1.0] * 8] * 161),
        "must be floating point of shape [items, dim], found list",
    ),
    (33, "FD", table(torch.randn(160, 128)), "max id 160 but the item table has 160 rows"),
    (
        34,
        "FD",
        rows_of(lambda t: t.index_fill_(0, torch.tensor([5, 17]), float("nan"))),
        "rows 5, 17 contain NaN or infinity (2 in all)",
    ),
    (35, "FD", table(torch.zeros(161, 128)), "160 of 160 occurring items have a row of zeros"),
    (
        36,
        "FD",
        rows_of(lambda t: t.index_fill_(0, torch.tensor([9]), 70000.0).half()),
        "rows 9 contain NaN or infinity",
    ),
    (
        36,
        "FD",
        rows_of(lambda t: t.double().index_fill_(0, torch.tensor([9]), 1e300)),
        "rows 9 contain NaN or infinity",
    ),
    (37, "FD", table(torch.ones(161)), "found torch.float32 of shape (161,)"),
    (37, "FD", table(torch.ones(161, 2, 2)), "found torch.float32 of shape (161, 2, 2)"),
    (37, "FD", table(torch.ones(161, 8, dtype=torch.int64)), "found torch.int64 of shape (161, 8)"),
    (37, "FD", table(np.ones((161, 8), dtype=np.int32)), "found int32 of shape (161, 8)"),
    (
        38,
        "E",
        flags(sasrec="nowhere"),
        "--sasrec=nowhere: no sasrec run there; train_sr_trad.py makes one",
    ),
    (
        38,
        "D",
        flags(teacher="nowhere", teacher_cache="off"),
        "--teacher=nowhere: no teacher run there; finetune.py makes one",
    ),
    (
        38,
        "TFD",
        flags(eval_only=True, output_dir="nowhere"),
        "--eval_only: no checkpoint nowhere/best",
    ),
    (42, "F", base(weights=b""), "my base/model.safetensors: damaged or not safetensors"),
    (
        42,
        "F",
        base(weights=b"some text, longer than eight bytes"),
        "my base/model.safetensors: damaged or not safetensors",
    ),
    (
        42,
        "D",
        spoiled("output/demo/teacher/best/weights.safetensors", lambda data: data[:1000]),
        "weights.safetensors does not match its sha256; it was",
    ),
    (
        42,
        "D",
        spoiled("output/demo/teacher/best/weights.safetensors", lambda data: b""),
        "weights.safetensors does not match its sha256",
    ),
    (
        42,
        "D",
        spoiled(
            "output/demo/teacher/best/weights.safetensors",
            lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:],
        ),
        "or altered",
    ),
    (
        42,
        "F",
        lambda: (damaged_teacher(), {"eval_only": True, "output_dir": "output/demo/teacher"})[1],
        "does not match its sha256",
    ),
    (
        42,
        "E",
        spoiled("output/demo/sasrec/best/weights.safetensors", lambda data: b"text"),
        "weights.safetensors does not match its sha256",
    ),
    (43, "E", without_item_embedding, "no item_embedding.weight; not a SASRec run"),
    (
        44,
        "D",
        edited_teacher(lambda c: c["model"].update(strategy="lora")),
        "does not fit the model",
    ),
    (
        44,
        "F",
        flags(eval_only=True, output_dir="output/demo/teacher", lora_r=8),
        "--lora_r=8 contradicts the teacher run in output/demo/teacher, which has 16",
    ),
    (
        45,
        "D",
        edited_teacher(lambda c: c["model"].update(layers=[0, 1, 2, 3])),
        "block ends [8] do not fit the model's 4 layers",
    ),
    (
        47,
        "F",
        lambda: (renamed_adapters(), {"eval_only": True, "output_dir": "other"})[1],
        "does not fit the model: lacks decoder.llama.layers",
    ),
    (47, "D", renamed_adapters, "does not fit the model: lacks decoder.llama.layers"),
    (
        48,
        "F",
        flags(llama_decoder_nums=99),
        "99 decoder layers asked for, the base checkpoint has 8 layers",
    ),
    (
        48,
        "D",
        flags(llama_decoder_nums_student=12, distill_block=4),
        "12 decoder layers asked for, the base checkpoint has 8 layers",
    ),
    (49, "F", flags(llama_decoder_nums=0), "--llama_decoder_nums=0: expected a whole number >= 1"),
    (
        49,
        "D",
        flags(llama_decoder_nums_student=-1),
        "--llama_decoder_nums_student=-1: expected a whole number >= 1",
    ),
    (
        50,
        "D",
        flags(distill_block=3),
        "--distill_block=3 does not divide llama_decoder_nums_student 4 (4 % 3 = 1); use one of "
        "1, 2, 4",
    ),
    (
        50,
        "D",
        flags(distill_block=3, llama_decoder_nums_student=3),
        "does not divide llama_decoder_nums_teacher 8",
    ),
    (
        51,
        "D",
        flags(base_model="small"),
        "--base_model=small contradicts the teacher run in output/demo/teacher, which has tiny",
    ),
    (54, "FD", flags(base_model="./nowhere"), "--base_model=./nowhere: no such folder"),
    (
        55,
        "FD",
        flags(base_model="meta-llama/Llama-2-7b-hf"),
        "no such folder here, and the Hugging Face hub cannot be reached",
    ),
    (
        56,
        "FD",
        base(config={"model_type": "gpt2"}),
        "model_type gpt2 unsupported, expected llama, mistral,",
    ),
    (56, "FD", base(config=b"[1]"), "model_type None unsupported, expected llama, mistral,"),
    (
        56,
        "FD",
        base(config={"num_attention_heads": "many"}),
        "config.json: not a llama's configuration",
    ),
    (57, "FD", base(config=None), "has no config.json"),
    (57, "FD", base(config=b"{oops"), "config.json: damaged, not JSON"),
    (
        57,
        "FD",
        base(weights=None),
        "has neither model.safetensors.index.json nor model.safetensors",
    ),
    (
        57,
        "FD",
        base(index=b"{oops"),
        "model.safetensors.index.json: damaged, expected JSON with a weight_map",
    ),
    (
        57,
        "FD",
        base(index={"weight_map": {"embed_tokens.weight": "../other/model.safetensors"}}),
        "damaged, expected JSON with a weight_map",
    ),
    (
        57,
        "FD",
        base(index={"weight_map": {"embed_tokens.weight": "model-00001-of-00002.safetensors"}}),
        "has both model.safetensors.index.json and model.safetensors, and they may be",
    ),
    (57, "FD", base(tokenizer=b"{oops"), "no usable tokenizer; expected tokenizer.json"),
    (62, "TFD", flags(batch_size=0), "--batch_size=0: expected a whole number >= 1"),
    (
        62,
        "TFD",
        flags(batch_size=8, micro_batch_size=16),
        "--batch_size=8 is not a multiple of --micro_batch_size=16",
    ),
    (62, "TFD", flags(num_epochs=0), "--num_epochs=0: expected a whole number >= 1"),
    (
        62,
        "TFD",
        flags(max_steps=0),
        "--max_steps=0: expected a whole number >= 1, or -1 for num_epochs",
    ),
    (
        62,
        "TFD",
        flags(eval_steps=0),
        "--eval_steps=0: expected a whole number >= 1, or -1 for every epoch",
    ),
    (
        64,
        "FD",
        flags(lora_target_modules=["gate_proj", "nope"], train_strategy="lora"),
        "--lora_target_modules: nope matches no projection",
    ),
    (66, "TFD", outputs("file"), "--output_dir=plain file: plain file is a file, not a folder"),
    (
        66,
        "TFD",
        outputs("below"),
        "--output_dir=plain file/run: plain file is a file, not a folder",
    ),
    (66, "E", flags(item_table="data/demo.csv/table.pkl"), "data/demo.csv is a file, not a folder"),
    (
        67,
        "TFD",
        flags(output_dir=None, learning_rate=0.5),
        "holds a finished run with other flags: --learning_rate=0.5 (the run has 0.001); choose",
    ),
    (72, "TFD", flags(device="cuda"), "--device=cuda: torch finds no CUDA device here"),
    (73, "FD", flags(prompt_template_name="nowhere"), "--prompt_template_name=nowhere: no file"),
    (
        73,
        "FD",
        template('{"prompt": "x"}'),
        "t.json: expected the texts prompt and response, found prompt",
    ),
    (74, "TF", flags(max_seq_length=0), "--max_seq_length=0: expected a whole number >= 1"),
    (
        74,
        "F",
        flags(max_seq_length=5000),
        "prompt, items and response are 5069 tokens, the base has 2048 positions; lower "
        "--max_seq_length",
    ),
]


@pytest.mark.parametrize(
    "row, script, make, words",
    [(row, s, make, words) for row, scripts, make, words in CASES for s in scripts],
)
def test_a_bad_input_is_answered_in_one_line_and_nothing_is_written(
    inside, row, script, make, words
):
    if row == 72 and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    given = make()
    if script == "D" and row in ALONE:
        given |= {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
    short = {} if script == "E" else SHORT | {"output_dir": "new"}
    short = {"output_dir": "new"} if given.get("eval_only") else short
    before = hashes(Path("."))
    with pytest.raises(cli.UsageError) as error:
        MAINS[script](**{**short, **given})
    line = str(error.value)
    assert words in line and "\n" not in line
    assert hashes(Path(".")) == before and not Path("stolen").exists()


FLAGS = [
    (58, ("T", "E", "F", "D"), "--batchsize=4", "unknown flag --batchsize"),
    (58, ("T", "F", "D"), "--batchsize=4", "(did you mean --batch_size?)"),
    (59, ("T", "F", "D"), "--batch_size=abc", "--batch_size=abc: expected a whole number >= 1"),
    (59, ("T", "F", "D"), "--batch_size=4.5", "--batch_size=4.5: expected a whole number"),
    (
        59,
        ("T", "F", "D"),
        "--batch_size",
        "--batch_size needs a value, expected a whole number >= 1",
    ),
    (60, ("T", "F", "D"), "--eval_only=maybe", "--eval_only=maybe: expected true or false"),
    (61, ("T", "F", "D"), "--learning_rate=1e", "--learning_rate=1e: expected a number > 0"),
    (61, ("T", "F", "D"), "--learning_rate=-1", "--learning_rate=-1: expected a number > 0"),
    (61, ("T", "F", "D"), "--learning_rate=0", "--learning_rate=0: expected a number > 0"),
    (61, ("T", "F", "D"), "--learning_rate=nan", "--learning_rate=nan: expected a number > 0"),
    (62, ("T", "F", "D"), "--num_epochs=-1", "--num_epochs=-1: expected a whole number >= 1"),
    (
        63,
        ("F", "D"),
        "--lora_target_modules gate_proj up_proj",
        "unexpected word 'up_proj': flags are written --name=value",
    ),
    (65, ("F", "D"), "--lora_r=0", "--lora_r=0: expected a whole number >= 1"),
    (65, ("F", "D"), "--lora_r=-1", "--lora_r=-1: expected"),
    (65, ("F", "D"), "--lora_r=4.5", "--lora_r=4.5: expected a whole number"),
    (65, ("F", "D"), "--lora_dropout=1.5", "--lora_dropout=1.5: expected a number >= 0 and < 1"),
    (65, ("F", "D"), "--task_type=FEATURE_EXTRACTIO", "unknown flag --task_type"),
    (
        71,
        ("F", "D"),
        "--layer_selection=trune",
        "--layer_selection=trune: expected one of first, interval, last, or numbers (0,2,4,6)",
    ),
    (
        71,
        ("F", "D"),
        "--train_strategy=loras",
        "--train_strategy=loras: expected one of auto, lora, full",
    ),
    (71, ("D",), "--distill_mode=both", "--distill_mode=both: expected one of offline, online"),
    (
        71,
        ("T", "F", "D"),
        "--lr_scheduler=cos",
        "--lr_scheduler=cos: expected one of cosine, linear, constant",
    ),
    (74, ("T", "F", "D"), "--max_seq_length=0", "--max_seq_length=0: expected a whole number >= 1"),
]


@pytest.mark.parametrize(
    "row, script, line, words",
    [(row, s, line, words) for row, scripts, line, words in FLAGS for s in scripts],
)
def test_a_bad_flag_is_answered_before_anything(
    row, script, line, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(MAINS[script], line.split(" "))
    told = capsys.readouterr().err
    assert (
        end.value.code == 2
        and words in told
        and told.startswith("error: ")
        and told.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_row_60_all_ways_to_say_yes_and_no():
    for word, value in [
        ("true", True),
        ("yes", True),
        ("1", True),
        ("false", False),
        ("No", False),
        ("0", False),
    ]:
        assert cli.bind(distill.main, [f"--eval_only={word}"]) == {"eval_only": value}


def test_row_69_a_text_is_what_was_typed():
    assert cli.bind(distill.main, ["--output_dir=1e5", "--domain_type=a,b"]) == {
        "output_dir": "1e5",
        "domain_type": "a,b",
    }


def test_rows_45_and_46_a_checkpoint_does_not_fit_other_depths(inside):
    finetune.main(**SHORT, llama_decoder_nums=4, output_dir="four")
    path = Path("four/config.json")
    config = json.loads(path.read_text())
    config["model"]["layers"], config["flags"]["llama_decoder_nums"] = [0, 1, 2, 3, 4, 5], 6
    path.write_text(json.dumps(config))
    with pytest.raises(cli.UsageError, match="block ends .4. do not fit the model's 6 layers"):
        distill.main(
            **SHORT, teacher="four", llama_decoder_nums_student=2, distill_block=2, output_dir="s"
        )


def test_row_52_fewer_teacher_layers_are_told(inside, capsys):
    finetune.main(**SHORT, llama_decoder_nums=2, output_dir="two")
    distill.main(**SHORT, teacher="two", distill_block=2, output_dir="s")
    assert "the teacher has 2 layers, fewer than the student's 4" in capsys.readouterr().out


def test_rows_32_and_53_another_table_or_prompt_than_the_teachers(inside):
    """A table of another width is fine by itself; beside a teacher that read another one it is
    refused.
    """
    NOTES.unlink()
    PKL.write_bytes(pickle.dumps({"item_embedding": torch.randn(161, 16)}))
    finetune.main(**SHORT, output_dir="narrow")
    with pytest.raises(
        cli.UsageError, match="output/demo/teacher was made from another file: its table_sha256 is"
    ):
        distill.main(**SHORT, output_dir="s")
    with pytest.raises(
        cli.UsageError,
        match=(
            "--prompt_template_name=other.json contradicts the teacher run in narrow, which has "
            "alpaca"
        ),
    ):
        distill.main(**SHORT, teacher="narrow", prompt_template_name="other.json", output_dir="s")


def test_rows_8_19_23_24_26_27_unusual_but_right(tmp_path, monkeypatch, capsys):
    """BOM, id 0 as an item, an empty list, short users, identical users, a catalogue smaller than 1
    + 999: all four steps.
    """
    monkeypatch.chdir(tmp_path)
    rows = [
        "none,[]",
        'short,"[5, 6, 7]"',
        *[f'u{i},"[0, 1, 2, 3, 9, 0]"' for i in range(6)],
        'one,"[9, 3, 2, 1]"',
    ]
    Path("data").mkdir()
    Path("data/odd.csv").write_text("\ufeffreviewerID,asin\n" + "\n".join(rows) + "\n")
    short = SHORT | {"domain_type": "odd"}
    results = [
        train_sr_trad.main(**short),
        extract_emb.main(domain_type="odd"),
        finetune.main(**short),
        distill.main(**short),
    ]
    printed = capsys.readouterr().out
    assert (
        "7 users, 8 items" in printed
        and "not evaluated: 2 users with fewer than 4 items" in printed
    )
    assert (
        results[0]["candidates"] == {"asked": 999, "fewest": 3}
        and "all of them are used" in printed
    )
    assert results[1]["rows"] == 10 and results[3]["users"] == 7
    Path("data/single.csv").write_text(HEAD + 'only,"[3, 1, 2, 4]"\n')
    short["domain_type"] = "single"
    assert train_sr_trad.main(**short)["users"] == 1
    extract_emb.main(domain_type="single")
    finetune.main(**short)
    assert distill.main(**short)["candidates"]["fewest"] == 0


def test_every_row_of_the_catalogue_has_a_case_or_a_reason():
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    page = (Path(__file__).parent.parent.parent / "docs/reliability.md").read_text()
    cased = {row for row, *_ in CASES} | {row for row, *_ in FLAGS}
    named = " ".join(re.findall(r"def test_rows?_((?:\d+_|and_)+)", here))
    cased |= {int(n) for n in re.findall(r"\d+", named)}
    struck = {int(n) for n in re.findall(r"^\| row (\d+) \|", page, re.M)}
    assert cased | struck >= set(range(1, 75)) - {39, 40, 41, 70}
    assert not cased & struck
