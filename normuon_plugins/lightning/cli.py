"""LightningCLI with an ``optimizer`` section that holds the options of ``configure_normuon``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.optim import Optimizer

from normuon_plugins.core.step_size import MATCH_PROGRESS
from normuon_plugins.lightning.configure import configure_normuon


class PlannedNorMuon(Optimizer):
    """The options of NorMuon, kept until its module is there to be planned.

    LightningCLI builds an optimizer on bare ``model.parameters()``, before the module is sharded; a plan needs the
    module. ``NorMuonCLI`` calls ``configure`` when Lightning asks for the optimizer, and ``step`` is never reached.
    """

    # jsonargparse reads the code: it follows self.options through configure_normuon to NorMuon and finds every option
    # with its type, its default and its help. The options of the plan it does not find, nor the defaults that
    # build_normuon gives to adjust_lr_fn and include_frozen; they are listed.
    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        overrides: dict[str, str] | None = None,
        lora: str = "adamw",
        split_fused: bool = True,
        per_head: bool = False,
        strict: bool = False,
        include_frozen: bool = True,
        allow_no_matrix: bool = False,
        adjust_lr_fn: str = MATCH_PROGRESS,
        **options: Any,
    ) -> None:
        self.listed_options: dict[str, Any] = {
            "overrides": overrides,
            "lora": lora,
            "split_fused": split_fused,
            "per_head": per_head,
            "strict": strict,
            "include_frozen": include_frozen,
            "allow_no_matrix": allow_no_matrix,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self.options = options

    def configure(self, module: LightningModule) -> Any:
        """Return what ``configure_normuon`` returns for ``module``."""
        return configure_normuon(module, **self.listed_options, **self.options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Refuse the ``lr_scheduler`` of LightningCLI, the only reader before training."""
        raise ValueError(
            "NorMuonCLI builds the optimizer when the module is ready; a schedule goes in by optimizer.scheduler and"
            " optimizer.warmup, not by lr_scheduler."
        )


class NorMuonCLI(LightningCLI):  # type: ignore[misc]  # mypy does not follow lightning
    """A LightningCLI that trains with NorMuon: ``--optimizer.lr``, ``optimizer: {lr: 3e-4, scheduler: cosine}``, ...

    All options of ``configure_normuon`` and ``build_normuon`` are arguments of the section ``optimizer``, checked when
    they are read and shown by ``--help``. A module's own ``configure_optimizers`` is replaced, as LightningCLI does.

    Example:
        NorMuonCLI(LanguageModel, TextData)
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section ``optimizer``; call this where you override it."""
        parser.add_optimizer_args(PlannedNorMuon)

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: PlannedNorMuon, lr_scheduler: object = None
    ) -> Any:
        """Build the optimizer, now that the module is there, on its device and sharded."""
        return optimizer.configure(lightning_module)
