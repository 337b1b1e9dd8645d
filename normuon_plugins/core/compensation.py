"""Kahan summation of weights in bfloat16 or float16: what rounding loses is kept and added at the next step.

A bfloat16 weight near 1 has neighbors at a distance of 2**-7 above and 2**-8 below: an update of 1e-4 is lost, and so
are a thousand of them. With a compensation of the weight's own dtype the two together hold about 16 bits
(https://arxiv.org/abs/2010.06192; https://optimi.benjaminwarner.dev/kahan_summation/).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The key of what rounding lost in a parameter's state.
COMPENSATION = "kahan_compensation"

COMPENSATED_DTYPES = (torch.bfloat16, torch.float16)


def exact_weight(weight: Tensor, compensation: Tensor) -> Tensor:
    """Return ``weight + compensation`` in float32, a new tensor.

    Args:
        weight: Rounded, any shape.
        compensation: What rounding lost, shape and dtype of ``weight``.
    """
    return weight.to(torch.float32, memory_format=torch.contiguous_format).add_(compensation)


def round_weight(exact: Tensor, weight: Tensor, compensation: Tensor) -> None:
    """Write ``exact`` to ``weight``, rounded to nearest, and what that lost to ``compensation``.

    Args:
        exact: float32. Modified.
        weight: Any shape. Overwritten.
        compensation: Shape and dtype of ``weight``. Overwritten.
    """
    weight.copy_(exact)
    compensation.copy_(exact.sub_(weight))
