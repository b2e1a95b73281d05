"""Step 4: distil the teacher into a student with fewer layers, block by block, supervised at
several exits.

    python distill.py                       # demo domain, after finetune.py: a minute on 2 cores, HR@10 about .71
    python distill.py --max_steps 20        # a few seconds, to see it run
    python distill.py --domain_type cloth --learning_rate 3e-3 --max_steps 1500
    python distill.py --domain_type cloth --distill_lambda 0 --norm_lambda 0 --cls_multiple_lambda 0   # CE, no teacher
    python distill.py --domain_type cloth --distill_mode online --base_model meta-llama/Llama-2-7b-hf
    python distill.py --domain_type cloth --eval_only                   # metrics of best/ again
    python distill.py --domain_type cloth --distill_lambda 0.5 --output_dir runs/half   # the teacher's states are reused

Reads data/<domain>.csv, output/<domain>/sasrec_item.pkl and output/<domain>/teacher/; writes
output/<domain>/student/ and, once per teacher, its states on the training samples beside the
teacher's folder: output/<domain>/teacher_states/.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

from utils import cli
from utils.flags import (
    LAYER_WORDS,
    DistillationLoss,
    Evaluation,
    LLMRuntime,
    LoRA,
    Prompt,
    StudentFiles,
    StudentLLM,
    TeacherLLM,
    Training,
)


# Where the teacher's output comes from: (indices, history) -> Output or None.
def no_teacher(indices, history):
    return None


def running_teacher(forward):
    """Live (a frozen teacher's encoder) or online (the teacher that is trained)."""
    return lambda indices, history: forward(history)


def cached_teacher(states, device):
    from models.losses import Output

    return lambda indices, history: Output(*states.rows(indices, device))


@cli.command
def main(
    *,
    files: StudentFiles,
    prompt: Prompt = Prompt(base_model=None, prompt_template_name=None, max_seq_length=None),
    llm: StudentLLM,
    lora: LoRA,
    loss: DistillationLoss,
    training: Training,
    evaluation: Evaluation,
    runtime: LLMRuntime,
) -> dict:
    """Train a student of N layers, aligned to the teacher's M layers at the ends of B blocks.

    Loss: ce + distill_lambda * align_cos + norm_lambda * align_norm + cls_multiple_lambda * exits +
    logit_lambda * logit_kl. What the teacher fixed (base, prompt, length, data, item table) is
    inherited and may not be contradicted. No teacher is needed or loaded where the weights of all
    terms that read it are 0.
    """
    from datasets.domain import Domain, read_inputs
    from datasets.prompts import Prompt as Texts
    from datasets.prompts import read_template
    from utils.run import Run, agree

    domain = Domain.of(files)
    teacher_folder, cache = domain.teacher(files)
    trains = not runtime.eval_only
    from_teacher = trains and llm.student_init == "teacher"
    needs_teacher = trains and (loss.reads_teacher or from_teacher)
    online = needs_teacher and loss.distill_mode == "online"
    offline = needs_teacher and not online
    exits = loss.cls_multiple_lambda > 0
    n_blocks = loss.distill_block if trains and (loss.reads_teacher or exits) else 1
    there = (teacher_folder / "best").is_dir() or (cache is not None and cache.is_dir())
    cli.check(
        cli.divides(training, runtime),
        cli.blocks(n_blocks, llama_decoder_nums_student=llm.llama_decoder_nums_student),
        (
            not (online and from_teacher),
            "--student_init=teacher starts from a trained teacher: use --distill_mode=offline",
        ),
        (
            there or not offline,
            f"teacher not found: {teacher_folder / 'best'}; finetune.py writes it"
            " (or name a run with --teacher)",
        ),
    )

    # What an earlier stage fixed is inherited; a flag that contradicts it is refused.
    if offline:
        teacher_run = Run.read("teacher", teacher_folder, "--teacher")
        source, fixed = f"the teacher in {teacher_folder}", teacher_run.flags
        prompt = agree(prompt, fixed, source)
        llm = agree(llm, {"llama_decoder_nums_teacher": fixed["llama_decoder_nums"]}, source)
        depth = f"llama_decoder_nums_teacher {llm.llama_decoder_nums_teacher}"
        shown = [*(f"{name} {value}" for name, value in prompt.values().items()), depth]
        print(f"inherited from {source}: {', '.join(shown)}", flush=True)
    elif trains:
        prompt = prompt.filled()
        depth = llm.llama_decoder_nums_teacher or TeacherLLM().llama_decoder_nums
        llm = dataclasses.replace(llm, llama_decoder_nums_teacher=depth)
    if loss.reads_teacher and trains:
        depth = llm.llama_decoder_nums_teacher
        cli.check(cli.blocks(n_blocks, llama_decoder_nums_teacher=depth))

    folder = Path(files.output_dir or domain.folder / "student")
    groups = files, prompt, llm, lora, loss, training, evaluation, runtime
    run = Run.open("student", folder, *groups)
    if run.eval_only:
        prompt, _, _, _, evaluation = run.recorded(prompt, llm, lora, loss, evaluation)
    template = read_template(prompt.prompt_template_name)
    inputs = read_inputs(files)
    if offline:
        teacher_run.check_same(inputs.hashes, inputs.table_path)
        teacher_run.report_unfinished()

    import torch  # late, so that a wrong request is answered at once

    from datasets import sequences, teacher_states
    from datasets.prompts import tokenise
    from models import base
    from models.llm4rec import LLM4Rec, build, specify
    from models.losses import recommendation_loss
    from models.selection import CALIBRATION, block_ends, block_influence
    from utils import processes
    from utils.evaluation import ranker
    from utils.training import fit

    teacher_sha256 = teacher_run.weights_sha256() if offline else None
    if run.is_finished(inputs.hashes | {"teacher_sha256": teacher_sha256}):
        return run.results()
    device = processes.choose_device(runtime.device)
    bf16 = run.precision(training.bf16, on_cuda=device.type == "cuda")
    location = base.locate(prompt.base_model)
    table = inputs.item_table().to(device)  # [N, D]
    samples, splits = sequences.prepare(
        inputs.data, training.train_targets, prompt.max_seq_length, evaluation
    )

    def ranks_by(model: LLM4Rec):
        encoder = partial(model.user_encoder, bf16)
        return ranker(encoder, table, splits, runtime.eval_batch_size, device)

    about = {"users": inputs.data.users, "candidates": splits["test"].candidate_counts()}
    if run.eval_only:
        run.check_same(inputs.hashes, inputs.table_path)
        student = LLM4Rec.load(run, table, bf16).to(device)
        return run.finish(student, ranks_by(student), **about)

    taught = teacher_run.config["model"] if offline else None
    prompt_ids = tokenise(template, location) if taught is None else Texts.of(taught)
    calibration = samples.spread(CALIBRATION).to(device)
    specify_model = partial(
        specify,
        location,
        prompt.base_model,
        *prompt_ids,
        lora=lora,
        max_seq_length=prompt.max_seq_length,
        n_blocks=n_blocks,
        influence=partial(
            block_influence, location, *prompt_ids, calibration, table, bf16, training.seed
        ),
    )
    same_exits = taught and taught["exit_heads"] and taught["n_blocks"] == n_blocks
    spec = specify_model(
        llm=llm,
        n_layers=llm.llama_decoder_nums_student,
        exit_heads=exits or bool(loss.logit_lambda and same_exits),
        teacher_layers=taught["layers"] if from_teacher else None,
    )
    if spec["strategy"] == "full":
        cli.report_unused(lora, "the base is trained in full; --train_strategy=lora uses them")
    if loss.reads_teacher and llm.llama_decoder_nums_teacher < llm.llama_decoder_nums_student:
        print(
            f"the teacher has {llm.llama_decoder_nums_teacher} layers,"
            f" fewer than the student's {llm.llama_decoder_nums_student}"
        )
    run.prepare(
        {
            "domain": inputs.domain.name,
            **inputs.hashes,
            "random_base": prompt.base_model in base.BUILT_IN,
            "base": base.contents(location),
            "bf16": bf16,
            "model": spec,
            "teacher_sha256": teacher_sha256,
            "cached": cache is not None,
            "teacher": str(teacher_folder) if offline else "online" if online else None,
        }
    )

    def build_model(spec: dict) -> LLM4Rec:
        return build(location, table, spec, bf16, runtime.gradient_checkpointing).to(device)

    def frozen_teacher():
        teacher = LLM4Rec.load(teacher_run, table, bf16).to(device)
        teacher.return_states_at(block_ends(len(taught["layers"]), n_blocks))
        return teacher.requires_grad_(False).encoder(bf16)

    torch.manual_seed(training.seed)
    student = trained = build_model(spec)
    if from_teacher:
        student.start_from(teacher_run, spec)
    waited = None
    if not loss.reads_teacher:
        teacher_output = no_teacher
    elif online:
        # A list of layers names the student's.
        selection = llm.layer_selection if llm.layer_selection in LAYER_WORDS else "first"
        teacher_llm = dataclasses.replace(llm, layer_selection=selection)
        depth = llm.llama_decoder_nums_teacher
        teacher = build_model(specify_model(llm=teacher_llm, n_layers=depth, exit_heads=exits))
        trained = torch.nn.ModuleDict({"student": student, "teacher": teacher})
        teacher_output = running_teacher(teacher)
    elif cache is None:
        teacher_output = running_teacher(frozen_teacher())
    else:
        identity = {
            **inputs.hashes,
            "weights_sha256": teacher_sha256,
            "base": base.identity(location),
            "bf16": bf16,
            "model": taught,
            "distill_block": n_blocks,
            "train_targets": training.train_targets,
            "max_seq_length": prompt.max_seq_length,
        }
        started = time.perf_counter()
        states = teacher_states.open_or_build(
            cache, identity, frozen_teacher, samples, runtime.eval_batch_size, device
        )
        waited = time.perf_counter() - started
        teacher_output = cached_teacher(states, device)

    def loss_fn(indices):
        history = samples.histories(indices).to(device)
        target = samples.targets(indices).to(device)
        teacher = teacher_output(indices, history)
        return recommendation_loss(
            student(history), teacher, table, target, loss, train_teacher=online
        )

    run.begin()
    meta = {"layers": spec["layers"]}
    fitted = fit(
        run, trained, loss_fn, samples, ranks_by(student), training, runtime, bf16=bf16, meta=meta
    )
    student.restore(run)
    seconds = {"teacher_states_seconds": waited}
    return run.finish(student, ranks_by(student), fitted=fitted, seconds=seconds, **about)


if __name__ == "__main__":
    cli.run(main)
