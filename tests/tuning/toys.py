"""Models and batches on which a trial takes milliseconds."""

import torch
from torch import nn


class Quadratic(nn.Module):
    """A matrix on NorMuon and a vector on AdamW, each a known distance from where the loss is smallest.

    The loss is a sum of two parts, so that the best rate of each can be computed by itself.

    Args:
        far: Distance of every entry of the matrix from its optimum.
        wide: Distance of every entry of the vector.
    """

    def __init__(self, far=1.0, wide=1.0):
        super().__init__()
        self.hidden = nn.Linear(4, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(4))
        with torch.no_grad():
            self.hidden.weight.copy_(far * torch.eye(4))
        self.wide = wide

    def loss(self, noise):
        return self.hidden.weight.square().sum() + (self.bias - self.wide + 0 * noise.sum()).square().sum()


def quadratic_loss(model, batch):
    return model.loss(batch)


def flat_batches(count):
    return [torch.zeros(1)] * count


class Noisy(nn.Module):
    """A network with all that training changes besides weights: dropout, statistics, a frozen part, modes."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8), nn.GELU())
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1  # a new tensor in the place of the old one
        return self.head(self.frozen(self.body(x)))


def noisy_loss(model, batch):
    x, y = batch
    return (model(x).squeeze(1) - y).square().mean()


def noisy_batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(count)]
    return [(x, x.sum(1).sin()) for x in inputs]


def counting_tokens(count, batch_size=4, length=12, vocabulary=64, seed=0):
    """Return batches for a language model in which every token but the first follows from the one before."""
    first = torch.randint(0, vocabulary, (count, batch_size, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (first + 3 * torch.arange(length)) % vocabulary
    return [{"input_ids": batch, "labels": batch} for batch in tokens]
