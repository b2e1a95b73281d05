"""LoRA (Hu et al., 2022) through peft, with a forward that moves less memory."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import UsageError

ADAPTER = "default"  # peft's name of the only adapter


class FusedLinear(Linear):
    """peft's layer, its parameters and its mathematics: W x + scale B A dropout(x).

    peft scales and adds over the full output: three passes through memory per projection. Here the
    scale is applied to the few columns of the rank, and the product with B adds to W x in the same
    call.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out].

        The small weights take the dtype of their input, not the other way round.
        """
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        low = F.linear(self.lora_dropout[ADAPTER](x), down.to(x.dtype))  # [T, r]
        low = low * self.scaling[ADAPTER]
        return torch.addmm(self.base_layer(x), low, up.to(low.dtype).T)


def inject_lora(
    llama: PreTrainedModel, r: int, alpha: int, dropout: float, targets: list[str]
) -> None:
    """Put LoRA (float32, no bias) on every projection named in `targets`. Raises UsageError: a name
    matches no module; peft would ignore it.
    """
    linear = [n for n, module in llama.layers.named_modules() if isinstance(module, nn.Linear)]
    names = {name.rpartition(".")[2] for name in linear}
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise UsageError(
            f"--lora_target_modules: {', '.join(unknown)} matches no projection;"
            f" there are {', '.join(sorted(names))}"
        )
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none"
    )
    inject_adapter_in_model(config, llama)
    for module in llama.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
    for parameter in llama.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
