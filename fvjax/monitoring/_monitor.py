"""The monitor: a callable for any training loop that looks once in so many steps."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fvjax import _validate
from fvjax.flows import SOLVERS
from fvjax.interpolants import Interpolant
from fvjax.losses import REDUCTIONS
from fvjax.metrics import wilson_interval
from fvjax.monitoring import _measures, _probe
from fvjax.monitoring._record import (
    MemorizationWarning,
    MonitorRecord,
    Returned,
    memorizes,
    message,
    state_of,
)
from fvjax.sites import DisagreementError, DisagreementWarning
from fvjax.training import MetricsLog, on_first_device
from fvjax.types import Key, Pair, Params, Scalar, VelocityField


class VarianceMonitor:
    """Gradient variance and memorization of a flow while it trains; to be called in any loop.

    Everything that it looks at is drawn once, from `key`: the same params give the same numbers, at any step, in any
    process and after any resume. It neither changes the params nor takes part in the training, whose numbers are the
    same bits with it and without. Of the pairs only the rows that it needs are read, when it is made.

    A source is returned if no target is nearer to the end of its flow than its own. A `MemorizationWarning` comes at
    the first look at which the lower limit of the share of returned training sources is above the upper limit of that
    of held-out ones; `memorizing` then stays True until the training share itself is no longer above that upper limit.
    Without `held_out` there is no warning: a flow that returns its pairs may also have learned the rule behind them.

    A look takes as long as 5 to 8 training steps of an MLP at batch 256, or 16 of a small U-Net at batch 64: 0.6% and
    1.6% of the training at the default `every`, in proportion at others (benchmarks/monitor.py). The first compiles.

    With several processes only the first one looks, writes and warns; the others get None.

    Attributes:
        every: steps between two looks.
        record: the last look; None before the first one.
    """

    def __init__(
        self,
        field: VelocityField,
        pairs: Pair,
        interpolant: Interpolant,
        *,
        key: Key,
        held_out: Pair | None = None,
        every: int = 1000,
        draws: int = 256,
        bins: int = 4,
        sources: int = 64,
        targets: int = 512,
        solver: str = "euler",
        solver_steps: int = 20,
        reduction: str = "mean",
        level: float = 0.99,
        log: MetricsLog | Path | str | None = None,
    ) -> None:
        """Draws what is looked at.

        Args:
            field: (params, t, x) -> velocity of ONE example; hashable, as a function is.
            pairs: what is trained on, x0 and x1 of shape [n, *dims], floating point: arrays of numpy or JAX, memory
                maps, or anything else with shape, dtype and row slices.
            interpolant: how they are joined.
            key: of all draws.
            held_out: pairs of the same coupling that are not trained on.
            every: steps between two looks.
            draws: behind the gradient variance, a multiple of `bins` and at least 2 a bin; draws / bins gradients are
                formed at once.
            bins: equal intervals of time, with as many draws each.
            sources: whose flow is followed, of the training pairs and of the held-out ones, at most (all where there
                are fewer); 0 leaves the flow out.
            targets: of training pairs, at most, that a returned source's own one has to be the nearest among, besides
                those of all sources that are followed.
            solver: of the flow, a name of `flows.transport`.
            solver_steps: its fixed number of steps. The flow starts at x0 itself, whatever the noise.
            reduction: "mean" or "sum" over the dimensions, that of the loss that is trained.
            level: of the intervals of the shares, in (0, 1).
            log: where every look is written: a MetricsLog, or a folder for one (made if it does not exist; it goes on
                from the rows that are there before the first step that it is called with); None for nowhere.

        Raises:
            ValueError: if pairs are not two arrays of one shape and floating point, held-out examples have another
                shape, or a number or name is outside of its range.
        """
        for name, value in (("every", every), ("draws", draws), ("bins", bins), ("solver_steps", solver_steps)):
            _validate.positive_integer(name, value)
        if draws % bins or draws < 2 * bins:
            raise ValueError(f"draws must be a multiple of bins = {bins}, and at least 2 a bin, got {draws}")
        if sources:
            _validate.positive_integer("sources", sources)
        _validate.positive_integer("targets", targets)
        _validate.one_of("solver", solver, tuple(SOLVERS))
        _validate.one_of("reduction", reduction, REDUCTIONS)
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), got {level}")
        if getattr(field, "__hash__", None) is None or not callable(field):
            raise ValueError(f"field must be a hashable function (params, t, x), got {type(field).__name__}")
        _probe.check_pairs("pairs", pairs)
        if held_out is not None:
            _probe.check_pairs("held_out", held_out)
            if held_out[0].shape[1:] != pairs[0].shape[1:]:
                raise ValueError(
                    f"held_out must hold examples of the shape of pairs, {tuple(pairs[0].shape[1:])}, got"
                    f" {tuple(held_out[0].shape[1:])}"
                )
        self.every = every
        self.record: MonitorRecord | None = None
        self._field, self._reduction, self._level = field, reduction, level
        self._solver, self._solver_steps = solver, solver_steps
        probe_key, source_key = jax.random.split(key)
        self._paths = _probe.draw_probe(probe_key, Pair(*pairs), interpolant, draws=draws, bins=bins)
        self._sources: _probe.Sources | None = None
        if sources:
            others = None if held_out is None else Pair(*held_out)
            found = _probe.draw_sources(source_key, Pair(*pairs), others, sources=sources, targets=targets)
            self._sources, self._count = found
        self._memorizing = self._warned = False
        self._verified: bool | None = None
        self._log = log if isinstance(log, MetricsLog) else None
        self._folder = Path(log) if isinstance(log, Path | str) else None
        if self._log is not None:
            self.resume(self._log.rows)

    def __call__(
        self, step: int, params: Params, *, average: Params | None = None, **also: Scalar
    ) -> MonitorRecord | None:
        """Looks if `step` is a multiple of `every`, and returns None at once at all others.

        Args:
            step: number of the step.
            params: at which the gradients are taken: whole on every device, of any framework.
            average: params of the flow, where it is another than that of `params` (their running average).
            **also: numbers for the same row of the log, such as the loss; they are not waited for at other steps.

        Returns:
            The record of a look, else None.

        Raises:
            ValueError: if `params` are split over devices.
        """
        return None if step % self.every else self._look(step, params, average, also)

    def measure(
        self, step: int, params: Params, *, average: Params | None = None, **also: Scalar
    ) -> MonitorRecord | None:
        """A look at any step, as a call at one at which it is due; None in all processes but the first."""
        return self._look(step, params, average, also)

    def _look(
        self, step: int, params: Params, average: Params | None, also: Mapping[str, Scalar]
    ) -> MonitorRecord | None:
        if jax.process_index() != 0:
            return None
        params, flow = (_on_one_device(tree) for tree in (params, params if average is None else average))
        step = int(step)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._log, self._folder = MetricsLog(self._folder, step=step - 1), None
            self.resume(self._log.rows)
        variance, by_bin, noise_scale = self._variance(params)
        record = MonitorRecord(step, variance, by_bin, noise_scale)
        if self._sources is not None:
            record = self._with_flow(record, flow, self._sources)
        self.record = record
        if self._log is not None:
            self._log.write(step, **{name: float(value) for name, value in also.items()}, **record.row())
        if record.memorizing and not self._warned:
            self._warned = True
            counts = self._count, len(self._sources.x0) - self._count  # type: ignore[union-attr]
            warnings.warn(MemorizationWarning(message(record, counts)), stacklevel=3)
        return record

    def _variance(self, params: Params) -> tuple[float, tuple[float, ...], float]:
        """Total, by bin, noise scale; nan, and a warning once, if the first look finds that the gradients are wrong."""
        problem = self._field, params, self._paths, self._reduction
        if self._verified is None:
            try:
                _measures.verify(*problem)
                self._verified = True
            except DisagreementError as error:
                self._verified = False
                warnings.warn(f"{error}. The variance is nan.", DisagreementWarning, stacklevel=4)
        if not self._verified:
            return math.nan, (math.nan,) * len(self._paths), math.nan
        return _measures.variance_of(*problem)

    def row(self, step: int) -> dict[str, float]:
        """The numbers of a look at `step` by the name of their column, for a log of your own; {} if there was none."""
        return self.record.row() if self.record is not None and self.record.step == step else {}

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the state of an earlier run from the rows of its log: whether it memorized, and was warned about."""
        self._memorizing, self._warned = state_of(rows)

    def _with_flow(self, record: MonitorRecord, params: Params, sources: _probe.Sources) -> MonitorRecord:
        distances, returned = _measures.flow_of(
            self._field, params, sources, solver=self._solver, steps=self._solver_steps
        )
        train = self._returned(distances[: self._count], returned[: self._count])
        if len(distances) == self._count:
            return record._replace(train=train)
        held_out = self._returned(distances[self._count :], returned[self._count :])
        self._memorizing = memorizes(train, held_out, before=self._memorizing)
        return record._replace(train=train, held_out=held_out, memorizing=self._memorizing)

    def _returned(self, distances: np.ndarray, returned: np.ndarray) -> Returned:
        share = float(returned.mean())
        return Returned(float(distances.mean()), share, *wilson_interval(share, len(returned), level=self._level))


def _on_one_device(params: Params) -> Params:
    """The params on this process's first device, where nothing is split: per-example gradients would be wrong."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            raise ValueError(f"params must be whole on every device, got {leaf.sharding}")
    return on_first_device(params)
