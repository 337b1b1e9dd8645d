"""The step of matrix parameters: gather equal matrices into a batch, compute their directions, apply them in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normuon_plugins.core.buckets import Slice, Stack, plan_buckets
from normuon_plugins.core.group_options import NS_DTYPES
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.orthogonalize import fast_matmul_dtype, orthogonalize
from normuon_plugins.core.update_rules import nesterov_update, normuon_direction

# Options that must agree for the matrices of two groups to share a batch.
BATCH_OPTIONS = ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "beta2", "normalize_neurons")


@dataclass(frozen=True)
class MatrixBlock:
    """One fused block of one parameter (or all of it), as views that ``Layout.block_views`` made.

    Attributes:
        parameter: Shape ``(e, o..., i...)``; ``gradient`` and ``momentum_buffer`` alike.
        gradient: As above, in its own dtype.
        momentum_buffer: As above.
        second_momentum_buffer: Shape ``(e, o..., 1...)``, float32.
        matrix_shape: ``(rows, cols)`` of each of the ``e`` matrices.
        group: The parameter's group.
    """

    parameter: Tensor
    gradient: Tensor
    momentum_buffer: Tensor
    second_momentum_buffer: Tensor
    matrix_shape: tuple[int, int]
    group: Mapping[str, Any]

    @property
    def ns_dtype(self) -> torch.dtype:
        """Dtype of the products: the group's, or what the device multiplies fast."""
        name = self.group["ns_dtype"]
        return fast_matmul_dtype(self.parameter.device) if name is None else NS_DTYPES[name]

    def stack(self) -> Stack:
        """Describe the block to the bucket planner."""
        options = tuple(_hashable(self.group[option]) for option in BATCH_OPTIONS)
        rows, cols = self.matrix_shape
        key = (rows, cols, self.ns_dtype, self.parameter.device, options)
        return Stack(key, self.parameter.shape[0], rows * cols * self.ns_dtype.itemsize)

    def select(self, part: Slice) -> MatrixBlock:
        """Return matrices ``part.start`` to ``part.stop`` of this block."""
        if (part.start, part.stop) == (0, self.parameter.shape[0]):
            return self
        chosen = slice(part.start, part.stop)
        return MatrixBlock(
            self.parameter[chosen],
            self.gradient[chosen],
            self.momentum_buffer[chosen],
            self.second_momentum_buffer[chosen],
            self.matrix_shape,
            self.group,
        )

    def update(self) -> Tensor:
        """Return what is to be orthogonalized: the momentum, or its Nesterov look-ahead."""
        if self.group["nesterov"]:
            return nesterov_update(self.momentum_buffer, self.gradient, momentum=self.group["momentum"])
        return self.momentum_buffer


def split_blocks(
    parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]
) -> list[MatrixBlock]:
    """Return views on the fused blocks of one parameter, its gradient and its state."""
    layout = parse_layout(group["layout"])
    return [
        MatrixBlock(weight, grad, momentum_buffer, second_momentum_buffer, (rows, cols), group)
        for weight, grad, momentum_buffer, second_momentum_buffer, (_, rows, cols) in zip(
            layout.block_views(parameter),
            layout.block_views(gradient),
            layout.block_views(state["momentum_buffer"]),
            layout.block_views(state["second_momentum_buffer"]),
            layout.matrix_shapes(parameter.shape),
            strict=True,
        )
    ]


def step_matrices(
    blocks: Sequence[MatrixBlock],
    *,
    bucket_bytes: int,
    orthogonalize_fn: Callable[[Tensor], Tensor] | None,
) -> None:
    """Move every block by its NorMuon direction, bucket by bucket. Momenta must be up to date.

    Args:
        blocks: Parameters and second moments are modified in place.
        bucket_bytes: Bound of one batch.
        orthogonalize_fn: Replaces Newton-Schulz; None uses the group's options.
    """
    for bucket in plan_buckets([block.stack() for block in blocks], bucket_bytes):
        _step_bucket([blocks[part.index].select(part) for part in bucket], orthogonalize_fn)


def _step_bucket(bucket: Sequence[MatrixBlock], orthogonalize_fn: Callable[[Tensor], Tensor] | None) -> None:
    """Gather one batch of equal matrices, compute their directions, apply them where the parameters lie."""
    first, group = bucket[0], bucket[0].group
    rows, cols = first.matrix_shape
    counts = [block.parameter.shape[0] for block in bucket]
    device = first.parameter.device
    update = torch.empty(sum(counts), rows, cols, dtype=first.ns_dtype, device=device)
    second_momentum = torch.empty(sum(counts), rows, 1, dtype=torch.float32, device=device)
    for block, matrices, neurons in zip(
        bucket, torch.split(update, counts), torch.split(second_momentum, counts), strict=True
    ):
        matrices.view(block.parameter.shape).copy_(block.update())
        neurons.view(block.second_momentum_buffer.shape).copy_(block.second_momentum_buffer)
    direction = normuon_direction(
        update,
        second_momentum,
        orthogonalize=orthogonalize_fn
        or partial(
            orthogonalize,
            ns_coefficients=group["ns_coefficients"],
            ns_steps=group["ns_steps"],
            ns_dtype=first.ns_dtype,
        ),
        normalize=group["normalize_neurons"],
        beta2=group["beta2"],
        eps=group["eps"],
        adjust_lr_fn=group["adjust_lr_fn"],
    )
    for block, matrices, neurons in zip(
        bucket, torch.split(direction, counts), torch.split(second_momentum, counts), strict=True
    ):
        block.second_momentum_buffer.copy_(neurons.view(block.second_momentum_buffer.shape))
        _apply(block, matrices.reshape(block.parameter.shape))


def _apply(block: MatrixBlock, direction: Tensor) -> None:
    """Decay and move: ``W <- (1 - lr * weight_decay) * W - lr * direction``, in place."""
    lr = block.group["lr"]
    block.parameter.mul_(1 - lr * block.group["weight_decay"])
    if isinstance(lr, Tensor):  # reading its value would synchronize a GPU
        block.parameter.sub_(direction * lr)
    else:
        block.parameter.add_(direction, alpha=-lr)


def _hashable(value: Any) -> Any:
    """Return a list that came back from a checkpoint as the tuple it was."""
    return tuple(value) if isinstance(value, list) else value
