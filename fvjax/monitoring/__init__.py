"""Gradient variance and memorization of a flow while it trains, in any training loop.

    monitor = VarianceMonitor(field, pairs, constant_noise(0.05), key=key, held_out=others, log=folder)
    for step in range(1, steps + 1):
        params, opt_state, loss = update(params, opt_state, batch(step))
        monitor(step, params, loss=loss)

`fvjax.training.fit(..., monitor=monitor)` does the same. Columns, the rule of the warning and the measured cost:
docs/monitoring.md.
"""

from fvjax.monitoring._monitor import VarianceMonitor as VarianceMonitor
from fvjax.monitoring._record import MemorizationWarning as MemorizationWarning
from fvjax.monitoring._record import MonitorRecord as MonitorRecord
from fvjax.monitoring._record import Returned as Returned
