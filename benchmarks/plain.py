"""The plain form: the padded Hugging Face forward with peft, and the loss as a user would write it.

The readable specification of the teacher and the student. Tests compare the fast forward with it,
benchmarks race it; no script imports it. Legend as in models/llm4rec.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from models.llm4rec import LLM4Rec
from models.losses import Output


class PlainLLM4Rec(nn.Module):
    """[prompt | left-padded items | response] through the library, with an attention mask."""

    def __init__(
        self,
        llama: nn.Module,
        item_table: Tensor,
        prompt_ids: list[int],
        response_ids: list[int],
        block_ends: list[int],
        exit_heads: bool,
        exit_norm: nn.Module | None,
    ) -> None:
        super().__init__()
        width, dim = llama.config.hidden_size, item_table.shape[1]
        self.llama, self.block_ends = llama, block_ends
        self.register_buffer("item_table", item_table)
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids))
        self.register_buffer("response_ids", torch.tensor(response_ids))
        self.adapter = nn.Linear(dim, width)
        self.head = nn.Linear(width, dim, bias=False)
        n_exits = len(block_ends) - 1 if exit_heads else 0
        heads = [nn.Linear(width, dim, bias=False) for _ in range(n_exits)]
        self.exit_heads = nn.ModuleList(heads)
        self.exit_norm = exit_norm or nn.Identity()  # of inner states, the decoder's own

    def forward(self, history: Tensor) -> Output:
        """Left-padded catalogue indices [B, L] -> Output, the same as LLM4Rec's."""
        batch, history = len(history), history.to(self.item_table.device)
        real = history != len(self.item_table)  # [B, L]
        padded = F.pad(self.item_table, (0, 0, 0, 1))  # zeros for the padding
        embed = self.llama.get_input_embeddings()
        prompt = embed(self.prompt_ids).expand(batch, -1, -1)
        response = embed(self.response_ids).expand(batch, -1, -1)
        tokens = torch.cat([prompt, self.adapter(padded[history]), response], dim=1)
        mask = F.pad(real, (prompt.shape[1], response.shape[1]), value=True)
        position = torch.arange(tokens.shape[1], device=tokens.device).expand(batch, -1)
        out = self.llama(
            inputs_embeds=tokens,
            attention_mask=mask.long(),
            position_ids=position,
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        )
        states = torch.stack([out.hidden_states[end][:, -1] for end in self.block_ends], dim=1)
        user = self.head(states[:, -1])
        exits = [head(self.exit_norm(states[:, k])) for k, head in enumerate(self.exit_heads)]
        none = user.new_empty(batch, 0, user.shape[1])
        return Output(user, states, torch.stack(exits, dim=1) if exits else none)


def plain_twin(
    model: LLM4Rec, lora: tuple[int, int, list[str]] | None
) -> tuple[PlainLLM4Rec, dict[str, str]]:
    """A plain model with `model`'s weights, and the map from its parameter names to those.

    Args:
        lora: (r, alpha, targets) of the model's LoRA, None for a model without.
    """
    decoder = model.decoder
    device, precision = model.item_table.device, decoder.llama.embed_tokens.weight.dtype
    with device:  # a base in half precision is never held in single
        llama: nn.Module = AutoModel.from_config(decoder.llama.config, dtype=precision)
    for name, buffer in decoder.llama.named_buffers():
        llama.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer.clone(), persistent=False
        )
    exit_norm = llama.norm if model.exit_norm else None
    prefix = "llama."
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        r, alpha, targets = lora
        options = {
            "lora_dropout": 0.0,
            "target_modules": targets,
            "bias": "none",
            "task_type": "FEATURE_EXTRACTION",
        }
        llama = get_peft_model(llama, LoraConfig(r=r, lora_alpha=alpha, **options))
        prefix = "llama.base_model.model."
    prompt, response = decoder.prompt_ids.tolist(), decoder.response_ids.tolist()
    exits = len(model.exit_heads) > 0, exit_norm
    given = llama, model.item_table, prompt, response, decoder.block_ends, *exits
    plain = PlainLLM4Rec(*given).to(device)
    names = {name: name.replace("decoder.llama.", prefix) for name, _ in model.named_parameters()}
    own = dict(plain.named_parameters())
    if set(names.values()) != set(own):
        raise ValueError(f"parameters differ: {sorted(set(names.values()) ^ set(own))[:4]}")
    for name, parameter in model.named_parameters():
        own[names[name]].data = parameter.detach().clone()
        own[names[name]].requires_grad_(parameter.requires_grad)
    return plain, names


def plain_loss(
    student: Output, teacher: Output | None, item_table: Tensor, target: Tensor
) -> Tensor:
    """distill.py's default loss: ce + sum over blocks of (1 - cos) + 0.1 x distances + ce of the
    exits; ce alone without a teacher.
    """

    def cross_entropy(users: Tensor) -> Tensor:
        return F.cross_entropy((users @ item_table.T).float(), target)

    loss = cross_entropy(student.user)
    if teacher is None:
        return loss
    for k in range(student.states.shape[1]):
        theirs, ours = teacher.states[:, k].float(), student.states[:, k].float()
        loss = loss + (1 - F.cosine_similarity(theirs, ours, dim=-1)).mean()
        loss = loss + 0.1 * (theirs - ours).norm(dim=-1).mean()
    for k in range(student.exits.shape[1]):
        loss = loss + cross_entropy(student.exits[:, k])
    return loss
