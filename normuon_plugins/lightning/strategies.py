"""What the strategy of a Trainer or of Fabric means for the optimizer; both are asked in the same way."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from normuon_plugins.distributed.replicas import find_ddp

# By name, since lightning.pytorch, lightning.fabric and pytorch_lightning define each of these classes anew.
# They make flat shards of the parameters or take the step over.
FOREIGN_SHARDING = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
# Every process holds the whole model, and gradients are averaged.
REPLICATING = frozenset({"DDPStrategy"})


def complete_options(options: dict[str, Any], strategy: object, wrapped: object) -> dict[str, Any]:
    """Return ``options`` with the ``process_group`` that shares the work, where ``strategy`` is DDP.

    Args:
        options: Those of ``build_normuon``; a group that is given stays, and so does None.
        strategy: Of the Trainer or of Fabric; None where there is none.
        wrapped: The model as the strategy wrapped it: the processes that share are those that DDP averages over.

    Raises:
        ValueError: If ``strategy`` leaves no matrices to the optimizer.
    """
    refuse_flat_shards(strategy)
    if REPLICATING & _names(strategy) and "process_group" not in options:
        ddp = find_ddp(wrapped)
        return {**options, "process_group": dist.group.WORLD if ddp is None else ddp.process_group}
    return options


def refuse_flat_shards(strategy: object) -> None:
    """Raise ``ValueError`` if ``strategy`` leaves no matrices to the optimizer."""
    if FOREIGN_SHARDING & _names(strategy):
        raise ValueError(
            f"NorMuon needs matrices, and {type(strategy).__name__} leaves flat shards of them. Use"
            " ModelParallelStrategy with fully_shard (FSDP2), which keeps the shapes; it is called in configure_model,"
            " under Fabric in parallelize_fn."
        )


def _names(strategy: object) -> set[str]:
    return {base.__name__ for base in type(strategy).__mro__}
