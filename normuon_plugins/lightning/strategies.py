"""What the strategy of a Trainer or of Fabric means for the optimizer; both are asked in the same way."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# By name, since lightning.pytorch, lightning.fabric and pytorch_lightning define each of these classes anew.
# They make flat shards of the parameters or take the step over.
FOREIGN_SHARDING = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"})
# Every process holds the whole model, and gradients are averaged.
REPLICATING = frozenset({"DDPStrategy"})


def complete_options(options: dict[str, Any], strategy: object) -> dict[str, Any]:
    """Return ``options`` with the ``process_group`` that shares the work, where ``strategy`` is DDP.

    Args:
        options: Those of ``build_normuon``; a group that is given stays.
        strategy: Of the Trainer or of Fabric; None where there is none.

    Raises:
        ValueError: If ``strategy`` leaves no matrices to the optimizer.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    if names & FOREIGN_SHARDING:
        raise ValueError(
            f"NorMuon needs matrices, and {type(strategy).__name__} leaves flat shards of them. Use"
            " ModelParallelStrategy with fully_shard (FSDP2), which keeps the shapes; it is called in configure_model,"
            " under Fabric in parallelize_fn."
        )
    if names & REPLICATING and options.get("process_group") is None:
        return {**options, "process_group": dist.group.WORLD}
    return options
