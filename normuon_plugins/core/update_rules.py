"""NorMuon's update of whole matrices, as pure functions of tensors (arXiv 2510.05491, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from normuon_plugins.core.step_size import finite_quotient, matrix_scale, progress_scale

# Entries of the matrices that a CPU scales at once: 2 MiB in float32, the second-level cache of two cores.
CACHED_ENTRIES = 2**19


def update_momentum(momentum_buffer: Tensor, gradient: Tensor, *, momentum: float) -> None:
    """Advance the first moment: ``M <- momentum * M + (1 - momentum) * G``.

    Args:
        momentum_buffer: EMA of the gradients, any shape. Modified in place.
        gradient: Shape of ``momentum_buffer``, any floating dtype. Not modified.
        momentum: Decay per step, in ``[0, 1)``.
    """
    momentum_buffer.lerp_(gradient.to(momentum_buffer.dtype), 1 - momentum)


def nesterov_update(momentum_buffer: Tensor, gradient: Tensor, *, momentum: float) -> Tensor:
    """Return ``momentum * M + (1 - momentum) * G``: the momentum as it would be after the same gradient once more.

    Args:
        momentum_buffer: EMA that already contains ``gradient``. Not modified.
        gradient: Shape of ``momentum_buffer``, any floating dtype. Not modified.
        momentum: Decay per step, in ``[0, 1)``.
    """
    return gradient.to(momentum_buffer.dtype).lerp(momentum_buffer, momentum)


def neuron_rms(orthogonalized: Tensor) -> Tensor:
    """Return the root mean square of every row: shape ``(..., m, 1)`` for ``(..., m, n)``, in float32 or wider."""
    dtype = torch.promote_types(orthogonalized.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(orthogonalized, dim=-1, keepdim=True, dtype=dtype)
    return norm.div_(math.sqrt(orthogonalized.shape[-1]))


def neuron_scale(rms: Tensor, second_momentum_buffer: Tensor, *, beta2: float, eps: float) -> Tensor:
    """Return what every row is multiplied by: one over its running RMS.

    Orthogonalized updates have rows of unequal norm; this gives each neuron its own step size
    (NorMuon, https://arxiv.org/abs/2510.05491, Algorithm 1). ``matrix_scale`` restores the size of the whole matrix.

    Args:
        rms: Of each row of the orthogonalized update, shape ``(..., m, 1)``, see ``neuron_rms``. Not modified.
        second_momentum_buffer: EMA of each row's mean square, shape of ``rms``, float32. Modified in place.
        beta2: Decay per step, in ``[0, 1)``. No bias correction, as in the paper.
        eps: Added to the root, in units of the update.

    Returns:
        New tensor, shape and dtype of ``rms``, finite also for rows that were always zero.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> neuron_scale(torch.tensor([[0.5], [2.0]]), torch.zeros(2, 1), beta2=0.0, eps=0.0)
        tensor([[2.0000],
                [0.5000]])
    """
    if second_momentum_buffer.shape != rms.shape:
        raise ValueError(
            f"rows of RMS {tuple(rms.shape)} need a second_momentum_buffer like it; "
            f"got {tuple(second_momentum_buffer.shape)}."
        )
    second_momentum_buffer.lerp_(rms.square().to(second_momentum_buffer.dtype), 1 - beta2)
    # With eps=0 a row that was always zero would be 0 / 0.
    tiny = torch.finfo(second_momentum_buffer.dtype).tiny
    return second_momentum_buffer.to(rms.dtype).sqrt().add_(eps).clamp_min_(tiny).reciprocal_()


class Direction(NamedTuple):
    """Where a batch of matrices goes, and each neuron's part in it.

    Attributes:
        direction: Shape ``(batch, m, n)``; the parameter moves by ``-lr`` times it.
        rms: RMS of each row of the orthogonalized update, shape ``(batch, m, 1)``, float32 or wider.
        scale: What each row was multiplied by, shape and dtype of ``rms``.
    """

    direction: Tensor
    rms: Tensor
    scale: Tensor


class Progress(NamedTuple):
    """What ``match_progress_adamw`` asks of a batch of matrices besides their orthogonalized update.

    Attributes:
        update: What was orthogonalized, shape ``(batch, m, n)``.
        gradient_mean_square: EMA of the gradient's mean square, advanced, shape ``(batch, 1, 1)``, float32.
        largest_rms: Bound of the direction's RMS, see ``largest_rms``, shape of ``gradient_mean_square``.
    """

    update: Tensor
    gradient_mean_square: Tensor
    largest_rms: Tensor


def scale_neurons(
    orthogonalized: Tensor,
    second_momentum_buffer: Tensor,
    progress: Progress | None = None,
    *,
    normalize: bool,
    beta2: float,
    eps: float,
    adjust_lr_fn: str,
) -> Direction:
    """Scale the neurons, then the matrix: found from a few numbers per row, so that each entry is written once.

    Args:
        orthogonalized: Shape ``(batch, m, n)``. Modified in place.
        second_momentum_buffer: See ``normuon_direction``, as all that follows.
        progress: As there.
        normalize: As there.
        beta2: As there.
        eps: As there.
        adjust_lr_fn: As there.
    """
    scales = partial(_find_scales, normalize=normalize, beta2=beta2, eps=eps, adjust_lr_fn=adjust_lr_fn)
    if orthogonalized.device.type != "cpu" or torch.compiler.is_compiling():
        rms, scale = scales(orthogonalized, second_momentum_buffer, progress)
        return Direction(orthogonalized.mul_(scale), rms, scale)
    # A CPU's loops over two dtypes are slow, so a wide copy serves both passes, of few matrices at a time: the next one
    # takes its memory, which is in the cache (12 x 768 x 768 in bfloat16: 2.6 ms against 22).
    found = []
    size = max(1, CACHED_ENTRIES // max(1, orthogonalized[0].numel()))
    for first in range(0, len(orthogonalized), size):
        part = orthogonalized[first : first + size]
        also = None if progress is None else Progress(*(tensor[first : first + size] for tensor in progress))
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        found.append(scales(wide, second_momentum_buffer[first : first + size], also))
        wide.mul_(found[-1][1])
        if wide is not part:
            part.copy_(wide)
    rms, scale = (torch.cat(column) for column in zip(*found, strict=True))
    return Direction(orthogonalized, rms, scale)


def _find_scales(
    orthogonalized: Tensor,
    second_momentum_buffer: Tensor,
    progress: Progress | None,
    *,
    normalize: bool,
    beta2: float,
    eps: float,
    adjust_lr_fn: str,
) -> tuple[Tensor, Tensor]:
    """Return the RMS of every row, shape ``(batch, m, 1)``, and what it is multiplied by."""
    rms = neuron_rms(orthogonalized)
    scale = neuron_scale(rms, second_momentum_buffer, beta2=beta2, eps=eps) if normalize else torch.ones_like(rms)
    if progress is None:
        size = matrix_scale(rms, rms * scale, orthogonalized.shape[-1], adjust_lr_fn=adjust_lr_fn)
    else:
        # Wide where the orthogonalized update is: on a CPU, whose reductions of bfloat16 are slow.
        update = progress.update.to(orthogonalized.dtype)
        # (batch, m, 1): what each row of the orthogonalized update gains; the neuron step multiplies it.
        gains = (orthogonalized * update).sum(-1, keepdim=True, dtype=rms.dtype)
        square = update.square().sum((-2, -1), keepdim=True, dtype=rms.dtype)
        size = progress_scale(square, progress.gradient_mean_square, (gains * scale).sum(-2, keepdim=True))
        norm = torch.linalg.vector_norm(rms * scale, dim=-2, keepdim=True) / math.sqrt(rms.shape[-2])
        size = torch.minimum(size, finite_quotient(progress.largest_rms.to(norm.dtype), norm))
    scale = scale * size
    return rms, scale.clamp_max_(torch.finfo(scale.dtype).max)  # two finite factors of a row of zeros


Scale = Callable[..., Direction]


def normuon_direction(
    update: Tensor,
    second_momentum_buffer: Tensor,
    *,
    orthogonalize: Callable[[Tensor], Tensor],
    normalize: bool,
    beta2: float,
    eps: float,
    adjust_lr_fn: str,
    scale: Scale = scale_neurons,
    progress: Progress | None = None,
) -> Direction:
    """Turn momentum into the direction that ``lr`` multiplies: orthogonalize, neuron step, rescale.

    Args:
        update: Momentum, shape ``(batch, m, n)``: matrices of one shape. Not modified, unless ``orthogonalize`` does,
            which it may not under ``"match_progress_adamw"``.
        second_momentum_buffer: Shape ``(batch, m, 1)``, float32. Modified in place, unless ``normalize`` is False.
        orthogonalize: Function of ``update`` that returns a tensor of its shape and dtype, new or ``update`` itself.
        normalize: False leaves the neuron step out: plain Muon.
        beta2: See ``neuron_scale``.
        eps: See ``neuron_scale``.
        adjust_lr_fn: See ``matrix_scale`` and ``progress_scale``.
        scale: What follows ``orthogonalize``: ``scale_neurons``, or the same compiled.
        progress: What ``"match_progress_adamw"`` needs besides; its ``update`` is this one.

    Returns:
        A ``Direction``; its ``direction`` is what ``orthogonalize`` returned. Rows of zeros stay zero.

    Raises:
        ValueError: If ``orthogonalize`` returns another shape or dtype.
    """
    orthogonalized = orthogonalize(update)
    if orthogonalized.shape != update.shape or orthogonalized.dtype != update.dtype:
        raise ValueError(
            f"orthogonalize_fn must return a tensor like its input, {tuple(update.shape)} {update.dtype};"
            f" it returned {tuple(orthogonalized.shape)} {orthogonalized.dtype}."
        )
    return scale(
        orthogonalized,
        second_momentum_buffer,
        progress,
        normalize=normalize,
        beta2=beta2,
        eps=eps,
        adjust_lr_fn=adjust_lr_fn,
    )
