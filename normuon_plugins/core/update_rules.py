"""NorMuon's update of whole matrices, as pure functions of tensors (arXiv 2510.05491, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Root mean square of AdamW's update on hidden matrices: Liu et al., "Muon is Scalable for LLM Training",
# https://arxiv.org/abs/2502.16982, section 2.2; the paper's Algorithm 1 keeps it.
ADAMW_UPDATE_RMS = 0.2

ADJUST_LR_FNS = ("match_rms_adamw", "original")


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


def normalize_neurons(update: Tensor, second_momentum_buffer: Tensor, *, beta2: float, eps: float) -> Tensor:
    """Divide every row by the running RMS of that row.

    Orthogonalized updates have rows of unequal norm; this gives each neuron its own step size
    (NorMuon, https://arxiv.org/abs/2510.05491, Algorithm 1). The caller restores the norm of the whole matrix.

    Args:
        update: Orthogonalized update, shape ``(..., rows, cols)``. Not modified.
        second_momentum_buffer: EMA of each row's mean square, shape ``(..., rows, 1)``, float32. Modified in place.
        beta2: Decay per step, in ``[0, 1)``. No bias correction, as in the paper.
        eps: Added to the root, in units of the update.

    Returns:
        New tensor, shape and dtype of ``update``. A row of zeros stays zero.

    Raises:
        ValueError: If the shapes disagree.

    Example:
        >>> normalize_neurons(torch.eye(2), torch.zeros(2, 1), beta2=0.0, eps=0.0)
        tensor([[1.4142, 0.0000],
                [0.0000, 1.4142]])
    """
    if second_momentum_buffer.shape != (*update.shape[:-1], 1):
        raise ValueError(
            f"update {tuple(update.shape)} needs a second_momentum_buffer {(*update.shape[:-1], 1)}; "
            f"got {tuple(second_momentum_buffer.shape)}."
        )
    dtype = torch.promote_types(update.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(update, dim=-1, keepdim=True, dtype=dtype).square_().div_(update.shape[-1])
    second_momentum_buffer.lerp_(mean_square.to(second_momentum_buffer.dtype), 1 - beta2)
    # With eps=0 a row that was always zero would be 0 / 0.
    tiny = torch.finfo(second_momentum_buffer.dtype).tiny
    return update.div(second_momentum_buffer.sqrt().add_(eps).clamp_min_(tiny)).to(update.dtype)


def rescale(normalized: Tensor, orthogonalized: Tensor, *, adjust_lr_fn: str) -> Tensor:
    """Give the whole matrix back its size, so that one learning rate serves all shapes.

    Args:
        normalized: Update after the neuron step, shape ``(..., m, n)``. Modified in place.
        orthogonalized: Update before the neuron step, same shape. Not modified; may be ``normalized`` itself.
        adjust_lr_fn: ``"match_rms_adamw"``: to an RMS of 0.2, AdamW's (the paper). ``"original"``: to the norm
            before the neuron step, times ``sqrt(max(1, m / n))`` (the authors' code, Keller Jordan's factor).

    Returns:
        ``normalized``. Zero stays zero.

    Raises:
        ValueError: If ``adjust_lr_fn`` is not known.
    """
    m, n = normalized.shape[-2:]
    norm = _frobenius_norm(normalized)
    if adjust_lr_fn == "match_rms_adamw":
        size = torch.full_like(norm, ADAMW_UPDATE_RMS * math.sqrt(m * n))
    elif adjust_lr_fn == "original":
        size = _frobenius_norm(orthogonalized) * math.sqrt(max(1.0, m / n))
    else:
        raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is not known; use one of {ADJUST_LR_FNS}.")
    # The factor stays finite, since zero times infinity is NaN: torch's checkpointing steps once with zero gradients.
    limits = torch.finfo(norm.dtype)
    return normalized.mul_((size / norm.clamp_min(limits.tiny)).clamp_max_(limits.max))


def normuon_direction(
    update: Tensor,
    second_momentum_buffer: Tensor,
    *,
    orthogonalize: Callable[[Tensor], Tensor],
    normalize: bool,
    beta2: float,
    eps: float,
    adjust_lr_fn: str,
) -> Tensor:
    """Turn momentum into the direction that ``lr`` multiplies: orthogonalize, neuron step, rescale.

    Args:
        update: Momentum, shape ``(batch, m, n)``: matrices of one shape. Not modified.
        second_momentum_buffer: Shape ``(batch, m, 1)``, float32. Modified in place, unless ``normalize`` is False.
        orthogonalize: Function of ``update`` that returns a new tensor of its shape and dtype.
        normalize: False leaves the neuron step out: plain Muon.
        beta2: See ``normalize_neurons``.
        eps: See ``normalize_neurons``.
        adjust_lr_fn: See ``rescale``.

    Returns:
        New tensor, shape and dtype of ``update``. The parameter moves by ``-lr`` times it.

    Raises:
        ValueError: If ``orthogonalize`` returns another shape or dtype.
    """
    orthogonalized = orthogonalize(update)
    if orthogonalized.shape != update.shape or orthogonalized.dtype != update.dtype:
        raise ValueError(
            f"orthogonalize_fn must return a tensor like its input, {tuple(update.shape)} {update.dtype};"
            f" it returned {tuple(orthogonalized.shape)} {orthogonalized.dtype}."
        )
    if not normalize:
        return rescale(orthogonalized, orthogonalized, adjust_lr_fn=adjust_lr_fn)
    normalized = normalize_neurons(orthogonalized, second_momentum_buffer, beta2=beta2, eps=eps)
    return rescale(normalized, orthogonalized, adjust_lr_fn=adjust_lr_fn)


def _frobenius_norm(matrices: Tensor) -> Tensor:
    """Return the norm of each matrix, shape ``(..., 1, 1)``, in float32 or wider."""
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=dtype)
    return norm
