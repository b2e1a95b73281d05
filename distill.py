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

from typing import TYPE_CHECKING, Literal

from engine import cli
from engine.cli import NonNegativeFloat, PositiveFloat, flag
from utils import flags
from utils.flags import EXITS, USES_BLOCKS, BlockMap, weight

if TYPE_CHECKING:
    from torch import Tensor

    from models.losses import Output


# -- the method: EDIT HERE. A term is a function in models/losses.py, a weight and two lines here --


class StudentLoss(flags.TeacherLoss):
    """The distillation loss, whose sum is in distill.py; a weight of 0 leaves a term out"""

    cls_multiple_lambda: NonNegativeFloat = weight(1.0, EXITS, "L_ms", teacher=False)
    block_map: BlockMap | None = flag(
        None,
        "instead of B equal blocks: where each ends, student:teacher, such as 2:4,4:8",
        needs=USES_BLOCKS,
        replaces="distill_block",
    )
    distill_lambda: NonNegativeFloat = weight(1.0, "weight of the cosine term (lambda1)", "D_cos")
    norm_lambda: NonNegativeFloat = weight(0.1, "weight of the distance term (lambda2)", "D_norm")
    logit_lambda: NonNegativeFloat = weight(
        0.0, "weight of the KL between catalogue softmaxes", "logit KL"
    )
    norm_form: Literal["l2", "squared_l2"] = flag(
        "l2", "the distance: l2 (released) or squared_l2 (paper)", needs="norm_lambda"
    )
    temperature: PositiveFloat = flag(1.0, "temperature of the logit KL", needs="logit_lambda")


def loss_parts(
    s: "Output",
    t: "Output | None",
    v: "Output | None",
    table: "Tensor",
    target: "Tensor",
    loss: StudentLoss,
    online: bool = False,
) -> "dict[str, Tensor]":
    """L = L_ce + lambda1 D_cos + lambda2 D_norm + lambda3 L_ms, and two KLs of ours: the parts by
    name, unweighted, and their weighted sum, "total".

    Args:
        s, t: of student and teacher: user [B, D], states [B, E, H], exits [B, E - 1, D].
        v: of SASRec, user [B, D].
        table: item vectors [N, D]. target: the next items, [B].
        online: whether the teacher is trained too.
    """
    from models import losses

    how = loss.block_reduction
    parts = {"ce": (1.0, losses.next_item(s.user, table, target))}  # name -> weight, value
    if s.exits.shape[1] and loss.cls_multiple_lambda:
        exits = losses.exit_supervision(s.exits, table, target, how)
        parts["exits"] = loss.cls_multiple_lambda, exits
    if t is not None and loss.distill_lambda:
        parts["align_cos"] = loss.distill_lambda, losses.block_cosine(t.states, s.states, how)
    if t is not None and loss.norm_lambda:
        norm = losses.block_distance(t.states, s.states, how, loss.norm_form)
        parts["align_norm"] = loss.norm_lambda, norm
    if t is not None and loss.logit_lambda:
        kl = losses.logit_kl(t, s, table, loss.temperature, how)
        parts["logit_kl"] = loss.logit_lambda, kl
    if v is not None:
        kl = losses.user_kl(v.user, s.user, table, loss.sasrec_temperature)
        parts["sasrec_kl"] = loss.sasrec_lambda, kl
    if t is not None:
        its_exits = loss.cls_multiple_lambda if online else None
        parts |= losses.of_teacher(t, table, target, how, its_exits)
    return losses.weighted_sum(parts)


# -- the script --------------------------------------------------------------------------------


@cli.command
def main(
    *,
    files: flags.StudentFiles,
    prompt: flags.Prompt = flags.FROM_TEACHER,
    llm: flags.StudentLLM,
    lora: flags.LoRA,
    loss: StudentLoss,
    training: flags.Training,
    evaluation: flags.Evaluation,
    runtime: flags.LLMRuntime,
) -> dict:
    """Train a student of N layers, aligned to the teacher's M layers at the ends of B blocks.

    Loss: ce + distill_lambda * align_cos + norm_lambda * align_norm + cls_multiple_lambda * exits +
    logit_lambda * logit_kl + sasrec_lambda * sasrec_kl. Base, prompt, length, data and item
    table must match the teacher's; flags that are not given are inherited. No teacher is needed if
    all terms that read it have weight 0 and the student starts from the base, as it then does.
    """
    # 1. The request. No torch yet: a wrong one ends here, in one line.
    from datasets.domain import Domain, cache_folder
    from datasets.inputs import read_inputs
    from datasets.prompts import read_template, tokenise
    from engine.run import Run
    from models.selection import block_map

    domain, mode = Domain.of(files), flags.teacher_mode(llm, loss, runtime)
    teacher_run = domain.earlier_run("teacher", files.teacher) if mode == "offline" else None
    sasrec_runs = domain.sasrec_runs(files, loss, runtime)
    prompt, llm = flags.inherit(prompt, llm, files, teacher_run, mode, runtime)
    n_blocks = loss.distill_block if loss.uses_blocks and not runtime.eval_only else 1
    n_teacher = llm.llama_decoder_nums_teacher if loss.reads_teacher else None
    student_ends, teacher_ends = block_map(  # EDIT models/selection.py for another one
        llm.llama_decoder_nums_student, n_teacher, n_blocks, loss.block_map
    )
    template = read_template(prompt.prompt_template_name)
    folder = domain.run_folder("student", files.output_dir)
    cache = cache_folder(files.teacher_cache, domain.run_folder("teacher", files.teacher))
    inputs = read_inputs(files)
    files, training = inputs.settled(files, training)
    groups = files, prompt, llm, lora, loss, training, evaluation, runtime
    earlier = {"teacher": [teacher_run] if teacher_run else [], "sasrec": sasrec_runs}
    run = Run.open("student", folder, groups, inputs, earlier)
    if run.finished and not run.eval_only:
        return run.print_results()
    files, prompt, llm, lora, loss, training, evaluation, runtime = run.groups

    # 2. Data: item table [N, D], samples, splits.
    import torch

    from models import teachers
    from models.base import open_base
    from models.llm4rec import LLM4Rec, specify
    from utils.evaluation import finish
    from utils.training import fit

    device = run.choose_device()
    data = inputs.load(prompt, training, evaluation, device)
    if run.eval_only:
        student = LLM4Rec.load(run, data.item_table, run.bf16).move(device, runtime.shard)
        return finish(run, student, data, runtime, teacher_states_seconds=None)

    # 3. The student, and where its teachers' outputs come from.
    base = open_base(prompt.base_model)
    taught = teacher_run.config["model"] if teacher_run else None
    ids = taught and (taught["prompt_ids"], taught["response_ids"])
    ids = ids or tokenise(template, base.location)
    same_exits = taught is not None and teachers.exit_ends(taught) == teacher_ends
    use_exits = loss.uses_exits or (loss.logit_lambda > 0 and same_exits)
    blocks = student_ends, use_exits, loss.exit_norm, teacher_ends if loss.reads_teacher else None
    pool = taught["layers"] if llm.student_init == "teacher" else None
    spec = specify(base, prompt, ids, llm, lora, *blocks, pool)
    flags.report_lora(lora, llm, spec)
    named = str(teacher_run.folder) if teacher_run else mode if mode == "online" else None
    run.prepare(
        **inputs.about, **base.describe(), model=spec, cached=cache is not None, teacher=named
    )
    torch.manual_seed(run.seed)
    options = runtime.gradient_checkpointing, runtime.compile
    student = LLM4Rec.build(base, data.item_table, spec, run.bf16, *options)
    if not run.resume:
        student.start(llm.student_init, teacher_run, run.source, spec, base)
    student.move(device, runtime.shard)

    teacher, online_model, seconds = teachers.none, None, None
    if mode == "offline" and loss.reads_teacher:  # from disk; live with --teacher_cache off
        teacher, seconds = teachers.offline(teacher_run, teacher_ends, data, cache, run, runtime)
    elif mode == "online":
        first = flags.first_layers(llm)  # a list of layers is the student's
        blocks = teacher_ends, loss.uses_exits, loss.exit_norm
        their_spec = specify(base, prompt, ids, first, lora, *blocks)
        online_model = LLM4Rec.build(base, data.item_table, their_spec, run.bf16, *options)
        if run.source:
            online_model.restore(run.source, "teacher")
        teacher = teachers.online(online_model.move(device, runtime.shard))
    sasrec = teachers.sasrec(sasrec_runs, data, cache, run, runtime)

    # 4. The method: the sum above.
    def loss_fn(batch):
        outputs = student(batch.history), teacher(batch), sasrec(batch)
        return loss_parts(*outputs, data.item_table, batch.target, loss, mode == "online")

    trained = student
    if online_model is not None:
        trained = torch.nn.ModuleDict({"student": student, "teacher": online_model})
    with run.training():
        fitted = fit(run, trained, loss_fn, student, data, training, runtime)
    return finish(run, student.restore(run), data, runtime, fitted, teacher_states_seconds=seconds)


if __name__ == "__main__":
    cli.run(main)
