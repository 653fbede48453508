"""A small training run as a process of its own, resumed where it was: `train.py FOLDER [INDEX PORT]`.

Batches are streamed, with a pause that makes the run last long enough to be killed in the middle. Every step is said.
"""

import hashlib
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from fvjax import couplings, nets, training
from fvjax.checkpoints import Checkpoints, stop_on_sigterm
from fvjax.interpolants import constant_noise

STEPS, LOG_EVERY, SAVE_EVERY, PAUSE, SIZE = 60, 2, 6, 0.01, 8


def batch(index):
    """This process's part of the targets of one step."""
    return np.random.default_rng(index).normal(size=(SIZE, 2)).astype(np.float32)[training.process_rows(SIZE)]


def parts(devices=None):
    """The state before the first step, and the step on all devices or the given ones."""
    optimizer = training.adam(STEPS)
    model = nets.mlp(2, width=16, depth=1, dropout=0.1)
    step = training.make_train_step(
        model.apply,
        constant_noise(0.1),
        optimizer,
        coupling=couplings.independent,
        source=training.standard_normal,
        dropout=True,
        axis_name=training.AXIS,
    )
    return training.init_state(jax.random.key(0), model, optimizer), training.parallelize(step, devices=devices)


def restored(folder):
    """The last state of the run in `folder`."""
    with Checkpoints(folder / "checkpoints", config={}, read_only=True) as checkpoints:
        return checkpoints.restore(parts(jax.devices()[:1])[0])


def digest(state):
    """A number of the dtypes and bits of all leaves."""
    leaves = map(np.asarray, jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))))
    return hashlib.sha256(b"".join(str(leaf.dtype).encode() + leaf.tobytes() for leaf in leaves)).hexdigest()


def main(folder, index=0, port=None):
    """Runs until the end or SIGTERM; the last line is the step and the digest of the state."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    warnings.simplefilter("error")
    if port is not None:
        training.initialize_distributed(f"127.0.0.1:{port}", 2, int(index))

    def data(index):
        say(index)
        time.sleep(PAUSE)
        return batch(index)

    state, step = parts()
    with stop_on_sigterm() as stop, Checkpoints(folder / "checkpoints", config={}) as checkpoints:
        state = checkpoints.restore(state) or state
        with training.MetricsLog(folder, step=int(state.step)) as log:
            state, _ = training.fit(
                state,
                step,
                data,
                steps=STEPS,
                log_every=LOG_EVERY,
                on_log=lambda state, loss: log.write(int(state.step), loss=loss),
                save_every=SAVE_EVERY,
                save=checkpoints.save,
                stop=stop,
                progress="training",
            )
    say(f"end {int(state.step)} {digest(state)}")


def say(line):
    """Tells the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
