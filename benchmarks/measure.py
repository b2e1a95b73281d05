"""What the benchmarks share: timing, models of a shape, a training step.

Legend: B batch, D item width, N items.
"""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from benchmarks.plain import PlainLLM4Rec, plain_twin
from engine import processes
from engine.files import write_json
from models.base import prune_config
from models.llm4rec import LLM4Rec, assemble

DIM = 128  # width of the item table
TARGETS = ["gate_proj", "up_proj", "down_proj"]
RANK = 16


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    synchronize = getattr(torch, device.type).synchronize  # on CPU there is nothing to wait for
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know of where the figures come from."""
    return {
        "device": processes.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_report(folder: Path, name: str, result: dict[str, Any], table: str) -> None:
    """Write the figures as <name>.json and the table as <name>.md into `folder`, and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwrote {folder / name}.json and {name}.md")


class Shape(NamedTuple):
    """What the compared models have in common."""

    config: LlamaConfig
    prompt_ids: list[int]
    response_ids: list[int]
    item_table: Tensor  # [N, D]
    slots: int

    def model(
        self,
        n_layers: int,
        strategy: str,
        n_blocks: int = 1,
        exits: bool = False,
        bf16: bool = False,
        compiled: bool = False,
    ) -> LLM4Rec:
        """Ours, with random weights; LoRA r=16 on the MLP without dropout, or trained in full."""
        torch.manual_seed(0)
        device, half = self.item_table.device, bf16 and strategy == "lora"
        dtype = torch.bfloat16 if half else torch.get_default_dtype()
        with device:
            llama = AutoModel.from_config(prune_config(self.config, range(n_layers)), dtype=dtype)
        spec = {
            "prompt_ids": self.prompt_ids,
            "response_ids": self.response_ids,
            "n_blocks": n_blocks,
            "exit_heads": exits,
            "strategy": strategy,
            "lora_r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "lora_target_modules": TARGETS,
        }
        return assemble(llama, self.item_table, spec, compiled=compiled, bf16=bf16).to(device)

    def twins(self, n_layers: int, strategy: str, **shape: Any) -> tuple[LLM4Rec, PlainLLM4Rec]:
        """Ours and the plain form with the same weights."""
        model = self.model(n_layers, strategy, **shape)
        return model, plain_twin(model, (RANK, RANK, TARGETS) if strategy == "lora" else None)[0]


def training_step(
    model: nn.Module, loss_of: Callable[[Any], Tensor], bf16: bool = False
) -> Callable[..., None]:
    """Loss + backward of every micro-batch, then clip + AdamW of what is trained, once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    device = parameters[0].device
    model.train()

    def step(*micro_batches: Any) -> None:
        for given in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(given)
            (loss / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
