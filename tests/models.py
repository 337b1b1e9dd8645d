"""Tiny models and batches."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def tiny_llama(seed=0, **changes):
    """Two layers, grouped key and value heads (uneven shapes), untied head."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def token_blocks(count, length=16, seed=1):
    """Return ``count`` examples of random tokens as a list of dicts, the same for the same seed."""
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": block, "labels": block} for block in tokens]


class PlainTransformer(nn.Module):
    """A model without any Hugging Face convention: embedding, torch's encoder layer, convolution, head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.mix = nn.Conv1d(16, 8, 3)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose1d(8, 16, 3)
        self.gate = nn.Linear(16, 1)
        self.head = nn.Linear(16, VOCABULARY)


def whole(tensor):
    """Return all of a tensor, on every rank, as a copy of its own."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def max_difference(first, second):
    """Return the largest relative difference between two dicts or modules' parameters, by Frobenius norm per tensor."""
    first, second = _tensors(first), _tensors(second)
    assert first.keys() == second.keys()
    return max(
        float((first[name].double() - second[name].double()).norm() / second[name].double().norm().clamp_min(1e-30))
        for name in first
    )


def _tensors(source):
    named = source.items() if isinstance(source, dict) else source.named_parameters()
    return {name: tensor.detach() for name, tensor in named}
