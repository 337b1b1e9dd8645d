"""Whether a parameter holds packed or rounded numbers, whatever its dtype says."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantized(parameter: Tensor) -> bool:
    """Return whether the numbers of ``parameter`` are stored in fewer bits than an optimizer could write back.

    The dtype alone does not tell. A quantized tensor of torchao reports that of the weight it stands for (an
    ``Int8Tensor`` says bfloat16), and 4-bit weights of bitsandbytes may be packed into floating-point storage. A
    subclass is known by what it stores: torch asks every wrapper for its inner tensors by ``__tensor_flatten__``, so
    that a DTensor is as quantized as its local tensor, and one that only casts in the forward pass is not.

    Args:
        parameter: Any tensor; no value of it is read, so it may lie on the meta device.

    Example:
        >>> is_quantized(torch.zeros(2, 2)), is_quantized(torch.zeros(2, 2, dtype=torch.int8))
        (False, True)
    """
    if getattr(parameter, "quant_state", None) is not None:  # bitsandbytes, after packing
        return True
    if type(parameter) not in (Tensor, nn.Parameter) and hasattr(parameter, "__tensor_flatten__"):
        names, _ = parameter.__tensor_flatten__()
        inner = [getattr(parameter, name) for name in names]
        return any(is_quantized(part) for part in inner if isinstance(part, Tensor))
    return not _is_trained_in(parameter.dtype)


def _is_trained_in(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1
