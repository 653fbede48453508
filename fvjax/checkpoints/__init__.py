"""Checkpoints of a training run that survive kills, full disks and damaged files.

One checkpoint is one folder `step_<number>`, written under another name and renamed when it is complete. It holds the
arrays of the state, written by orbax, and an index: the run's configuration, and for every array and every file a
checksum.

=================================  ==================================================================================
what happens                       what follows
=================================  ==================================================================================
kill -9, also during a write       the newest complete checkpoint is used; the rest of the write goes at the next start
file truncated, changed, missing   `DamagedCheckpointWarning` names folder and cause; the checkpoint before it is used
all checkpoints damaged            `CheckpointError`; never a silent fresh start
disk full                          one `CheckpointError` at the next `save`, `wait` or `close`; older ones stay usable
another configuration              `ConfigMismatchError` with the difference, key by key
another network or optimizer       `StateMismatchError` names the leaves
folder used by another run         `CheckpointError`
=================================  ==================================================================================

Several processes (`jax.distributed`): the first one alone writes and decides which checkpoint is good; all read the
same files, so the folder must be shared. Orbax is told that each of its calls has one active process: its barriers over
all processes would run in the background, beside the collectives of the training, in an order that may differ between
processes and then hang.
"""

from fvjax.checkpoints._config import ConfigMismatchError as ConfigMismatchError
from fvjax.checkpoints._config import diff_configs as diff_configs
from fvjax.checkpoints._disk import CheckpointError as CheckpointError
from fvjax.checkpoints._disk import DamagedCheckpointWarning as DamagedCheckpointWarning
from fvjax.checkpoints._leaves import StateMismatchError as StateMismatchError
from fvjax.checkpoints._manager import Checkpoints as Checkpoints
from fvjax.checkpoints._signals import stop_on_sigterm as stop_on_sigterm

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "ConfigMismatchError",
    "DamagedCheckpointWarning",
    "StateMismatchError",
    "diff_configs",
    "stop_on_sigterm",
]
