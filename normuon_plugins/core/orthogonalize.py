"""Orthogonalize: every singular value of a matrix to about one, from multiplications alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normuon_plugins.core.newton_schulz import Form, Polynomial, Workspace, choose_form, newton_schulz


class Preset(NamedTuple):
    """A named Newton-Schulz iteration.

    Attributes:
        polynomials: ``(a, b, c)`` of each step; past the last one, it is repeated.
        margin: The input is divided by ``margin`` times its Frobenius norm.
        shared: How many steps may share a Gram matrix without losing accuracy in bfloat16, in order; the last number
            is repeated.
    """

    polynomials: tuple[Polynomial, ...]
    margin: float
    shared: tuple[int, ...] = (1,)


PRESETS = {
    # Keller Jordan, https://kellerjordan.github.io/posts/muon/: steepest slope at zero; singular values end in about
    # [0.7, 1.2]. Shared Gram matrices: docs/performance.md.
    "muon": Preset(((3.4445, -4.7750, 2.0315),), margin=1.0, shared=(3, 2)),
    # Amsel et al., "The Polar Express", https://arxiv.org/abs/2505.16932, Algorithm 2 for five steps from 1e-3, with
    # the safety factor 1.02 and cushion 0.02 of https://github.com/KellerJordan/modded-nanogpt. Singular values come
    # near 2 on the way, where the rounding of a shared Gram matrix grows: none is shared.
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
    same = (preset for preset in PRESETS.values() if preset.polynomials == ((a, b, c),))
    return next(same, Preset(((a, b, c),), margin=1.0))


def fast_matmul_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where ``device`` multiplies it fast, else float32.

    CUDA does, and CPUs with AMX or AVX512-BF16. Elsewhere bfloat16 is emulated: 1.2 GFLOP/s against 131 in float32 for
    512 x 512 matrices on a 2-core AVX2 machine (torch 2.13).
    """
    if device.type == "cuda" or (device.type == "cpu" and (_cpu_has("amx_bf16") or _cpu_has("avx512_bf16"))):
        return torch.bfloat16
    return torch.float32


def _cpu_has(capability: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(capability, False))


def _in_strips(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether one large matrix keeps ``device`` busy, so that strips of its symmetric products save time.

    A GPU wants few large kernels. A CPU with AMX multiplies 768 x 768 matrices in bfloat16 at 0.9 TFLOP/s one by one
    and at 1.5 in batches (2 cores); without AMX the rates are equal.
    """
    return device.type == "cpu" and not (dtype == torch.bfloat16 and _cpu_has("amx_bf16"))


def multiplications(
    rows: int,
    cols: int,
    ns_steps: int,
    *,
    ns_coefficients: str | Sequence[float],
    device: torch.device | str,
) -> int:
    """Return how many scalar multiplications ``orthogonalize`` takes for one matrix on a device of this kind.

    The same on every rank: a CPU counts as one without AMX.
    """
    short, long = sorted((rows, cols))
    in_strips = torch.device(device).type == "cpu"
    form = _form(short, long, ns_steps, resolve_preset(ns_coefficients), in_strips)
    return form.multiplications(short, long)


@lru_cache(maxsize=1024)  # the layers of a model ask for the same few
def _form(short: int, long: int, ns_steps: int, preset: Preset, in_strips: bool) -> Form:
    return choose_form(short, long, ns_steps, preset.shared, in_strips=in_strips)


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    *,
    ns_coefficients: str | Sequence[float] = "muon",
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Move every singular value of every matrix near one, keeping the singular vectors.

    The quintic iteration ``X <- a X + b A X + c A A X`` with ``A = X X^T`` on ``X / ||X||_F``, on the side that makes
    ``A`` smaller (Jordan et al., https://kellerjordan.github.io/posts/muon/), in the products that
    ``newton_schulz.choose_form`` finds cheapest. Works at any scale that the dtype holds: neither 1e-30 nor 1e30 under-
    or overflows. Not differentiable.

    Args:
        matrices: Shape ``(..., m, n)``, floating point. Not modified, unless it is ``out``.
        ns_coefficients: A key of ``PRESETS`` or ``(a, b, c)``.
        ns_steps: Number of polynomial steps, at least 1.
        ns_dtype: Dtype of the products. None takes ``fast_matmul_dtype``.
        out: Takes the result; may be ``matrices`` itself. Shape, dtype and strides of ``matrices``.

    Returns:
        ``out``, or a new tensor of the shape and dtype of ``matrices``. A matrix of zeros stays zero; one with NaN or
        infinity becomes NaN.

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
    # Columns that lie one after the other in memory are the rows of a matrix that does: the same singular values, and
    # no product has to copy them first.
    turned = not matrices.is_contiguous() and matrices.mT.is_contiguous()
    source = matrices.mT if turned else matrices
    if out is None:
        target = torch.empty_like(source, memory_format=torch.contiguous_format)
    else:
        target = out.mT if turned else out
    sides = source.shape[-2:]
    form = _form(*sorted(sides), ns_steps, preset, _in_strips(source.device, dtype))
    workspace = Workspace(dtype, source.device)
    batch, results = source.reshape(-1, *sides), target.view(-1, *sides)
    together = _together(batch, form, dtype)
    with without_autocast(source.device):
        for part, result in zip(torch.split(batch, together), torch.split(results, together), strict=True):
            x = _scale_to_unit_norm(part, preset.margin, workspace)
            newton_schulz(x, preset.polynomials, form, workspace, result)
    return target.mT if turned else target


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products have the dtype of their factors, whatever region a step is taken in."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _together(batch: Tensor, form: Form, dtype: torch.dtype) -> int:
    """Return how many matrices are multiplied at once: all, or one by one.

    One by one where symmetric products are multiplied in strips, and where a product of one matrix would have other
    bits alone than in the batch: MKL rounds by the alignment of its operands
    (its guide to conditional numerical reproducibility asks for 64 bytes). In a batch of odd sizes every matrix begins
    at another alignment, and a step would depend on which matrices share a rank.
    """
    if batch.device.type == "cpu":
        short, long = sorted(batch.shape[-2:])
        if form.strips > 1 or short * long * dtype.itemsize % 64 or short * short * dtype.itemsize % 64:
            return 1
    return max(1, batch.shape[0])


def _scale_to_unit_norm(x: Tensor, margin: float, workspace: Workspace) -> Tensor:
    """Return ``x / (margin * ||x||_F)`` per matrix in a tensor of the workspace; zero where ``x`` is zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # The largest entry goes first: squared, 1e-30 is zero and 1e30 infinite in float32. By a power of two, exactly.
    if len(x) == 1:  # a quarter of the time, on a CPU
        low, high = (value.view(1, 1, 1) for value in torch.aminmax(x))
    else:
        low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    largest = torch.maximum(high, low.neg_()).clamp_min_(torch.finfo(x.dtype).tiny).to(wide)
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scaled = torch.div(x, power.to(x.dtype), out=workspace.take(x.shape))
    # Of rows first: a sixth of the time, since torch sums a row of bfloat16 in float32 without a copy of the matrix.
    rows = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).to(wide)
    norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return scaled.mul_(norm.mul_(margin).clamp_min_(torch.finfo(wide).tiny).reciprocal_().to(scaled.dtype))
