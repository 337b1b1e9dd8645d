"""How large a step is: what a direction is multiplied by before the learning rate, by ``adjust_lr_fn``."""

from __future__ import annotations

import math
from collections.abc import Iterable

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

# The size of a step: the RMS of AdamW's in late pretraining, Muon's norm, or what lowers the loss as AdamW's would.
MATCH_PROGRESS = "match_progress_adamw"
ADJUST_LR_FNS = ("match_rms_adamw", "original", MATCH_PROGRESS)


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
    return finite_quotient(size, norm)


def spread(values: Iterable[tuple[int, float | Tensor]], like: Tensor) -> Tensor:
    """Return every value so many times, shape ``(times,)``, in the dtype and on the device of ``like``.

    A number is written there by the device itself: nothing is copied, and no default dtype or device counts.
    """
    parts = [
        value.to(like.device, like.dtype).view(1).expand(count)
        if isinstance(value, Tensor)
        else like.new_full((count,), value)
        for count, value in values
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def as_scalar(rate: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a learning rate as it may multiply a tensor of any shape on ``device``; a number as it is.

    A scalar on the CPU is read as a number there and may stay. To the CPU it is not copied asynchronously, since it
    would be read before it has arrived.
    """
    if not isinstance(rate, Tensor):
        return rate
    scalar = rate.reshape(())
    if scalar.device.type == "cpu":
        return scalar
    return scalar.to(device, non_blocking=device.type != "cpu")


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
    return finite_quotient(update_square, divisor).masked_fill(divisor <= 0, 0.0)


def finite_quotient(size: Tensor, divisor: Tensor) -> Tensor:
    """Return ``size / divisor`` within the range of the dtype.

    Zero times infinity is NaN, and torch's checkpointing steps once with zero gradients.
    """
    limits = torch.finfo(divisor.dtype)
    quotient: Tensor = (size / divisor.clamp_min(limits.tiny)).clamp_max_(limits.max)
    return quotient
