"""NorMuon as the paper writes it (arXiv 2510.05491, Algorithm 1), in float64, for one matrix with one row per neuron.

Independent of the package on purpose: it imports nothing of it, and takes the orthogonalization as an argument.
"""

import math

import torch


class ReferenceNorMuon:
    """One matrix ``(m, n)`` and its state; every option is spelled out, none has a default."""

    def __init__(self, weight, *, lr, weight_decay, momentum, beta2, eps, nesterov, normalize, scaling, orthogonalize):
        self.weight = weight.double().clone()
        self.first = torch.zeros_like(self.weight)
        self.second = torch.zeros(weight.shape[0], dtype=torch.float64)
        self.mean_square = 0.0
        self.lr, self.weight_decay, self.momentum, self.beta2, self.eps = lr, weight_decay, momentum, beta2, eps
        self.nesterov, self.normalize, self.scaling, self.orthogonalize = nesterov, normalize, scaling, orthogonalize

    def step(self, gradient):
        gradient = gradient.double()
        m, n = self.weight.shape
        self.first = self.momentum * self.first + (1 - self.momentum) * gradient
        update = self.momentum * self.first + (1 - self.momentum) * gradient if self.nesterov else self.first
        orthogonal = self.orthogonalize(update)
        direction = orthogonal
        if self.normalize:
            mean_square = torch.tensor(
                [sum(x * x for x in row) / n for row in orthogonal.tolist()], dtype=torch.float64
            )
            self.second = self.beta2 * self.second + (1 - self.beta2) * mean_square
            direction = orthogonal / (self.second.sqrt() + self.eps)[:, None]
        norm = math.sqrt(sum(x * x for x in direction.flatten().tolist()))
        # AdamW with one second moment moves by update / sqrt(v); a step is to gain as much to first order. The decay of
        # v is 0.98 for a momentum of 0.95: its start cancels the momentum's.
        rate = 0.4 * (1 - self.momentum)
        self.mean_square += rate * (sum(x * x for x in gradient.flatten().tolist()) / (m * n) - self.mean_square)
        if norm == 0:
            scale = 0.0
        elif self.scaling == "match_progress_adamw":
            gain = float((update / math.sqrt(self.mean_square) * update).sum())
            largest = max(0.2, 0.04 / self.lr / math.sqrt(max(m, n)))  # of the RMS
            scale = min(gain / float((direction * update).sum()), largest * math.sqrt(m * n) / norm)
        elif self.scaling == "match_rms_adamw":
            scale = 0.2 * math.sqrt(m * n) / norm
        else:
            scale = math.sqrt((orthogonal**2).sum()) / norm * math.sqrt(max(1, m / n))
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * scale * direction


def newton_schulz(update, coefficients=(3.4445, -4.7750, 2.0315), steps=5):
    """Keller Jordan's iteration in float64, on the rows of a wide matrix or the columns of a tall one."""
    a, b, c = coefficients
    x = update.double() / max(float((update.double() ** 2).sum()) ** 0.5, 1e-300)
    for _ in range(steps):
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        else:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def polar_factor(update):
    """The exact orthogonal factor, by SVD."""
    u, _, vh = torch.linalg.svd(update.double(), full_matrices=False)
    return u @ vh
