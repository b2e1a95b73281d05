"""Shared pieces of the tests: small LLaMAs, small domains, the real data where it is."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the same in every run: same bits

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from datasets.demo import write_demo
from engine import cpu
from engine.errors import RunError, UsageError
from engine.log import SPEED
from models.base import new_decoder
from models.llm4rec import LLM4Rec, assemble

cpu.choose_products()  # as every command does; in all tests alike, whichever runs first

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
TARGETS = ["gate_proj", "up_proj", "down_proj"]
OFF = {"distill_lambda": 0.0, "norm_lambda": 0.0, "cls_multiple_lambda": 0.0}
SHORT = {"max_steps": 3, "eval_batch_size": 64, "batch_size": 32}


def exact_norm(self, x):
    """LLaMA's RMSNorm without its rounding to float32 inside."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.fixture
def float64_norm(monkeypatch):
    """To compare in float64, both forms get a norm that does not round."""
    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm)


def small_config(layers: int = 4, kv_heads: int = 4, **changes) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 60}
    shape |= {"num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    return LlamaConfig(**(shape | {"initializer_range": 0.3} | changes))


def small_model(
    layers: int = 4,
    kv_heads: int = 4,
    strategy: str = "full",
    n_blocks: int = 2,
    exit_heads: bool = True,
    n_items: int = 23,
    dim: int = 6,
    seed: int = 0,
    n_prompt: int = 5,
    n_response: int = 3,
    config: PreTrainedConfig | None = None,
    targets: list[str] = TARGETS,
    **extra,
) -> LLM4Rec:
    torch.manual_seed(seed)
    spec = {
        "prompt_ids": list(range(n_prompt)),
        "response_ids": list(range(50, 50 + n_response)),
        "n_blocks": n_blocks,
        "exit_heads": exit_heads,
        "exit_norm": extra.pop("exit_norm", False),
        "strategy": strategy,
        "lora_r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "lora_target_modules": targets,
    }
    llama = new_decoder(config or small_config(layers, kv_heads))
    model = assemble(llama, torch.randn(n_items, dim), spec, **extra)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start: LoRA would not be felt
                parameter.normal_(std=0.3)
    return model.double()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What needs the house trains, and is slow."""
    for item in items:
        if "house" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def refused(words: str):
    """Expect a UsageError with these words."""
    return pytest.raises(UsageError, match=re.escape(words))


def histories(lengths: list[int], n_items: int = 23, slots: int = 8, seed: int = 1) -> torch.Tensor:
    """Left-padded random histories, [B, slots]."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.full((len(lengths), slots), n_items)
    for row, n in enumerate(lengths):
        batch[row, slots - n :] = torch.randint(0, n_items, (n,), generator=generator)
    return batch


def write_sequences(path: Path, sequences: list, header: str = "reviewerID,asin") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f'u{i},"{items}"' for i, items in enumerate(sequences)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def real(name: str, folder: Path = REAL_DATA) -> Path:
    path = folder / name
    if not path.exists():
        pytest.skip(f"not here: {path}")
    return path


def files(folder: Path) -> set[str]:
    """What is below a folder; locks, which are empty and stay, are left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)) for path in paths}


def log_of(folder: str | Path) -> list[dict]:
    """A run's log without what differs from run to run."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def trained_lines(folder: str | Path) -> list[dict]:
    """The train events of a run's log."""
    return [line for line in log_of(folder) if line["event"] == "train"]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file; of the log without what differs from run to run."""
    found = {}
    for name in sorted(files(folder)):
        content = (folder / name).read_bytes()
        if name.endswith("metrics.jsonl"):
            content = json.dumps(log_of((folder / name).parent)).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def stop_at_step(patch: pytest.MonkeyPatch, n: int, error: Exception | None = None) -> None:
    """Let the n-th optimizer step raise `error`, a RunError by default."""
    step, taken = torch.optim.AdamW.step, []

    def stops(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == n:
            raise error or RunError("stopped here")
        return step(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", stops)


def assert_resumes(patch: pytest.MonkeyPatch, main: Callable, **flags) -> None:
    """whole/, and cut/, which fails in its third step and is resumed, end with the same bytes."""
    main(**flags, output_dir="whole")
    with patch.context() as context:
        stop_at_step(context, 3)
        with pytest.raises(RunError):
            main(**flags, output_dir="cut")
    main(**flags, output_dir="cut")
    assert hashes(Path("cut/last")) == hashes(Path("whole/last"))


def script(
    name: str, *flags: str, cwd: Path = ROOT, status: int = 0, timeout: int = 600, **env: str
) -> subprocess.CompletedProcess:
    """A script of ours, or `-m` and a module, or `-c` and code, as a command."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, name if name.startswith("-") else ROOT / name, *flags]
    options = {"capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run(command, cwd=cwd, env=env, **options)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A folder, with a space in its name, where the four scripts ran once with short flags."""
    folder = tmp_path_factory.mktemp("a house")
    write_demo(folder / "data/demo.csv", n_users=120, n_items=160)
    short = ("--max_steps=3", "--eval_batch_size=64", "--batch_size=32")
    printed = {
        "sasrec": script("train_sr_trad.py", *short, cwd=folder).stdout,
        "table": script("extract_emb.py", cwd=folder).stdout,
        "teacher": script("finetune.py", *short, cwd=folder).stdout,
        "student": script("distill.py", *short, cwd=folder).stdout,
    }
    return folder, printed


@pytest.fixture
def inside(house, tmp_path, monkeypatch):
    """A copy of the house to spoil, as the current folder."""
    shutil.copytree(house[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name: str, *lines: str) -> Path:
    """Write lines into a file of the present folder."""
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(name)
