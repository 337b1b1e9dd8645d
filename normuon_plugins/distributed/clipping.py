"""Clip gradients that lie on several meshes, where torch's own clip_grad_norm_ fails."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normuon_plugins.distributed.placement import compute_device, gradient_block, local, sharding_groups


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients so that their norm, as of one vector, is at most ``max_norm``.

    What ``torch.nn.utils.clip_grad_norm_`` does for plain gradients, for any mixture: FSDP2 over tensor parallel leaves
    parameters on a 2-D mesh beside those on a 1-D one, expert parallel two meshes, and torch adds up neither
    (https://github.com/pytorch/torchtitan/blob/main/torchtitan/distributed/utils.py works around it for experts).

    Args:
        parameters: A tensor or an iterable of them, the same on every rank; DTensors and plain ones. Gradients are
            modified in place.
        max_norm: Largest norm that is left.
        norm_type: Which norm; ``math.inf`` is the largest entry.
        error_if_nonfinite: Raise where the norm is NaN or infinite, before anything is scaled.

    Returns:
        The norm before, a plain tensor of one element, float32 or wider, equal on all ranks. Plain gradients count
        once: ranks are taken to hold the same ones (DDP, or replicated under tensor parallel).

    Raises:
        ValueError: If ``norm_type`` is not above 0.
        RuntimeError: Under ``error_if_nonfinite``, on every rank.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type!r} must be above 0; math.inf is the largest entry.")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not given:
        return torch.tensor(0.0)
    norm = _norm(given, float(norm_type))
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"the gradients' norm of order {norm_type} is {norm.item()}; nothing was clipped.")
    # As in torch: 1e-6 keeps the factor finite, and a factor above 1 becomes 1 without a question to the device.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in given:
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return norm


def _norm(parameters: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all gradients: of the blocks of this rank, then over the ranks that hold other blocks.

    A parameter without a gradient counts with zero, since other ranks may have one and wait.
    """
    blocks: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        norm = torch.zeros((), dtype=torch.float32, device=compute_device(parameter))
        if parameter.grad is not None and local(parameter).numel() > 0:
            block = gradient_block(parameter.grad, parameter)
            norm = torch.linalg.vector_norm(block, order, dtype=torch.promote_types(block.dtype, torch.float32))
        blocks[sharding_groups(parameter)].append(norm.to(compute_device(parameter)))
    return _combine([_over_ranks(_combine(norms, order), groups, order) for groups, norms in blocks.items()], order)


def _combine(norms: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of one vector from those of its parts."""
    dtype = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    parts = torch.stack([norm.to(norms[0].device, dtype) for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(parts, order)
    return norm


def _over_ranks(norm: Tensor, groups: Sequence[dist.ProcessGroup], order: float) -> Tensor:
    """Return the norm of one vector from that of each rank's part, of which ``groups`` hold different ones."""
    if math.isinf(order):
        for group in groups:
            dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    powers = norm.pow(order)
    for group in groups:
        dist.all_reduce(powers, dist.ReduceOp.SUM, group=group)
    return powers.pow(1 / order)
