"""Step 4: distil the teacher into a student with fewer layers, block by block, with several exits.

    python distill.py                   # demo domain: a minute on 2 cores, sampled HR@10 .71
    python distill.py --max_steps 20 --output_dir runs/try         # a few seconds, to see it run
    python distill.py --domain_type cloth --learning_rate 3e-3 --max_steps 1500
    python distill.py --domain_type cloth --eval_only              # metrics of best/ again

Cross-entropy alone, without a teacher; online; other weights over the same cached teacher:

    python distill.py --output_dir runs/ce --distill_lambda 0 --norm_lambda 0 \
        --cls_multiple_lambda 0
    python distill.py --distill_mode online --output_dir runs/online
    python distill.py --distill_lambda 0.5 --output_dir runs/half

SASRec as a second teacher, or as the only one:

    python distill.py --sasrec_lambda 1 --output_dir runs/both
    python distill.py --sasrec_lambda 1 --output_dir runs/sasrec_kl --distill_lambda 0 \
        --norm_lambda 0 --cls_multiple_lambda 0

Reads data/<domain>.csv, output/<domain>/sasrec_item.pkl and output/<domain>/teacher/; writes
output/<domain>/student/ and, once per teacher and block map, the teacher's states on the training
samples beside the teacher's folder: output/<domain>/teacher_states/. SASRec is read from
output/<domain>/sasrec/.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

from utils import cli, flags


# Where a teacher's output comes from: (indices, history) -> Output, Scores or None.
def no_teacher(indices, history):
    return None


def live_teacher(forward, own_samples=None):
    """A teacher that runs in every step, on the student's histories or on its own."""
    if own_samples is None:
        return lambda indices, history: forward(history)
    return lambda indices, history: forward(own_samples.histories(indices))


def cached_teacher(states, device):
    """A frozen teacher that ran once: its outputs on the training samples, from disk."""
    from models.losses import Output

    return lambda indices, history: Output(*states.rows(indices, device))


def mean_scores(outputs, tables):
    """SASRec's scores, or the mean of several: user vectors and item tables side by side."""
    import torch

    from models.losses import Scores

    table = torch.cat(tables, dim=1) if tables[1:] else tables[0]  # [N, D per SASRec]

    def scores(indices, history):
        users = torch.cat([output(indices, history).user for output in outputs], dim=1)
        return Scores(users / len(outputs), table)

    return scores


def read_sasrecs(files, domain):
    """The finished runs that --sasrec names."""
    from utils.run import Run

    folders = (files.sasrec or str(domain.folder / "sasrec")).split(",")
    return [Run.read("sasrec", Path(name.strip()), "--sasrec") for name in folders]


def inherit(teacher, prompt, llm):
    """Flag groups with the teacher's values. A given flag that differs raises UsageError."""
    from utils.run import agree

    source, fixed = f"the teacher in {teacher.folder}", teacher.flags
    depth = {"llama_decoder_nums_teacher": fixed["llama_decoder_nums"]}
    return agree(prompt, fixed, source), agree(llm, depth, source)


def report_unread(files, llm, online, sasrecs):
    """Say which flags have no effect without a trained teacher."""
    unread = ("teacher",) if sasrecs else ("teacher", "teacher_cache")
    cli.report_unused(files, "no trained teacher is read", *unread)
    if not online:
        reason = "no term reads a teacher"
        cli.report_unused(llm, reason, "distill_mode", "llama_decoder_nums_teacher")


@cli.command
def main(
    *,
    files: flags.StudentFiles,
    prompt: flags.Prompt = flags.Prompt(
        base_model=None, prompt_template_name=None, max_seq_length=None
    ),
    llm: flags.StudentLLM = flags.StudentLLM(llama_decoder_nums_teacher=None),
    lora: flags.LoRA,
    loss: flags.DistillationLoss,
    objective: flags.Objective,
    training: flags.Training,
    evaluation: flags.Evaluation,
    runtime: flags.LLMRuntime,
) -> dict:
    """Train a student of N layers, aligned to the teacher's M layers at the ends of B blocks.

    Loss: ce + distill_lambda * align_cos + norm_lambda * align_norm + cls_multiple_lambda * exits +
    logit_lambda * logit_kl + sasrec_lambda * sasrec_kl. Base, prompt, length, data and item
    table must match the teacher's; flags that are not given are inherited. No teacher is needed or
    loaded if all terms that read it have weight 0.
    """
    from datasets.domain import Domain, read_inputs
    from datasets.prompts import read_template
    from utils.run import Run

    domain = Domain.of(files)
    teacher_folder, cache = domain.teacher(files)
    trains = not runtime.eval_only
    from_teacher = llm.student_init in ("adapter", "teacher")
    needs_teacher = trains and (loss.reads_teacher or from_teacher)
    online = needs_teacher and llm.distill_mode == "online"
    offline = needs_teacher and not online
    exits = loss.cls_multiple_lambda > 0
    n_blocks = loss.distill_block if trains and (loss.reads_teacher or exits) else 1
    has_weights = (teacher_folder / "best").is_dir()
    has_cache = cache is not None and cache.is_dir()
    missing = f"teacher not found: {teacher_folder / 'best'}; finetune.py writes it"
    cli.check(
        (
            not (files.init_from and from_teacher and trains),
            "--init_from and --student_init both say where to start; give one of them",
        ),
        cli.divides(training, runtime),
        cli.shards(runtime),
        cli.compiles(runtime),
        cli.blocks(n_blocks, llama_decoder_nums_student=llm.llama_decoder_nums_student),
        (has_weights or has_cache or not offline, f"{missing} (or name a run with --teacher)"),
    )

    teacher_run = Run.read("teacher", teacher_folder, "--teacher") if offline else None
    sasrec_runs = read_sasrecs(files, domain) if trains and loss.sasrec_lambda else []
    if trains and not sasrec_runs:
        cli.report_unused(files, "needs --sasrec_lambda above 0", "sasrec")
    if offline:
        prompt, llm = inherit(teacher_run, prompt, llm)
    elif trains:
        prompt, llm = prompt.filled(), llm.filled()
        print(f"base {prompt.base_model}, without a trained teacher")
        report_unread(files, llm, online, sasrec_runs)
    n_layers, n_teacher = llm.llama_decoder_nums_student, llm.llama_decoder_nums_teacher
    if trains and loss.reads_teacher:
        cli.check(cli.blocks(n_blocks, llama_decoder_nums_teacher=n_teacher))

    folder = Path(files.output_dir or domain.folder / "student")
    groups = files, prompt, llm, lora, loss, objective, training, evaluation, runtime
    run = Run.open("student", folder, *groups)
    if run.eval_only:
        prompt, _, _, _, evaluation = run.recorded(prompt, llm, lora, loss, evaluation)
    start = "adapter" if offline and not files.init_from else "base"
    llm = run.settled(llm, student_init=start)
    reads_weights = offline and llm.student_init != "base" and not run.finished
    cli.check(
        (
            has_weights or not reads_weights,
            f"{missing}; the student starts from its weights, unless --student_init=base",
        )
    )
    template = read_template(prompt.prompt_template_name)
    inputs = read_inputs(files)
    if offline:
        teacher_run.check_same(inputs.hashes, *inputs.sources)
        teacher_run.report_unfinished()
    for sasrec_run in sasrec_runs:
        sasrec_run.check_same({"data_sha256": inputs.data.sha256}, inputs.csv_path)
        sasrec_run.report_unfinished()

    import torch  # imported late: bad flags fail at once

    from datasets import sequences, teacher_states
    from datasets.prompts import tokenise
    from models import base
    from models.llm4rec import Calibration, LLM4Rec, build, specify
    from models.losses import draw_negatives, recommendation_loss
    from models.sasrec import SASRec
    from models.selection import block_ends
    from utils import processes
    from utils.evaluation import ranker
    from utils.training import fit

    teacher_sha256 = teacher_run.weights_sha256() if offline else None
    sasrec_sha256 = [sasrec_run.weights_sha256() for sasrec_run in sasrec_runs]
    taught_by = {"teacher_sha256": teacher_sha256, "sasrec_sha256": ",".join(sasrec_sha256) or None}
    if run.is_finished(inputs.hashes | taught_by):
        return run.results()
    device = processes.choose_device(runtime.device, run.threads)
    bf16 = run.precision(training.bf16, on_cuda=device.type == "cuda")
    location = base.locate(prompt.base_model)
    table = inputs.item_table().to(device)  # [N, D]
    samples, splits = sequences.prepare(inputs.data, training.train_targets, prompt, evaluation)
    ranks_by = ranker(table, splits, runtime.eval_batch_size, device, runtime.shard)
    about = {"users": inputs.data.users, "candidates": splits["test"].candidate_counts()}
    seconds = {"teacher_states_seconds": None}
    if run.eval_only:
        run.check_same(inputs.hashes, *inputs.sources)
        student = LLM4Rec.load(run, table, bf16).place(device, runtime.shard)
        ranks_of = ranks_by(partial(student.user_encoder, bf16))
        return run.finish(student, ranks_of, seconds=seconds, **about)

    # The student.
    taught = teacher_run.config["model"] if offline else None
    same_exits = offline and taught["exit_heads"] and taught["n_blocks"] == n_blocks
    specify_model = partial(
        specify,
        location,
        prompt,
        (taught["prompt_ids"], taught["response_ids"]) if offline else tokenise(template, location),
        lora=lora,
        n_blocks=n_blocks,
        calibration=Calibration(samples.calibration().to(device), table, bf16, training.seed),
        exit_norm=loss.exit_norm,
    )
    spec = specify_model(
        llm,
        n_layers=n_layers,
        exit_heads=exits or (loss.logit_lambda > 0 and same_exits),
        teacher_layers=taught["layers"] if llm.student_init == "teacher" else None,
    )
    if spec["strategy"] == "full":
        cli.report_unused(lora, "the base is trained in full; --train_strategy=lora uses them")
    if loss.reads_teacher and n_teacher < n_layers:
        print(f"the teacher has {n_teacher} layers, fewer than the student's {n_layers}")
    run.prepare(
        domain=inputs.domain.name,
        **inputs.hashes,
        items_from=inputs.items_from,
        **base.describe(prompt.base_model, location),
        bf16=bf16,
        model=spec,
        **taught_by,
        cached=cache is not None,
        teacher=str(teacher_folder) if offline else "online" if online else None,
    )

    def build_model(spec):
        return build(location, table, spec, bf16, runtime.gradient_checkpointing, runtime.compile)

    torch.manual_seed(run.seed)
    student = trained = build_model(spec)
    if llm.student_init == "teacher":
        student.start_from(teacher_run, spec)
    elif llm.student_init == "adapter":
        student.take_ends(teacher_run)
    if run.starts_from:
        student.continue_from(run.starts_from, spec)
    student.place(device, runtime.shard)

    # Its teachers.
    def frozen(load_encoder, identity, own_samples=None, divided=False):
        """A frozen teacher: its outputs on its samples from disk, or live without a cache."""
        if cache is None:
            return live_teacher(load_encoder(), own_samples)
        identity = identity | inputs.hashes | {"train_targets": training.train_targets}
        read = samples if own_samples is None else own_samples
        states = teacher_states.open_or_build(
            cache, identity, load_encoder, read, runtime.eval_batch_size, divided
        )
        return cached_teacher(states, device)

    def load_teacher():
        teacher = LLM4Rec.load(teacher_run, table, bf16)
        teacher.return_states_at(block_ends(n_teacher, n_blocks))
        return teacher.requires_grad_(False).place(device, runtime.shard).encoder(bf16)

    if not loss.reads_teacher:
        teacher_output = no_teacher
    elif online:
        if llm.layer_selection not in flags.LAYER_WORDS:  # a list names the student's layers
            llm = dataclasses.replace(llm, layer_selection="first")
        teacher = build_model(specify_model(llm, n_layers=n_teacher, exit_heads=exits))
        teacher.place(device, runtime.shard)
        trained = torch.nn.ModuleDict({"student": student, "teacher": teacher})
        teacher_output = live_teacher(teacher)
    else:
        identity = {
            "weights_sha256": teacher_sha256,
            "base": base.identity(location),
            "bf16": bf16,
            "model": taught,
            "distill_block": n_blocks,
            "max_seq_length": prompt.max_seq_length,
        }
        started = time.perf_counter()
        teacher_output = frozen(load_teacher, identity, divided=runtime.shard)
        if cache is not None:
            seconds["teacher_states_seconds"] = time.perf_counter() - started

    single_sasrec = len(sasrec_runs) == 1  # it must match the item table; several use their own
    sasrec_outputs, sasrec_tables = [], []
    for sasrec_run, sha256 in zip(sasrec_runs, sasrec_sha256):
        sasrec = SASRec.load(sasrec_run, table if single_sasrec else None).to(device)
        slots = sasrec_run.flags["max_seq_length"]
        identity = {"sasrec_sha256": sha256, "max_seq_length": slots}
        own_samples = dataclasses.replace(samples, max_seq_length=slots)
        sasrec_outputs.append(frozen(sasrec.encoder, identity, own_samples))
        sasrec_tables.append(table if single_sasrec else sasrec.item_table.detach())
    sasrec_scores = mean_scores(sasrec_outputs, sasrec_tables) if sasrec_runs else no_teacher

    def loss_fn(indices):
        history = samples.histories(indices)
        target = samples.targets(indices).to(device)
        teacher = teacher_output(indices, history)
        sasrec = sasrec_scores(indices, history)
        output = student(history)
        negatives = draw_negatives(objective, len(indices), len(table), device)
        return recommendation_loss(output, teacher, table, target, loss, online, sasrec, negatives)

    run.begin()
    ranks_of = ranks_by(partial(student.user_encoder, bf16))
    meta = {"layers": spec["layers"]}
    fitted = fit(run, trained, loss_fn, samples, ranks_of, training, runtime, bf16=bf16, meta=meta)
    student.restore(run)
    return run.finish(student, ranks_of, fitted=fitted, seconds=seconds, **about)


if __name__ == "__main__":
    cli.run(main)
