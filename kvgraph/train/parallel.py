"""Several processes that train one model: FSDP2, on GPUs (NCCL) and CPUs (gloo) alike.

Accelerate provides processes, devices, autocast and trackers. The sharding is PyTorch's own, because Accelerate's plugin
only shards on accelerators, and a cluster should run the code that is tested without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kvgraph.train.config import BFLOAT16, TrainError


def processes(precision: str, tracker: str, folder: Path) -> Accelerator:
    """This process, alone or among those that torchrun started. It computes in float32 or autocasts to bfloat16.

    tracker: "tensorboard", which writes below `folder`, or "wandb".
    """
    if find_spec(tracker) is None:
        raise TrainError(f"{tracker} isn't installed; install it with: pip install {tracker}")
    AcceleratorState._reset_state()  # one program may train twice with different settings
    return Accelerator(
        mixed_precision="bf16" if precision == BFLOAT16 else "no",
        cpu=not torch.cuda.is_available(),
        log_with=tracker,
        project_dir=folder,
    )


def shard(module: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shard parameters, gradients and optimizer state over all processes, layer by layer. Gradients are summed."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(module)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other


def synchronize(module: nn.Module, wanted: bool) -> None:
    """Set whether the next backward pass sums gradients over processes, or leaves that to a later one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


def release(module: nn.Module) -> None:
    """After a forward pass without a backward pass: free the parameters that it gathered of a sharded module."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes; all of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, placed as the parameter is: on its device, and if it is sharded only this process's part."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)
