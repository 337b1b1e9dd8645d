"""NorMuon's update of whole matrices, as pure functions of tensors (arXiv 2510.05491, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

# Root mean square of AdamW's update on hidden matrices: Liu et al., "Muon is Scalable for LLM Training",
# https://arxiv.org/abs/2502.16982, section 2.2; the paper's Algorithm 1 keeps it.
ADAMW_UPDATE_RMS = 0.2

# How fast the mean square of the gradient forgets, of the rate at which the momentum does. Both begin at zero, and the
# quotient of what they have reached by step t, (1 - 0.95**(t + 1)) / sqrt(1 - 0.98**t), is 0.69 at step 1, 1.01 at step
# 10, 1.18 at its largest (step 34), 1.07 at 100: no step has to be counted to correct it.
MEAN_SQUARE_RATE = 0.4

# How far one step of match_progress_adamw may move a matrix: the root mean square of its singular values, learning rate
# included. Weights have singular values of about 1, so a step changes what a matrix does by some 4 % at most. Of 0.03,
# 0.04 and 0.06 it was the best in pretraining (docs/evidence.md); a tuned fixed size moves 0.03 to 0.044 there.
LARGEST_STEP = 0.04

# What a mean square holds that begins beside a momentum which did not: a run that chose this rule in its middle. The
# first gradient then counts in full.
NO_VALUE = -1.0

# Entries of the matrices that a CPU scales at once: 2 MiB in float32, the second-level cache of two cores.
CACHED_ENTRIES = 2**19

# The size of a step: the RMS of AdamW's in late pretraining, Muon's norm, or what lowers the loss as AdamW's would.
MATCH_PROGRESS = "match_progress_adamw"
ADJUST_LR_FNS = ("match_rms_adamw", "original", MATCH_PROGRESS)


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


def update_mean_square(gradient_mean_square: Tensor, mean_square: Tensor, *, momentum: float | Tensor) -> None:
    """Advance the second moment of whole matrices: ``v <- decay * v + (1 - decay) * mean(G * G)``.

    The decay follows from that of the momentum, ``decay = 1 - 0.4 * (1 - momentum)`` (0.98 for 0.95). Both averages
    begin at zero, and ``match_progress_adamw`` divides one by the root of the other: with this decay the two starts
    cancel (0.7 to 1.2 of the corrected quotient at every step), so that no step has to be counted. Beside a momentum
    that has long begun, the average takes the first mean square as it is.

    Args:
        gradient_mean_square: EMA, any shape, float32; ``NO_VALUE`` where there is none yet. Modified in place.
        mean_square: Of this step's gradient, shape of ``gradient_mean_square``. Not modified.
        momentum: Decay of the first moment, in ``[0, 1)``; a tensor where it is not the same for all.
    """
    mean_square = mean_square.to(gradient_mean_square.dtype)
    before = torch.where(gradient_mean_square < 0, mean_square, gradient_mean_square)
    gradient_mean_square.copy_(before.lerp_(mean_square, MEAN_SQUARE_RATE * (1 - momentum)))


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


def matrix_scale(rms_before: Tensor, rms_after: Tensor, cols: int, *, adjust_lr_fn: str) -> Tensor:
    """Return what the whole matrix is multiplied by, so that one learning rate serves all shapes.

    Args:
        rms_before: RMS of each row before the neuron step, shape ``(..., m, 1)``.
        rms_after: The same after it.
        cols: ``n``, the length of a row.
        adjust_lr_fn: ``"match_rms_adamw"``: to an RMS of 0.2, AdamW's (the paper). ``"original"``: to the norm
            before the neuron step, times ``sqrt(max(1, m / n))`` (the authors' code, Keller Jordan's factor).

    Returns:
        Shape ``(..., 1, 1)``, finite.

    Raises:
        ValueError: If ``adjust_lr_fn`` is neither; for ``"match_progress_adamw"`` see ``progress_scale``.
    """
    rows = rms_after.shape[-2]
    norm: Tensor = torch.linalg.vector_norm(rms_after, dim=-2, keepdim=True)  # of the matrix, divided by sqrt(n)
    if adjust_lr_fn == "match_rms_adamw":
        size = torch.full_like(norm, ADAMW_UPDATE_RMS * math.sqrt(rows))
    elif adjust_lr_fn == "original":
        size = torch.linalg.vector_norm(rms_before, dim=-2, keepdim=True) * math.sqrt(max(1.0, rows / cols))
    else:
        raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is not known; use one of {ADJUST_LR_FNS}.")
    return _finite_quotient(size, norm)


def largest_rms(lr: float | Tensor, rows: int, cols: int) -> float | Tensor:
    """Return the largest RMS of a direction under ``match_progress_adamw``, which ``lr`` multiplies.

    A matrix of RMS ``r`` whose singular values are equal has ``r * sqrt(max(m, n))`` in each of them: times ``lr`` that
    is bounded by ``LARGEST_STEP``. A learning rate at which the fixed RMS of 0.2 moves farther gives that RMS: an
    ill-judged rate is never worse than under ``"match_rms_adamw"``.

    Args:
        lr: Learning rate; a tensor where it is one, or differs within a batch.
        rows: ``m``.
        cols: ``n``.

    Returns:
        A number, or a tensor of the shape of ``lr``; at ``lr=0`` infinite.
    """
    bound = LARGEST_STEP / math.sqrt(max(rows, cols))
    if isinstance(lr, Tensor):
        return (bound / lr).clamp_min(ADAMW_UPDATE_RMS)
    return max(ADAMW_UPDATE_RMS, bound / lr) if lr else math.inf


def progress_scale(update_square: Tensor, gradient_mean_square: Tensor, decrease: Tensor) -> Tensor:
    """Return what the whole matrix is multiplied by, so that a step lowers the loss as AdamW's would.

    To first order, AdamW with one second moment ``v`` for the whole matrix ``M`` moves by ``lr * M / sqrt(v)`` and
    lowers the loss by ``lr * <M, M> / sqrt(v)``; a step ``lr * s * N`` lowers it by ``lr * s * <N, M>``. They agree for
    the ``s`` that is returned. Gradients that are noise of full rank give an RMS of 0.2, the constant of
    ``"match_rms_adamw"``; gradients of few directions, as in fine-tuning, give three to nine times as much.

    Args:
        update_square: ``<M, M>``, of what was orthogonalized, shape ``(..., 1, 1)``, at least float32.
        gradient_mean_square: ``v``, shape of ``update_square``; see ``update_mean_square``.
        decrease: ``<N, M>``, what a step along the direction ``N`` gains, shape of ``update_square``.

    Returns:
        Shape of ``update_square``, finite. Zero where the gradient is or was always zero, and where a step along ``N``
        would not lower the loss (a custom ``orthogonalize_fn``).
    """
    divisor = gradient_mean_square.to(update_square.dtype).sqrt() * decrease
    return _finite_quotient(update_square, divisor).masked_fill(divisor <= 0, 0.0)


def _finite_quotient(size: Tensor, divisor: Tensor) -> Tensor:
    """Return ``size / divisor`` within the range of the dtype.

    Zero times infinity is NaN, and torch's checkpointing steps once with zero gradients.
    """
    limits = torch.finfo(divisor.dtype)
    quotient: Tensor = (size / divisor.clamp_min(limits.tiny)).clamp_max_(limits.max)
    return quotient


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
        size = torch.minimum(size, _finite_quotient(progress.largest_rms.to(norm.dtype), norm))
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
