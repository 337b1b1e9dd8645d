"""Tones with labels that cost nothing, each computed from a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evidence.labelled_texts import Division

SAMPLE_RATE, FRAME = 16_000, 1024
# Of torchcrepe: bins of 20 cents, and where the first one lies, in cents above 10 Hz.
CENTS_PER_BIN, FIRST_CENTS, NOTES = 20.0, 1997.3794084376191, 360
# 60 to 1,000 Hz, where tones are drawn from.
BINS = range(56, 300)


def tones(training: int, held_out: int) -> Division:
    """Return the names and pitches of tones; a name is the number that the tone is computed from."""
    pitches = torch.randint(BINS.start, BINS.stop, (training + held_out,), generator=torch.Generator().manual_seed(0))
    examples = [(str(number), pitch) for number, pitch in enumerate(pitches.tolist())]
    return Division(examples[held_out:], examples[:held_out])


def tone(name: str, pitch: int) -> Tensor:
    """Return a frame of a tone that lacks its lowest partial, in noise as loud as itself; shape ``(FRAME,)``."""
    generator = torch.Generator().manual_seed(int(name))
    off = torch.rand(1, generator=generator).item() - 0.5
    frequency = 10 * 2 ** ((FIRST_CENTS + CENTS_PER_BIN * (pitch + off)) / 1200)
    partials = torch.arange(2.0, 12.0)
    strengths = torch.rand(len(partials), generator=generator) * (frequency * partials < SAMPLE_RATE / 2)
    phases = 2 * math.pi * torch.rand(len(partials), generator=generator)
    time = torch.arange(FRAME) / SAMPLE_RATE
    wave = strengths @ torch.sin(2 * math.pi * frequency * partials[:, None] * time + phases[:, None])
    frame = wave / wave.std() + torch.randn(FRAME, generator=generator)
    return (frame - frame.mean()) / frame.std()
