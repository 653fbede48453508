"""Training of velocity fields: a pure step, its copy on every device, and the loop around both.

    optimizer = adam(400_000, learning_rate=2e-4, warmup=5000, schedule="constant")
    step = make_train_step(model.apply, constant_noise(0.05), optimizer, source=standard_normal)
    state, losses = fit(init_state(key, model, optimizer), parallelize(step), batches, steps=400_000)

The step is free of devices and data: `step(state, batch) -> (state, loss)`. Its random numbers follow from the run's
key, the step's number and each example's index in the global batch, so that a result does not depend on the number of
devices, processes or micro-batches beyond the order of sums, and a resumed run is the uninterrupted one, bit for bit.
"""

from fvjax.training._logs import MetricsLog as MetricsLog
from fvjax.training._logs import Progress as Progress
from fvjax.training._loop import NonFiniteLossError as NonFiniteLossError
from fvjax.training._loop import fit as fit
from fvjax.training._parallel import AXIS as AXIS
from fvjax.training._parallel import initialize_distributed as initialize_distributed
from fvjax.training._parallel import on_first_device as on_first_device
from fvjax.training._parallel import parallelize as parallelize
from fvjax.training._parallel import process_rows as process_rows
from fvjax.training._step import TrainState as TrainState
from fvjax.training._step import TrainStep as TrainStep
from fvjax.training._step import adam as adam
from fvjax.training._step import init_state as init_state
from fvjax.training._step import make_train_step as make_train_step
from fvjax.training._step import minibatch as minibatch
from fvjax.training._step import standard_normal as standard_normal
