"""Training on 1, 2 and 4 devices, and in two processes: the same run."""

import functools
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from fvjax import couplings, training
from fvjax.interpolants import constant_noise, linear
from fvjax.types import Model, Pair

N, STEPS = 8, 100
LAYOUT = ("NHWC", "HWIO", "NHWC")
FAULTS = Path(__file__).resolve().parents[1] / "faults"


def images(index):
    """The targets of one step, 4 x 4 images."""
    return np.random.default_rng(index).normal(size=(N, 4, 4, 1)).astype(np.float32) + 1


def initial(key):
    """Params of two convolutions."""
    first, last = jax.random.split(key)
    return {
        "first": 0.3 * jax.random.normal(first, (3, 3, 1, 4)),
        "last": 0.3 * jax.random.normal(last, (3, 3, 4, 1)),
        "bias": jnp.zeros(4),
        "mean": jnp.zeros(1),
    }


def field(params, t, x, *, key):
    """Two convolutions, with dropout and the time in between."""

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)[0]

    hidden = jnp.tanh(convolve(x, params["first"]) + params["bias"] * t)
    kept = jax.random.bernoulli(key, 0.8, hidden.shape)
    return convolve(jnp.where(kept, hidden / 0.8, 0.0), params["last"]) + params["mean"]


@functools.cache
def run(devices, micro_batches=1):
    """100 steps on so many devices, with everything that is random."""
    optimizer = training.adam(STEPS, learning_rate=1e-2, warmup=10)
    step = training.make_train_step(
        field,
        constant_noise(0.1),
        optimizer,
        coupling=couplings.independent,
        source=training.standard_normal,
        dropout=True,
        micro_batches=micro_batches,
        axis_name=training.AXIS,
    )
    state = training.init_state(jax.random.key(0), Model(initial, field), optimizer)
    runner = training.parallelize(step, devices=jax.devices()[:devices])
    state, losses = training.fit(state, runner, images, steps=STEPS, log_every=10)
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), losses


@pytest.mark.parametrize(("devices", "micro_batches"), [(2, 2), (4, 1)])
def test_the_number_of_devices_does_not_matter(devices, micro_batches):
    """Catches gradients that are summed or lost, draws that depend on the device, and devices that drift apart.

    Only the order of sums differs: 1e-5 of the loss at every step, and of the largest of each kind of parameters.
    """
    (expected, curve), (found, losses) = run(1), run(devices, micro_batches)
    assert curve[-10:].mean() < 0.8 * curve[:10].mean()  # it learns: an idle run would agree, too
    np.testing.assert_allclose(losses, curve, rtol=1e-5)
    for name in ("params", "ema_params"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (expected, found)), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    chex.assert_trees_all_equal((found.step, found.key), (expected.step, expected.key))


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_couplings_act_across_devices(method):
    """Catches pairs that are made within the part of a device: x1 would never cross to the other one.

    The field is 0 and the path linear: the loss is the cost of the pairs, |x1 - x0|^2 / 2.
    """
    x0, x1 = (np.asarray(jax.random.normal(jax.random.key(k), (N, 2))) for k in (0, 1))
    cost = np.sum((x0[:, None] - x1) ** 2, -1) / 2
    least = cost[scipy.optimize.linear_sum_assignment(cost)].mean()
    apart = np.mean([cost[s, s][scipy.optimize.linear_sum_assignment(cost[s, s])] for s in (slice(4), slice(4, 8))])
    assert apart > 1.05 * least
    state = training.TrainState(jnp.int32(0), jnp.zeros(1), optax.sgd(1.0).init(0), jnp.zeros(1), jax.random.key(3))

    def make(axis_name):
        options = {"coupling": couplings.minibatch_ot(method=method), "axis_name": axis_name}
        return training.make_train_step(lambda params, t, x: 0 * x, linear(), optax.sgd(1.0), **options)

    expected = least if method == "exact" else jax.jit(make(None))(state, Pair(x0, x1))[1]
    found = training.parallelize(make(training.AXIS), devices=jax.devices()[:2])(state, Pair(x0, x1))[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture
def port():
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_without_a_cluster_processes_must_be_named(repository):
    """Catches a raw error of jax where no cluster is found, and one about clusters where it is only too late."""
    script = """
import jax
from fvjax.training import initialize_distributed
for _ in range(2):
    try:
        initialize_distributed()
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, str(error))
    jax.devices()
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("ValueError coordinator must be given where no cluster is detected, got None")
    assert second.startswith("RuntimeError jax.distributed.initialize() must be called before")


def test_two_processes_are_two_devices(tmp_path, port, repository):
    """Catches processes that feed the same rows or drift apart, two writers, and a state that only one can save.

    One process with two devices is the same program, and a sum of two numbers has one order: the bits are the same.
    """
    train = SimpleNamespace(**runpy.run_path(str(FAULTS / "train.py"), run_name="train"))
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": one_device,
        "PYTHONPATH": str(repository),
    }
    command = [sys.executable, str(FAULTS / "train.py"), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(index), str(port)], **pipes) for index in (0, 1)]
    state, step = train.parts(jax.devices()[:2])
    rows = {}
    whole, _ = training.fit(
        state,
        step,
        train.batch,
        steps=train.STEPS,
        log_every=train.LOG_EVERY,
        on_log=lambda state, loss: rows.update({int(state.step): loss}),
    )
    outputs = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            outputs.append(([line for line in output.splitlines() if line.startswith("end")], errors))
    finally:
        for process in processes:
            process.kill()
    expected = [f"end {train.STEPS} {train.digest(whole)}"]
    assert [ends for ends, _ in outputs] == [expected, expected]
    assert train.digest(train.restored(tmp_path)) == train.digest(whole)
    assert training.MetricsLog(tmp_path, step=train.STEPS).rows == [{"step": s, "loss": v} for s, v in rows.items()]
    assert "training: 60/60" in outputs[0][1]
    assert "training:" not in outputs[1][1]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # of process 0, and of the line above
