"""Step 3: train the teacher, the first M layers of a LLaMA over projected SASRec item embeddings.

    python finetune.py                                                   # the demo domain and the built-in tiny base
    python finetune.py --domain_type cloth --base_model meta-llama/Llama-2-7b-hf --learning_rate 3e-3 --max_steps 1500
    python finetune.py --domain_type cloth --base_model small --llama_decoder_nums 4 --num_epochs 5
    python finetune.py --domain_type cloth --eval_only                   # metrics of best/ again

Reads data/<domain>.csv and output/<domain>/sasrec_item.pkl; writes output/<domain>/teacher/.
"""

from pathlib import Path
from typing import Literal

from utils import cli

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
PROTOCOL = ("train_targets", "max_seq_length", "num_candidates", "candidate_seed")
SHAPE = ("max_seq_length", "layer_selection", "interval_nums", "train_strategy", *LORA)
FIXED = (*SHAPE, *PROTOCOL, "base_model", "llama_decoder_nums", "prompt_template_name", "distill_block", "cls_multiple_lambda")


@cli.command
def main(
    *,
    # data and hand-over
    domain_type: str = "demo",
    data_path: str | None = None,
    item_table: str | None = None,
    output_dir: str | None = None,
    train_targets: Literal["last", "all"] = "last",
    max_seq_length: cli.PositiveInt = 30,
    # model
    base_model: str = "tiny",
    llama_decoder_nums: cli.PositiveInt = 8,
    layer_selection: cli.LayerSelection = "first",
    interval_nums: cli.PositiveInt = 1,
    prompt_template_name: str = "alpaca",
    train_strategy: Literal["auto", "lora", "full"] = "auto",
    lora_r: cli.PositiveInt = 16,
    lora_alpha: cli.PositiveInt = 16,
    lora_dropout: cli.DropRate = 0.05,
    lora_target_modules: list[str] = ["gate_proj", "up_proj", "down_proj"],  # noqa: B006  read, never changed
    distill_block: cli.PositiveInt = 4,
    cls_multiple_lambda: cli.NonNegativeFloat = 0.0,
    block_reduction: Literal["sum", "mean"] = "sum",
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
    """Train a teacher (or, with fewer layers, an undistilled small model).

    Args:
        domain_type: the domain.
        data_path: its CSV, wherever it is.
        item_table: step 2's file; output/<domain>/sasrec_item.pkl by default.
        output_dir: this run's folder; output/<domain>/teacher by default.
        train_targets: one target a user (last) or every prefix (all).
        max_seq_length: how many of the last items are read.
        base_model: a Hugging Face id, a local folder, or the built-in random bases tiny and small.
        llama_decoder_nums: M, decoder layers kept.
        layer_selection: which layers: first, interval, last, influence (those that change their input most), or numbers such as 0,2,4,6.
        interval_nums: with interval, one layer in interval_nums + 1 is left out.
        prompt_template_name: templates/<name>.json, or a path to one.
        train_strategy: lora (base frozen) or full; auto is full for the built-in random bases, else lora.
        lora_r, lora_alpha, lora_dropout: LoRA's rank, scale and dropout.
        lora_target_modules: the projections that get LoRA.
        distill_block: B, blocks with an exit at each inner end, used where cls_multiple_lambda > 0.
        cls_multiple_lambda: weight of the exits' cross-entropy; 0 for no exits.
        block_reduction: sum or mean over the exits.
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

    folder = Path(output_dir or f"output/{canonical_domain(domain_type)}/teacher")
    exits = cls_multiple_lambda > 0
    cli.check(
        *([] if eval_only else [cli.divides(micro_batch_size=micro_batch_size, batch_size=batch_size)]),
        cli.blocks(distill_block if exits else 1, llama_decoder_nums=llama_decoder_nums),
    )
    runlog.check_output_dir(folder, "teacher", flags, overwrite=overwrite, eval_only=eval_only)
    if eval_only:
        flags |= runlog.recorded(folder, flags, cli.defaults(main), FIXED)
    texts = read_template(flags["prompt_template_name"])
    inputs = read_inputs(domain_type, data_path, item_table)

    import torch

    from datasets import sequences
    from datasets.prompts import tokenise
    from models import base
    from models.llm4rec import build, specify
    from models.losses import recommendation_loss
    from models.selection import CALIBRATION, block_influence
    from utils import checkpoint, training
    from utils.evaluation import finish, ranker
    from utils.metrics_log import MetricsLog

    where = training.choose_device(device)
    half = where.type == "cuda" if bf16 is None else bf16
    if eval_only:
        half = runlog.recorded_precision(folder, bf16, half)
    location = base.locate(flags["base_model"], [*read_template("alpaca")])
    table = inputs.table()
    samples, splits = sequences.prepare(inputs.data, **{name: flags[name] for name in PROTOCOL})
    if eval_only:
        runlog.check_same(folder, inputs.hashes, inputs.table_path)
        spec = runlog.read_json(folder / "config.json", "run")["model"]
    else:
        ids = tokenise(texts, location)
        spec = specify(
            location, base_model, *ids, kept=llama_decoder_nums, n_blocks=distill_block if exits else 1, exit_heads=exits,
            influence=lambda: block_influence(location, *ids, samples.spread(CALIBRATION).to(where), table, half, seed),
            **{name: flags[name] for name in SHAPE},
        )  # fmt: skip
    config = {
        "step": "teacher", "domain": inputs.domain, **inputs.hashes, "random_base": flags["base_model"] in base.BUILT_IN,
        "base": base.contents(location), "bf16": half, "model": spec, "flags": flags,
    }  # fmt: skip
    resume = not eval_only and runlog.unfinished(folder, config, overwrite)
    if spec["strategy"] == "full":
        runlog.without_effect(flags, cli.defaults(main), LORA, "the base is trained in full; --train_strategy=lora uses them")
    torch.manual_seed(seed)
    model = build(base=location, item_table=table, bf16=half, gradient_checkpointing=gradient_checkpointing, **spec).to(where)
    ranks = ranker(lambda: model.user_encoder(half), model.item_table, splits, eval_batch_size, where)

    def loss_fn(rows):
        out = model(samples.histories(rows).to(where))
        target = samples.targets(rows).to(where)
        return recommendation_loss(
            out,
            None,
            model.item_table,
            target,
            cls_multiple_lambda=cls_multiple_lambda,
            block_reduction=block_reduction,
        )

    fitted = None
    if not eval_only:
        runlog.start(folder, config, resume, overwrite)
        fitted = training.fit(
            module=model, loss_fn=loss_fn, counts=samples.counts(every_position=False), ranks_of=ranks,
            users_of=lambda rows: sequences.users_of(inputs.data, samples, rows), folder=folder,
            log=MetricsLog(folder, tensorboard), meta={"layers": spec["layers"]}, resume=resume, bf16=half, **training.settings(flags),
        )  # fmt: skip
    weights, _ = checkpoint.load(folder / "best")
    checkpoint.restore(model, weights, folder / "best")
    about = runlog.about(folder, "teacher", model, fitted, checkpoint.weights_sha256(folder / "best")) | {"candidates": splits["test"].candidate_counts()}
    return finish(folder, ranks, about)


if __name__ == "__main__":
    cli.run(main)
