"""Step 4: distil the teacher into a student with fewer layers, block by block, supervised at several exits.

    python distill.py                                                    # the demo domain, after finetune.py
    python distill.py --domain_type cloth --learning_rate 3e-3 --max_steps 1500
    python distill.py --domain_type cloth --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0   # plain CE, no teacher
    python distill.py --domain_type cloth --distill_mode online --base_model meta-llama/Llama-2-7b-hf
    python distill.py --domain_type cloth --eval_only                    # metrics of best/ again
    python distill.py --domain_type cloth --distill_lambda 0.5 --output_dir runs/half    # the teacher's states are read, not made again

Reads data/<domain>.csv, output/<domain>/sasrec_item.pkl and output/<domain>/teacher/; writes output/<domain>/student/ and,
once a teacher, its states on the training samples beside the teacher's folder: output/<domain>/teacher_states/.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from utils import cli

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
PROTOCOL = ("train_targets", "max_seq_length", "num_candidates", "candidate_seed")
SHAPE = ("max_seq_length", "layer_selection", "interval_nums", "train_strategy", *LORA)
LOSS = (
    "distill_lambda", "norm_lambda", "cls_multiple_lambda", "logit_lambda", "temperature", "block_reduction", "norm_form",
)  # fmt: skip
FIXED = (
    *SHAPE, *LOSS, *PROTOCOL, "base_model", "llama_decoder_nums_student", "student_init", "prompt_template_name", "distill_block", "distill_mode",
)  # fmt: skip
INHERITED = {"base_model": "tiny", "prompt_template_name": "alpaca", "max_seq_length": 30, "llama_decoder_nums_teacher": 8}


@cli.command
def main(
    *,
    # data and hand-over
    domain_type: str = "demo",
    data_path: str | None = None,
    item_table: str | None = None,
    teacher: str | None = None,
    teacher_cache: str = "auto",
    output_dir: str | None = None,
    train_targets: Literal["last", "all"] = "last",
    max_seq_length: cli.PositiveInt | None = None,
    # model
    base_model: str | None = None,
    llama_decoder_nums_teacher: cli.PositiveInt | None = None,
    llama_decoder_nums_student: cli.PositiveInt = 4,
    layer_selection: cli.LayerSelection = "first",
    interval_nums: cli.PositiveInt = 1,
    student_init: Literal["base", "teacher"] = "base",
    prompt_template_name: str | None = None,
    train_strategy: Literal["auto", "lora", "full"] = "auto",
    lora_r: cli.PositiveInt = 16,
    lora_alpha: cli.PositiveInt = 16,
    lora_dropout: cli.DropRate = 0.05,
    lora_target_modules: list[str] = ["gate_proj", "up_proj", "down_proj"],  # noqa: B006  read, never changed
    # distillation
    distill_mode: Literal["offline", "online"] = "offline",
    distill_block: cli.PositiveInt = 4,
    distill_lambda: cli.NonNegativeFloat = 1.0,
    norm_lambda: cli.NonNegativeFloat = 0.1,
    cls_multiple_lambda: cli.NonNegativeFloat = 1.0,
    logit_lambda: cli.NonNegativeFloat = 0.0,
    temperature: cli.PositiveFloat = 1.0,
    block_reduction: Literal["sum", "mean"] = "sum",
    norm_form: Literal["l2", "squared_l2"] = "l2",
    # training
    batch_size: cli.PositiveInt = 256,
    micro_batch_size: cli.PositiveInt | None = None,
    num_epochs: cli.PositiveInt = 20,
    max_steps: cli.MaxSteps = -1,
    learning_rate: cli.PositiveFloat = 1e-3,
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine",
    warmup_steps: cli.NonNegativeInt = 50,
    weight_decay: cli.NonNegativeFloat = 0.0,
    max_grad_norm: cli.NonNegativeFloat = 1.0,
    patience: cli.NonNegativeInt = 0,
    gradient_checkpointing: bool = False,
    # evaluation and logs
    eval_steps: cli.Interval = 100,
    save_steps: cli.Interval = 100,
    eval_batch_size: cli.PositiveInt = 512,
    num_candidates: cli.PositiveInt = 999,
    candidate_seed: cli.NonNegativeInt = 42,
    log_steps: cli.PositiveInt = 10,
    tensorboard: bool = False,
    # run
    device: Literal["auto", "cpu", "cuda"] = "auto",
    bf16: bool | None = None,
    seed: cli.Seed = 42,
    eval_only: bool = False,
    overwrite: bool = False,
) -> dict:
    """Train a student of N layers, aligned to the teacher's M layers at the ends of B blocks.

    Loss: ce + distill_lambda * align_cos + norm_lambda * align_norm + cls_multiple_lambda * exits + logit_lambda * logit_kl.
    What the teacher fixed (base, prompt, length, data, item table) is inherited and may not be contradicted. No teacher
    is needed or loaded where distill_lambda, norm_lambda and logit_lambda are 0.

    Args:
        domain_type: the domain.
        data_path: its CSV, wherever it is.
        item_table: step 2's file; output/<domain>/sasrec_item.pkl by default.
        teacher: the folder of the step-3 run; output/<domain>/teacher by default.
        teacher_cache: where the frozen teacher's states on the training samples are kept, computed once and reused by later runs;
            auto is teacher_states/ beside the teacher's folder, off runs the teacher in every step (as online mode always does).
        output_dir: this run's folder; output/<domain>/student by default.
        train_targets: one target a user (last) or every prefix (all).
        max_seq_length: how many of the last items are read; the teacher's, 30 without one.
        base_model: the teacher's; tiny without one.
        llama_decoder_nums_teacher: M; the teacher's, 8 in online mode.
        llama_decoder_nums_student: N, decoder layers kept.
        layer_selection: which layers: first, interval, last, influence (those that change their input most), or numbers such as 0,2,4,6.
        interval_nums: with interval, one layer in interval_nums + 1 is left out.
        student_init: start from the base's layers, or from the trained teacher's (then layer_selection chooses among these),
            with its item adapter and head.
        prompt_template_name: the teacher's; alpaca without one.
        train_strategy: lora (base frozen) or full; auto is full for the built-in random bases, else lora.
        lora_r, lora_alpha, lora_dropout: LoRA's rank, scale and dropout.
        lora_target_modules: the projections that get LoRA.
        distill_mode: offline (the teacher is frozen) or online (both train together from the base).
        distill_block: B, must divide M and N.
        distill_lambda: weight of the cosine term (lambda1).
        norm_lambda: weight of the distance term (lambda2).
        cls_multiple_lambda: weight of the exits (lambda3).
        logit_lambda, temperature: weight of the KL between catalogue softmaxes, and its temperature.
        block_reduction: sum (released) or mean (paper) over blocks.
        norm_form: l2 (released) or squared_l2 (paper).
        batch_size: users an optimizer step.
        micro_batch_size: users at once; gradients accumulate to batch_size (default: all at once).
        num_epochs: how long to train.
        max_steps: optimizer steps instead of num_epochs; -1 for none.
        learning_rate, lr_scheduler, warmup_steps, weight_decay: of AdamW.
        max_grad_norm: clip gradients to this norm; 0 for not.
        patience: evaluations without a better validation MRR before stopping; 0 for never.
        gradient_checkpointing: recompute layers in the backward pass to save memory.
        eval_steps, save_steps: steps between evaluations, and between writing last/; -1 for every epoch.
        eval_batch_size: users at once in evaluation.
        num_candidates, candidate_seed: the sampled protocol's negatives and their draw, the same for all models and seeds.
        log_steps: steps between lines of metrics.jsonl.
        tensorboard: also write TensorBoard events.
        device: auto is cuda where there is one.
        bf16: bfloat16; by default on cuda.
        seed: of new weights, sample order and dropout.
        eval_only: evaluate best/ and write results.json; train nothing.
        overwrite: start anew in a folder that holds a run.
    """
    flags = dict(locals())
    from datasets.inputs import read_inputs
    from datasets.interactions import canonical_domain
    from datasets.prompts import read_template
    from utils import runlog

    root = Path("output") / canonical_domain(domain_type)
    folder, teacher_folder = Path(output_dir or root / "student"), Path(teacher or root / "teacher")
    cache = {"auto": teacher_folder.parent / "teacher_states", "off": None}.get(teacher_cache.lower(), Path(teacher_cache))
    aligned = not eval_only and (distill_lambda > 0 or norm_lambda > 0 or logit_lambda > 0)
    inherits = student_init == "teacher" and not eval_only  # the teacher's layers are the student's start
    online = distill_mode == "online" and (aligned or inherits)
    offline = distill_mode == "offline" and (aligned or inherits)
    n_blocks = distill_block if aligned or (cls_multiple_lambda > 0 and not eval_only) else 1  # plain CE needs no blocks
    cli.check(
        *([] if eval_only else [cli.divides(micro_batch_size=micro_batch_size, batch_size=batch_size)]),
        cli.blocks(n_blocks, llama_decoder_nums_student=llama_decoder_nums_student),
        (not (online and inherits), "--student_init=teacher starts from a trained teacher: use --distill_mode=offline"),
        (
            not offline or (teacher_folder / "best").is_dir() or (cache is not None and cache.is_dir()),
            f"teacher not found: {teacher_folder / 'best'}; finetune.py writes it (or name a run with --teacher)",
        ),
        (bool(teacher_cache), "--teacher_cache=: expected auto, off or a folder"),
        (cache is None or cache.is_dir() or not cache.exists(), f"--teacher_cache={cache}: is a file, expected a folder, auto or off"),
    )
    runlog.check_output_dir(folder, "student", flags, overwrite=overwrite, eval_only=eval_only)
    inputs = read_inputs(domain_type, data_path, item_table)
    if eval_only:
        runlog.check_same(folder, inputs.hashes, inputs.table_path)
        flags |= runlog.recorded(folder, flags, cli.defaults(main), FIXED)
    elif offline:
        fixed = runlog.read_json(teacher_folder / "config.json", "teacher")
        cli.check(
            (
                fixed.get("step") == "teacher",
                f"--teacher={teacher_folder} holds a {fixed.get('step')} run, expected a teacher; finetune.py writes one",
            )
        )
        runlog.check_same(teacher_folder, inputs.hashes, inputs.table_path)
        runlog.tell_unfinished(teacher_folder, "teacher")
        fixed["flags"]["llama_decoder_nums_teacher"] = fixed["flags"]["llama_decoder_nums"]
        flags |= runlog.inherit(fixed["flags"], {name: flags[name] for name in INHERITED}, f"the teacher in {teacher_folder}")
    else:
        flags |= {name: default for name, default in INHERITED.items() if flags[name] is None}
    if aligned:
        cli.check(cli.blocks(distill_block, llama_decoder_nums_teacher=flags["llama_decoder_nums_teacher"]))
    texts = read_template(flags["prompt_template_name"])

    import torch

    from datasets import sequences, teacher_states
    from datasets.prompts import tokenise
    from models import base
    from models.llm4rec import build, kept_of, specify
    from models.losses import Output, recommendation_loss
    from models.selection import CALIBRATION, block_influence
    from utils import checkpoint, training
    from utils.evaluation import finish, ranker
    from utils.metrics_log import MetricsLog

    where = training.choose_device(device)
    half = where.type == "cuda" if bf16 is None else bf16
    if eval_only:
        half = runlog.recorded_precision(folder, bf16, half)
    location = base.locate(flags["base_model"], [*read_template("alpaca")])
    table = inputs.table().to(where)
    samples, splits = sequences.prepare(inputs.data, **{name: flags[name] for name in PROTOCOL})

    def specified(kept: int, exit_heads: bool, **choice) -> dict:
        ids = (fixed["model"]["prompt_ids"], fixed["model"]["response_ids"]) if offline else tokenise(texts, location)
        return specify(
            location, flags["base_model"], *ids, kept=kept, n_blocks=n_blocks, exit_heads=exit_heads,
            influence=lambda: block_influence(location, *ids, samples.spread(CALIBRATION).to(where), table, half, seed),
            **{name: flags[name] for name in SHAPE} | choice,
        )  # fmt: skip

    def made(spec: dict) -> torch.nn.Module:
        return build(base=location, item_table=table, bf16=half, gradient_checkpointing=gradient_checkpointing, **spec).to(where)

    exits = cls_multiple_lambda > 0
    if eval_only:
        spec = runlog.read_json(folder / "config.json", "run")["model"]
    else:
        same_exits = offline and fixed["model"]["exit_heads"] and fixed["model"]["n_blocks"] == distill_block
        choose_from = fixed["model"]["layers"] if inherits else None
        spec = specified(flags["llama_decoder_nums_student"], exits or (logit_lambda > 0 and same_exits), teacher_layers=choose_from)
    teacher_weights = None
    if offline:  # by results.json where the checkpoint was taken away and its states are kept
        teacher_weights = checkpoint.weights_sha256(teacher_folder / "best")
        teacher_weights = teacher_weights or runlog.read_json(teacher_folder / "results.json", "results").get("weights_sha256")
    config = {
        "step": "student", "domain": inputs.domain, **inputs.hashes, "random_base": flags["base_model"] in base.BUILT_IN,
        "base": base.contents(location), "bf16": half, "model": spec, "flags": flags, "teacher_sha256": teacher_weights, "cached": cache is not None,
        "teacher": str(teacher_folder) if offline else distill_mode if online else None,
    }  # fmt: skip
    resume = not eval_only and runlog.unfinished(folder, config, overwrite)
    if spec["strategy"] == "full":
        runlog.without_effect(flags, cli.defaults(main), LORA, "the base is trained in full; --train_strategy=lora uses them")
    if not logit_lambda:
        runlog.without_effect(flags, cli.defaults(main), ("temperature",), "of the logit KL, whose --logit_lambda is 0")
    if exits and n_blocks == 1 and not eval_only:
        print(f"without effect: --cls_multiple_lambda={cls_multiple_lambda} (with --distill_block=1 there is no inner exit)", flush=True)
    if aligned and flags["llama_decoder_nums_teacher"] < llama_decoder_nums_student:
        print(f"the teacher has {flags['llama_decoder_nums_teacher']} layers, fewer than the student's {llama_decoder_nums_student}", flush=True)
    torch.manual_seed(seed)
    student = trained = made(spec)
    if inherits:
        ours, theirs = (([model[name] for name in ("strategy", *LORA)]) for model in (spec, fixed["model"]))
        cli.check((ours == theirs, f"--student_init=teacher: the teacher was trained with strategy and lora_* {theirs}, not {ours}"))
        kept = kept_of(checkpoint.load(teacher_folder / "best")[0], choose_from, spec["layers"])
        heads = {name: tensor for name, tensor in checkpoint.trained_tensors(student).items() if name.startswith("exit_heads.")}
        checkpoint.restore(student, kept | heads, teacher_folder / "best")
    ranks = ranker(lambda: student.user_encoder(half), student.item_table, splits, eval_batch_size, where)

    def frozen_teacher() -> Callable[[torch.Tensor], Output]:
        frozen = made(fixed["model"])
        checkpoint.restore(frozen, checkpoint.load(teacher_folder / "best")[0], teacher_folder / "best")
        frozen.regroup(distill_block)
        return frozen.requires_grad_(False).encoder(half)

    waited = None
    if not aligned:
        wanted = lambda rows, history: None
    elif online:
        everywhere = {} if layer_selection in cli.LAYER_WORDS else {"layer_selection": "first"}  # a list names the student's layers
        together = made(specified(flags["llama_decoder_nums_teacher"], exits, **everywhere))
        trained = torch.nn.ModuleDict({"student": student, "teacher": together})
        wanted = lambda rows, history: together(history)
    elif cache is None:
        live = frozen_teacher()
        wanted = lambda rows, history: live(history)
    else:
        identity = {
            **inputs.hashes, "weights_sha256": teacher_weights, "base": base.identity(location), "bf16": half,
            "model": fixed["model"], "distill_block": distill_block, "train_targets": train_targets, "max_seq_length": flags["max_seq_length"],
        }  # fmt: skip
        asked = time.perf_counter()
        states = teacher_states.open_or_build(cache, identity, frozen_teacher, samples, eval_batch_size, where)
        waited = time.perf_counter() - asked
        wanted = lambda rows, history: Output(*states.rows(rows, where))

    def loss_fn(rows):
        history, target = samples.histories(rows).to(where), samples.targets(rows).to(where)
        teacher_output = wanted(rows, history)
        return recommendation_loss(
            student(history), teacher_output, table, target, train_teacher=online, **{name: flags[name] for name in LOSS}
        )

    fitted = None
    if not eval_only:
        runlog.start(folder, config, resume, overwrite)
        fitted = training.fit(
            module=trained, loss_fn=loss_fn, counts=samples.counts(every_position=False), ranks_of=ranks,
            users_of=lambda rows: sequences.users_of(inputs.data, samples, rows), folder=folder,
            log=MetricsLog(folder, tensorboard), meta={"layers": spec["layers"]}, resume=resume, bf16=half, **training.settings(flags),
        )  # fmt: skip
    weights, _ = checkpoint.load(folder / "best")
    if flags["distill_mode"] == "online":  # both were trained; the student's part is the product
        weights = {name.removeprefix("student."): tensor for name, tensor in weights.items() if not name.startswith("teacher.")}
    checkpoint.restore(student, weights, folder / "best")
    about = runlog.about(folder, "student", student, fitted, checkpoint.weights_sha256(folder / "best"), teacher_states_seconds=waited)
    about |= {"candidates": splits["test"].candidate_counts()}
    return finish(folder, ranks, about)


if __name__ == "__main__":
    cli.run(main)
