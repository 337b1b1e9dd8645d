"""Newton-Schulz: the orthogonal factor of a matrix from multiplications alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]


class Preset(NamedTuple):
    """A named Newton-Schulz iteration.

    Attributes:
        polynomials: ``(a, b, c)`` of each step; past the last one, it is repeated.
        margin: The input is divided by ``margin`` times its Frobenius norm.
    """

    polynomials: tuple[Polynomial, ...]
    margin: float


PRESETS = {
    # Keller Jordan, https://kellerjordan.github.io/posts/muon/: steepest slope at zero; singular values end in about
    # [0.7, 1.2].
    "muon": Preset(((3.4445, -4.7750, 2.0315),), margin=1.0),
    # Amsel et al., "The Polar Express", https://arxiv.org/abs/2505.16932, Algorithm 2 for five steps from 1e-3, with
    # the safety factor 1.02 and cushion 0.02 of https://github.com/KellerJordan/modded-nanogpt.
    "polar_express": Preset(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
    ),
}


def resolve_preset(ns_coefficients: str | Sequence[float]) -> Preset:
    """Return the iteration that ``ns_coefficients`` names.

    Args:
        ns_coefficients: A key of ``PRESETS``, or three numbers ``(a, b, c)`` as in ``torch.optim.Muon``.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in PRESETS:
            raise ValueError(
                f"ns_coefficients={ns_coefficients!r} is not known; use one of {sorted(PRESETS)} or three numbers."
            )
        return PRESETS[ns_coefficients]
    if len(ns_coefficients) != 3:
        raise ValueError(f"ns_coefficients={ns_coefficients!r} must be a preset's name or three numbers (a, b, c).")
    a, b, c = (float(coefficient) for coefficient in ns_coefficients)
    return Preset(((a, b, c),), margin=1.0)


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where ``device`` multiplies it fast, else float32.

    CUDA does, and CPUs with AMX or AVX512-BF16. Elsewhere bfloat16 is emulated: 1.2 GFLOP/s against 131 in float32 for
    512 x 512 matrices on a 2-core AVX2 machine (torch 2.13).
    """
    if device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False):
            return torch.bfloat16
    return torch.float32


def multiplications(rows: int, cols: int, ns_steps: int) -> int:
    """Return how many scalar multiplications ``orthogonalize`` takes for one matrix: three products a step."""
    short, long = sorted((rows, cols))
    return ns_steps * (2 * short * short * long + short**3)


def orthogonalize(
    matrices: Tensor,
    *,
    ns_coefficients: str | Sequence[float] = "muon",
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
) -> Tensor:
    """Move every singular value of every matrix near one, keeping the singular vectors.

    The quintic iteration ``X <- a X + b A X + c A A X`` with ``A = X X^T`` on ``X / ||X||_F``, transposed when that
    makes ``A`` smaller (Jordan et al., https://kellerjordan.github.io/posts/muon/). Works at any scale that the
    dtype holds: neither 1e-30 nor 1e30 under- or overflows.

    Args:
        matrices: Shape ``(..., m, n)``, floating point. Not modified.
        ns_coefficients: A key of ``PRESETS`` or ``(a, b, c)``.
        ns_steps: Number of polynomial steps, at least 1.
        ns_dtype: Dtype of the products. None takes ``fast_matmul_dtype``.

    Returns:
        New tensor, shape and dtype of ``matrices``. A matrix of zeros stays zero; one with NaN or infinity becomes NaN.

    Raises:
        ValueError: If ``matrices`` has fewer than two dimensions or is not real floating point.

    Example:
        >>> matrix = torch.tensor([[0.0, 3.0], [-0.5, 0.0]])
        >>> orthogonalize(matrix, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=20, ns_dtype=torch.float32)
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"orthogonalize needs real matrices (..., m, n); got shape {tuple(matrices.shape)}, {matrices.dtype}."
        )
    preset = resolve_preset(ns_coefficients)
    dtype = ns_dtype or fast_matmul_dtype(matrices.device)
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    x = _scale_to_unit_norm(wide, preset.margin).to(dtype).reshape(-1, *wide.shape[-2:])
    # A step inside an autocast region would silently multiply in another dtype than ns_dtype.
    with torch.autocast(matrices.device.type, enabled=False):
        if _rounds_alike_in_any_batch(x):
            x = _iterate(x, preset, ns_steps)
        else:
            x = torch.cat([_iterate(matrix.clone(), preset, ns_steps) for matrix in torch.split(x, 1)])
    x = x.reshape(wide.shape).to(matrices.dtype)
    return x.mT if tall else x


def _iterate(x: Tensor, preset: Preset, ns_steps: int) -> Tensor:
    """Take ``ns_steps`` polynomial steps on ``x``, shape ``(batch, short, long)``, of unit norm."""
    for step in range(ns_steps):
        a, b, c = preset.polynomials[min(step, len(preset.polynomials) - 1)]
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _rounds_alike_in_any_batch(x: Tensor) -> bool:
    """Return whether a product of one matrix has the same bits alone and anywhere in a batch.

    MKL rounds by the alignment of its operands (its guide to conditional numerical reproducibility asks for 64 bytes).
    In a batch of odd sizes every matrix begins at another alignment, and a step would depend on which matrices share
    a rank.
    """
    if x.device.type != "cpu" or x.shape[0] <= 1:
        return True
    short, long = x.shape[-2:]
    return short * long * x.itemsize % 64 == 0 and short * short * x.itemsize % 64 == 0


def _scale_to_unit_norm(x: Tensor, margin: float) -> Tensor:
    """Return ``x / (margin * ||x||_F)`` per matrix, in float32 or wider; zero where ``x`` is zero."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    tiny = torch.finfo(dtype).tiny
    # The largest entry goes first: squared, 1e-30 is zero and 1e30 infinite in float32.
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=(-2, -1), keepdim=True, dtype=dtype)
    scaled: Tensor = x / largest.clamp_min(tiny)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return scaled.div_(norm.mul_(margin).clamp_min_(tiny))
