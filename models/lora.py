"""LoRA (Hu et al., 2022) through peft, with a forward that moves less memory."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel

from utils.cli import UsageError

ADAPTER = "default"  # peft's name of the only adapter


class FusedLinear(Linear):
    """peft's layer, its parameters and its mathematics: W x + scale B A dropout(x).

    peft scales and adds over the full output, three passes through memory a projection; here the scale is taken in the
    rank's few columns and the product with B adds to W x by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]; the small weights follow the dtype of what they meet, not the other way round."""
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        low = F.linear(self.lora_dropout[ADAPTER](x), down.to(x.dtype)) * self.scaling[ADAPTER]  # [T, r]
        return torch.addmm(self.base_layer(x), low, up.to(low.dtype).T)


def inject_lora(llama: LlamaModel, r: int, alpha: int, dropout: float, targets: list[str]) -> None:
    """Put LoRA (float32, no bias) on every projection named in `targets`.

    Raises:
        UsageError: a name that matches no module; peft would ignore it.
    """
    names = {name.rpartition(".")[2] for name, module in llama.layers.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise UsageError(f"--lora_target_modules: {', '.join(unknown)} matches no projection; there are {', '.join(sorted(names))}")
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none"), llama)
    for module in llama.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
    for parameter in llama.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
