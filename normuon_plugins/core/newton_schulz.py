"""The Newton-Schulz iteration in few multiplications: shared Gram matrices, and half of every symmetric product.

A step is ``X <- a X + b R X + c R R X`` with ``R = X X^T``. Several steps may share one ``R``: the next one's is
``Z R Z`` with ``Z = a I + b R + c R R``, in products of the short side alone (Zhang, Amsel, Chen, Dao, "Gram
Newton-Schulz", 2026). Rounding errors of a shared ``R`` grow with ``a ** 2`` at every step, so it soon begins anew from
``X``. All these matrices are polynomials of one symmetric matrix: their products are symmetric too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]

# Columns of a symmetric product that a CPU multiplies at once, from the diagonal down: narrow strips save more and
# multiply slower. 768 x 768 by the whole product, medians: 0.83 (384), 0.76 (256), 0.78 (192); bfloat16, AVX512.
STRIP = 256
# In smaller matrices rounding errors do not average out: three steps on one Gram matrix in bfloat16 led to singular
# values of 3.4 (16 x 46, entries of nearly one value), and never past 1.22 from this size on (800 structured matrices).
SHARED_FROM = 128


class Form(NamedTuple):
    """In which products an iteration is taken.

    Attributes:
        segments: How many steps share each Gram matrix, in order; they add up to all steps.
        strips: Into how many strips a symmetric product is divided, each multiplied down from the diagonal; 1 takes
            the whole product.
    """

    segments: tuple[int, ...]
    strips: int

    def multiplications(self, short: int, long: int) -> int:
        """Return how many scalar multiplications one matrix takes, ``short <= long`` its sides."""
        wide = short * short * long
        # What lies on and below the diagonal, in strips of equal width or nearly.
        symmetric = (self.strips + 1) / (2 * self.strips)
        total = 0.0
        for steps in self.segments:
            square_products = 1 if steps == 1 else 4 * steps - 3
            total += wide + symmetric * (wide + square_products * short**3)
        return round(total)


def choose_form(short: int, long: int, ns_steps: int, shared: Sequence[int], *, in_strips: bool) -> Form:
    """Return the form that takes the fewest multiplications.

    Args:
        short: The smaller side.
        long: The larger side.
        ns_steps: Steps in all.
        shared: How many steps may share a Gram matrix, in order; the last number is repeated.
        in_strips: Whether large matrices are multiplied one by one and their symmetric products in strips.
    """
    strips = max(1, short // STRIP) if in_strips else 1
    forms = [Form((1,) * ns_steps, strips)]
    if short >= SHARED_FROM:
        forms.append(Form(_segments(ns_steps, shared), strips))
    return min(forms, key=lambda form: form.multiplications(short, long))


def _segments(ns_steps: int, shared: Sequence[int]) -> tuple[int, ...]:
    segments: list[int] = []
    while (left := ns_steps - sum(segments)) > 0:
        segments.append(min(left, shared[min(len(segments), len(shared) - 1)]))
    return tuple(segments)


class Workspace:
    """Tensors that are taken, given back and taken again: what was just used lies in a cache, and costs no page fault.

    Args:
        dtype: Of all of them.
        device: Of all of them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        self._free: dict[torch.Size, list[Tensor]] = {}

    def take(self, shape: torch.Size) -> Tensor:
        """Return a tensor of any content."""
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape, dtype=self.dtype, device=self._device)

    def give(self, *tensors: Tensor) -> None:
        """Take back what ``take`` returned."""
        for tensor in tensors:
            self._free.setdefault(tensor.shape, []).append(tensor)


def newton_schulz(x: Tensor, polynomials: Sequence[Polynomial], form: Form, workspace: Workspace, out: Tensor) -> None:
    """Iterate on matrices of at most unit norm.

    Args:
        x: Shape ``(batch, m, n)``, taken from ``workspace``; one matrix where ``form`` has strips.
        polynomials: ``(a, b, c)`` of each step; past the last one, it is repeated.
        form: See ``choose_form``.
        workspace: For everything in between; ``x`` is given back to it.
        out: Takes the result. Shape of ``x``, any dtype.
    """
    tall = x.shape[-2] > x.shape[-1]
    squares = _Squares(form.strips, workspace)
    remaining = [polynomials[min(step, len(polynomials) - 1)] for step in range(sum(form.segments))]
    for steps in form.segments:
        chosen, remaining = remaining[:steps], remaining[steps:]
        gram = squares.product(x.mT, x) if tall else squares.product(x, x.mT)
        scale, factor = squares.factor(gram, chosen)
        result = out if not remaining and out.dtype == x.dtype else workspace.take(x.shape)
        left, right = (x, factor) if tall else (factor, x)
        torch.baddbmm(x, left, right, beta=scale, out=result)
        workspace.give(x, factor)
        x = result
    if x is not out:
        out.copy_(x)
        workspace.give(x)


class _Squares:
    """Products of symmetric matrices that commute, and so are symmetric."""

    def __init__(self, strips: int, workspace: Workspace) -> None:
        self._strips = strips
        self._workspace = workspace

    def factor(self, gram: Tensor, polynomials: Sequence[Polynomial]) -> tuple[float, Tensor]:
        """Return ``scale`` and ``F`` of some steps, ``X <- scale X + F X``; ``gram`` is used up.

        A single step keeps ``a I`` out of ``F``, whose rounding it would share.
        """
        rest = self._rest(gram, polynomials[0])
        if len(polynomials) == 1:
            self._workspace.give(gram)
            return polynomials[0][0], rest
        product: Tensor | None = None
        for polynomial, following in pairwise(polynomials):
            gram = self._next_gram(gram, rest, polynomial[0])
            product = self._append(product, rest, polynomial[0])
            rest = self._rest(gram, following)
        self._workspace.give(gram)
        return 0.0, self._append(product, rest, polynomials[-1][0])

    def _rest(self, gram: Tensor, polynomial: Polynomial) -> Tensor:
        """Return ``Z - a I = b R + c R R``."""
        _, b, c = polynomial
        return self.product(gram, gram, added=gram, beta=b, alpha=c)

    def _next_gram(self, gram: Tensor, rest: Tensor, a: float) -> Tensor:
        """Return ``Z R Z`` in place of ``R``."""
        half = self.product(gram, rest, added=gram, beta=a)
        self._workspace.give(gram)
        following = self.product(rest, half, added=half, beta=a)
        self._workspace.give(half)
        return following

    def _append(self, product: Tensor | None, rest: Tensor, a: float) -> Tensor:
        """Return ``product Z``, or ``Z`` where there is none yet, in place of both."""
        if product is None:
            rest.diagonal(dim1=-2, dim2=-1).add_(a)
            return rest
        appended = self.product(product, rest, added=product, beta=a)
        self._workspace.give(product, rest)
        return appended

    def product(
        self, left: Tensor, right: Tensor, *, added: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
    ) -> Tensor:
        """Return ``alpha * left @ right + beta * added``, which is symmetric, in a tensor of the workspace."""
        size = left.shape[-2]
        out = self._workspace.take(torch.Size((left.shape[0], size, size)))
        added = out if added is None else added  # not read where beta is zero
        if self._strips == 1:
            return torch.baddbmm(added, left, right, beta=beta, alpha=alpha, out=out)
        width = -(-size // self._strips)
        # Two-dimensional: a CPU's bmm first copies operands that are parts of larger ones.
        square, left, right, added = out[0], left[0], right[0], added[0]
        for start in range(0, size, width):
            stop = min(start + width, size)
            below = square[start:, start:stop]
            part = added[start:, start:stop]
            torch.addmm(part, left[start:], right[:, start:stop], beta=beta, alpha=alpha, out=below)
            square[start:stop, stop:] = below[stop - start :].mT
        return out
