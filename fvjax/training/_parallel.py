"""One program on several devices and hosts: each takes its part of the batch, all keep the same state."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fvjax import _validate
from fvjax.training._step import TrainState, TrainStep
from fvjax.types import Array

AXIS = "data"
"""Name of the axis of devices, for `make_train_step(axis_name=AXIS)`."""


class _Parallel:
    """A compiled step on several devices; `compiled` tells `fit` not to compile it again."""

    compiled = True

    def __init__(self, step: TrainStep, devices: list[Any] | None) -> None:
        self._local = [d for d in devices or jax.devices() if d.process_index == jax.process_index()]
        self._everywhere = NamedSharding(Mesh(np.array(self._local), AXIS), PartitionSpec())
        self._step = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        count = len(self._local)
        n = _validate.batch("batch", batch)
        if n % count:
            raise ValueError(f"batch must divide evenly among the {count} devices of this process, got {n} examples")
        if getattr(state.step, "sharding", None) != self._everywhere:
            # The first state lies on one device. Handed over like that, it would have the step compiled twice: for it
            # and for its successors.
            state = jax.device_put(state, self._everywhere)
        state, loss = self._step(state, jax.tree.map(lambda x: x.reshape(count, n // count, *x.shape[1:]), batch))
        return state, loss


def parallelize(step: TrainStep, *, devices: list[Any] | None = None) -> TrainStep:
    """Compiles a step for several devices, of one or more processes.

    It goes through `jax.pmap`, never through an automatically sharded `jit`, where per-example gradients of
    convolutions are wrong (docs/sharp_edges.md).

    Args:
        step: as made by `make_train_step(..., axis_name="data")`.
        devices: which; None means all devices of all processes.

    Returns:
        step(state, batch), where `batch` is this process's part of the whole batch (`process_rows`), divided evenly
        among its devices, and `state` is the same in all processes. `state` is donated: its buffers are gone after the
        call. The loss is that of the whole batch.

    Raises:
        ValueError: on call, if the examples do not divide evenly among the devices.
    """
    return _Parallel(step, devices)


def process_rows(size: int) -> slice:
    """The rows of a batch of `size` examples that this process feeds.

    Raises:
        ValueError: if `size` is not an integer >= 1 that the number of devices divides.
    """
    _validate.positive_integer("size", size)
    if size % jax.device_count():
        raise ValueError(f"size must be divisible by the {jax.device_count()} devices, got {size}")
    share = size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; call it before anything else touches a device.

    Args:
        coordinator: "host:port" of process 0; None detects a cluster (Slurm, Open MPI, Cloud TPU, Kubernetes).
        processes: how many there are, with a `coordinator`.
        process_id: which this is, 0 ... processes - 1, with a `coordinator`.

    Raises:
        ValueError: if only some of the three are given, or no cluster is detected.
        RuntimeError: if it is too late: a device was touched before, or the processes were joined already.
    """
    given = (coordinator, processes, process_id)
    if any(v is None for v in given) and any(v is not None for v in given):
        raise ValueError(f"coordinator, processes and process_id must be given together, got {given}")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except ValueError as error:
        if coordinator is None:
            raise ValueError(f"coordinator must be given where no cluster is detected, got None ({error})") from error
        raise


def on_first_device(tree: Any) -> Any:
    """Arrays that are the same on all devices, as arrays on this process's first device."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)
