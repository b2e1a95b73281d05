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

import dataclasses
from functools import partial
from pathlib import Path

from utils import cli, flags


@cli.command
def main(
    *,
    files: flags.TeacherFiles,
    prompt: flags.Prompt,
    llm: flags.TeacherLLM,
    lora: flags.LoRA,
    exits: flags.TeacherLoss = flags.TeacherLoss(cls_multiple_lambda=0.0),
    objective: flags.Objective,
    training: flags.Training,
    evaluation: flags.Evaluation,
    runtime: flags.LLMRuntime,
) -> dict:
    """Train a teacher (or, with fewer layers, a small model without distillation)."""
    from datasets.domain import Domain, read_inputs
    from datasets.prompts import read_template
    from utils.run import Run

    exit_heads = exits.cls_multiple_lambda > 0
    n_blocks = exits.distill_block if exit_heads else 1
    cli.check(
        cli.divides(training, runtime),
        cli.shards(runtime),
        cli.compiles(runtime),
        cli.blocks(n_blocks, llama_decoder_nums=llm.llama_decoder_nums),
    )
    folder = Path(files.output_dir or Domain.of(files).folder / "teacher")
    groups = files, prompt, llm, lora, exits, objective, training, evaluation, runtime
    run = Run.open("teacher", folder, *groups)
    if run.eval_only:
        prompt, _, _, _, evaluation = run.recorded(prompt, llm, lora, exits, evaluation)
    template = read_template(prompt.prompt_template_name)
    inputs = read_inputs(files)
    sasrec_run, taught_by = None, {}
    if exits.sasrec_lambda and not run.eval_only:
        named = Path(files.sasrec or inputs.domain.folder / "sasrec")
        sasrec_run = Run.read("sasrec", named, "--sasrec")
        sasrec_run.check_same({"data_sha256": inputs.data.sha256}, inputs.csv_path)
        sasrec_run.report_unfinished()
        taught_by = {"sasrec_sha256": sasrec_run.weights_sha256()}
    if run.is_finished(inputs.hashes | taught_by):
        return run.results()

    import torch  # imported late: bad flags fail at once

    from datasets import sequences
    from datasets.prompts import tokenise
    from models import base
    from models.llm4rec import Calibration, LLM4Rec, build, specify
    from models.losses import Scores, draw_negatives, recommendation_loss
    from models.sasrec import SASRec
    from utils import processes
    from utils.evaluation import ranker
    from utils.training import fit

    device = processes.choose_device(runtime.device, run.threads)
    bf16 = run.precision(training.bf16, on_cuda=device.type == "cuda")
    location = base.locate(prompt.base_model)
    table = inputs.item_table().to(device)  # [N, D]
    samples, splits = sequences.prepare(inputs.data, training.train_targets, prompt, evaluation)
    ranks_by = ranker(table, splits, runtime.eval_batch_size, device, runtime.shard)
    about = {"users": inputs.data.users, "candidates": splits["test"].candidate_counts()}
    if run.eval_only:
        run.check_same(inputs.hashes, *inputs.sources)
        model = LLM4Rec.load(run, table, bf16).place(device, runtime.shard)
        return run.finish(model, ranks_by(partial(model.user_encoder, bf16)), **about)

    ids = tokenise(template, location)
    depth = llm.llama_decoder_nums
    calibration = Calibration(samples.calibration().to(device), table, bf16, training.seed)
    spec = specify(
        location,
        prompt,
        ids,
        llm,
        lora,
        depth,
        n_blocks,
        exit_heads,
        calibration,
        exit_norm=exits.exit_norm,
    )
    if spec["strategy"] == "full":
        cli.report_unused(lora, "the base is trained in full; --train_strategy=lora uses them")
    base_about = base.describe(prompt.base_model, location)
    run.prepare(
        domain=inputs.domain.name,
        **inputs.hashes,
        items_from=inputs.items_from,
        **base_about,
        bf16=bf16,
        model=spec,
        **taught_by,
    )
    torch.manual_seed(run.seed)
    model = build(location, table, spec, bf16, runtime.gradient_checkpointing, runtime.compile)
    if run.starts_from:
        model.continue_from(run.starts_from, spec)
    model.place(device, runtime.shard)

    if sasrec_run is not None:
        slots = sasrec_run.flags["max_seq_length"]
        own_samples = dataclasses.replace(samples, max_seq_length=slots)
        encode = SASRec.load(sasrec_run, table).to(device).encoder()

    def sasrec_scores(indices):
        if sasrec_run is None:
            return None
        with torch.autocast(device.type, enabled=False):  # float32, as a cached one is
            return Scores(encode(own_samples.histories(indices)).user, table)

    def loss_fn(indices):
        output = model(samples.histories(indices))
        target = samples.targets(indices).to(device)
        sasrec = sasrec_scores(indices)
        negatives = draw_negatives(objective, len(indices), len(table), device)
        return recommendation_loss(
            output, None, table, target, exits, sasrec=sasrec, negatives=negatives
        )

    run.begin()
    ranks_of = ranks_by(partial(model.user_encoder, bf16))
    meta = {"layers": spec["layers"]}
    fitted = fit(run, model, loss_fn, samples, ranks_of, training, runtime, bf16=bf16, meta=meta)
    model.restore(run)
    return run.finish(model, ranks_of, fitted=fitted, **about)


if __name__ == "__main__":
    cli.run(main)
