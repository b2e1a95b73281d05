"""Step 3: train the teacher, the first M layers of a LLaMA over projected SASRec item embeddings.

    python finetune.py                  # demo domain: a minute on 2 cores, sampled HR@10 .71
    python finetune.py --max_steps 20 --output_dir runs/try        # a few seconds, to see it run
    python finetune.py --domain_type cloth --base_model meta-llama/Llama-2-7b-hf \
        --learning_rate 1e-3 --num_epochs 3 --warmup_steps 100
    python finetune.py --domain_type cloth --base_model small --llama_decoder_nums 4 --num_epochs 5
    python finetune.py --sasrec_lambda 3 --sasrec_temperature 2 --output_dir runs/kl   # SASRec's KL
    python finetune.py --domain_type cloth --eval_only             # metrics of best/ again

Reads data/<domain>.csv and output/<domain>/sasrec_item.pkl; writes output/<domain>/teacher/.
"""

from engine import cli
from utils import flags


@cli.command
def main(
    *,
    files: flags.TeacherFiles,
    prompt: flags.Prompt,
    llm: flags.TeacherLLM,
    lora: flags.LoRA,
    loss: flags.TeacherLoss,
    training: flags.Training,
    evaluation: flags.Evaluation,
    runtime: flags.LLMRuntime,
) -> dict:
    """Train a teacher (or, with fewer layers, a small model without distillation)."""
    # 1. The request. No torch yet: a wrong one ends here, in one line.
    from datasets.domain import Domain, cache_folder
    from datasets.inputs import read_inputs
    from datasets.prompts import read_template, tokenise
    from engine.run import Run
    from models.selection import equal_blocks

    domain = Domain.of(files)
    sasrec_runs = domain.sasrec_runs(files, loss, runtime)
    n_blocks = loss.distill_block if loss.uses_exits and not runtime.eval_only else 1
    ends = equal_blocks(llm.llama_decoder_nums, n_blocks)
    template = read_template(prompt.prompt_template_name)
    folder = domain.run_folder("teacher", files.output_dir)
    cache = cache_folder(files.teacher_cache, folder)
    inputs = read_inputs(files)
    files, training = inputs.settled(files, training)
    groups = files, prompt, llm, lora, loss, training, evaluation, runtime
    run = Run.open("teacher", folder, groups, inputs, {"sasrec": sasrec_runs})
    if run.finished and not run.eval_only:
        return run.print_results()
    files, prompt, llm, lora, loss, training, evaluation, runtime = run.groups

    # 2. Data.
    import torch

    from models import losses, teachers
    from models.base import open_base
    from models.llm4rec import LLM4Rec, specify
    from utils.evaluation import finish
    from utils.training import fit

    device = run.choose_device()
    data = inputs.load(prompt, training, evaluation, device)
    if run.eval_only:
        model = LLM4Rec.load(run, data.item_table, run.bf16).move(device, runtime.shard)
        return finish(run, model, data, runtime)

    # 3. The model, and SASRec where it is a teacher.
    base = open_base(prompt.base_model)
    ids = tokenise(template, base.location)
    spec = specify(base, prompt, ids, llm, lora, ends, loss.uses_exits, loss.exit_norm)
    flags.report_lora(lora, llm, spec)
    run.prepare(**inputs.about, **base.describe(), model=spec)
    torch.manual_seed(run.seed)
    options = runtime.gradient_checkpointing, runtime.compile
    model = LLM4Rec.build(base, data.item_table, spec, run.bf16, *options)
    model.start("base", None, run.source, spec, base).move(device, runtime.shard)
    sasrec = teachers.sasrec(sasrec_runs, data, cache, run, runtime)

    # 4. The method: L = L_ce, + lambda3 L_ms with exits, + SASRec's KL.
    table, how = data.item_table, loss.block_reduction

    def loss_fn(batch):
        m = model(batch.history)  # user [B, D], states [B, E, H], exits [B, E - 1, D]
        v = sasrec(batch)  # user [B, D], or None
        parts = {"ce": (1.0, losses.next_item(m.user, table, batch.target))}
        if m.exits.shape[1]:
            exits = losses.exit_supervision(m.exits, table, batch.target, how)
            parts["exits"] = loss.cls_multiple_lambda, exits
        if v is not None:
            kl = losses.user_kl(v.user, m.user, table, loss.sasrec_temperature)
            parts["sasrec_kl"] = loss.sasrec_lambda, kl
        return losses.weighted_sum(parts)  # every part, and "total"

    with run.training():
        fitted = fit(run, model, loss_fn, model, data, training, runtime)
    return finish(run, model.restore(run), data, runtime, fitted)


if __name__ == "__main__":
    cli.run(main)
