"""Train a byte-level Llama with LightningCLI; everything that can be chosen stands in the YAML file.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --optimizer.lr 2e-3 --trainer.max_steps 40
python examples/lightning_cli.py fit --help
"""

from __future__ import annotations

import os

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from normuon_plugins.lightning.cli import NorMuonCLI

BYTES = 256
HEAD = 16


class ByteModel(LightningModule):
    """A small Llama over bytes.

    Args:
        width: Hidden size, a multiple of 16.
        layers: Number of layers.
    """

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=BYTES,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.log("training_loss", loss, prog_bar=True)
        return loss


class FileBytes(LightningDataModule):
    """The bytes of one file, in blocks.

    Args:
        file: Any file; Python's own os.py if absent.
        length: Bytes per example.
        batch_size: Examples per process and step.
    """

    def __init__(self, file: str = os.__file__, length: int = 64, batch_size: int = 8) -> None:
        super().__init__()
        self.file, self.length, self.batch_size = file, length, batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        with open(self.file, "rb") as source:
            content = torch.frombuffer(bytearray(source.read()), dtype=torch.uint8).long()
        blocks = content[: len(content) // self.length * self.length].view(-1, self.length)
        return DataLoader(list(blocks), self.batch_size, shuffle=True)


def main(arguments: list[str] | None = None) -> NorMuonCLI:
    """Read the command line, or ``arguments`` in its place, and run the subcommand."""
    return NorMuonCLI(ByteModel, FileBytes, args=arguments)


if __name__ == "__main__":
    main()
