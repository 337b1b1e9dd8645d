"""What a test on CPU does to Accelerate before its own code runs, and afterwards.

Accelerate shards on GPUs only; on CPU it silently takes DDP. ``pretend_gpus`` tells it that there are several GPUs, and
changes nothing else: the device stays the CPU, the process group gloo, and the rest is Accelerate's own code.
"""

import os

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType


def pretend_gpus():
    """Make Accelerate take FSDP2 where it is asked to; return its state."""
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_GPU
    return state


def forget():
    """Undo what Accelerators leave in the process, so that the next one is like the first of a program."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
