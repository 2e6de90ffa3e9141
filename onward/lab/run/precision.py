"""In which numbers a run computes, and how its images lie in memory."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from onward.errors import UsageError
from onward.lab.data.inputs import leaves, mapped
from onward.lab.settings import Setup


def autocast(config: Setup, device: torch.device) -> AbstractContextManager[object]:
    """What a pass of the network runs in: matrix products and convolutions in bfloat16, if that is asked for."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def check(config: Setup, device: torch.device) -> None:
    """Raise a UsageError if the device has no instructions for what is asked of it: it would be slower than in float32."""
    if config.precision == "float32":
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = device.type == "cpu" and _processor_computes_in_bf16()
    if not able:
        why = f"--precision {config.precision}: {device} has no instructions for bfloat16"
        raise UsageError(f"{why} (processors need AVX512-BF16, AMX or Arm's BF16, GPUs Ampere or later): leave it out")


def _processor_computes_in_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def laid_out(config: Setup, module: nn.Module) -> None:
    """Put the weights of convolutions of images into the order that their images have, where it is asked for."""
    for p in module.parameters() if config.channels_last else ():
        if not is_lazy(p) and p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def inputs(config: Setup, x: Any) -> Any:
    """A batch in the order that is asked for. Raises a UsageError if there are no images in it.

    >>> inputs(Setup(channels_last=True), torch.zeros(2, 3, 4, 4)).stride()
    (48, 1, 12, 3)
    """
    if not config.channels_last:
        return x
    if not any(part.dim() == 4 for part in leaves(x).values()):
        shape = ", ".join(str(tuple(part.shape)) for part in leaves(x).values())
        raise UsageError(f"--channels-last: inputs of shape {shape} are no images (N, C, H, W), leave it out")

    def order(part: Tensor) -> Tensor:
        return part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part

    return mapped(x, order)
