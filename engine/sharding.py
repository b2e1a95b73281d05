"""A model that is divided among the processes of one torchrun (`--shard`), by torch's fully_shard.

Each process holds a part of every weight, gradient and optimizer state. The weights of a layer are
brought together while it computes. A step is the same mathematics as without it, and a checkpoint
holds whole tensors: either kind of run reads what the other wrote.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine import processes


def divide(
    model: nn.Module, layers: Iterable[nn.Module], device: torch.device, method: str
) -> None:
    """Divide a model's parameters, layer by layer, and move them to the device.

    At most one layer, and the parameters outside all layers, are whole at any time. `layers` and
    `model` must be called as modules: torch brings their weights together around the call, and
    around `method` of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (processes.world(),))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
        # utils.training weighs each process's loss by its share of the batch: gradients are summed
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, method)


def divide_again(model: nn.Module) -> None:
    """Divide what a forward left whole: weights copied into that would be lost."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided, any other as it is. All processes must ask for it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, divided as the parameter is; a number stays one."""
    tensor = tensor.to(parameter.device)
    if not is_divided(parameter) or is_divided(tensor) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
