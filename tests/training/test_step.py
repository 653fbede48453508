"""The pure step: its random numbers, precision, accumulation, optimiser and coupling."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from fvjax import couplings, nets, training
from fvjax.interpolants import brownian_bridge, linear
from fvjax.types import Model, Pair

MODEL = nets.mlp(2, width=16, depth=1)
N = 8


def targets(n=N):
    """A batch [n, 2]."""
    return jax.random.normal(jax.random.key(5), (n, 2))


def pairs(n=N):
    """A batch of pairs that no coupling has touched: sources and targets in order."""
    return Pair(jnp.arange(2.0 * n).reshape(n, 2), jnp.flip(targets(n)))


@functools.cache
def start(model=MODEL):
    """A state with plain gradient descent of rate 1, so that an update is a gradient."""
    return training.init_state(jax.random.key(0), model, optax.sgd(1.0))


def make(field=MODEL.apply, **options):
    """The step with plain gradient descent."""
    return training.make_train_step(field, brownian_bridge(0.2), optax.sgd(1.0), **options)


class Recorder:
    """A field that notes t, x and the key of every example that it is called with."""

    def __init__(self):
        self.seen = []
        self.model = Model(lambda key: {"w": jnp.ones(2)}, self)

    def __call__(self, params, t, x, *, key):
        """The velocity w x; one row of `seen` is t, x and the two words of the key."""
        note = lambda *values: self.seen.append(np.concatenate([np.ravel(v) for v in values]))  # noqa: E731
        jax.debug.callback(note, t, x, jax.random.key_data(key))
        return params["w"] * x

    def of(self, step, state, batch):
        """What the field was called with, one row an example, in ascending order."""
        self.seen.clear()
        jax.block_until_ready(step(state, batch))
        jax.effects_barrier()
        rows = np.stack(self.seen)
        return rows[np.lexsort(rows.T)]


def test_draws_follow_from_step_and_global_index():
    """Catches sources, times, noise or dropout keys that two devices share, that examples share, or steps repeat."""
    field = Recorder()
    state = start(field.model)
    options = {"source": training.standard_normal, "dropout": True}
    whole = jax.jit(make(field, **options))
    parts = jax.jit(make(field, micro_batches=2, **options))
    devices = training.parallelize(make(field, axis_name=training.AXIS, **options), devices=jax.devices()[:2])
    expected = field.of(whole, state, targets())
    assert expected.shape == (N, 1 + 2 + 2)
    for columns in (expected[:, :1], expected[:, 1:3], expected[:, 3:]):
        assert len(np.unique(columns, axis=0)) == N
    np.testing.assert_array_equal(field.of(parts, state, targets()), expected)
    np.testing.assert_array_equal(field.of(whole, state, targets()), expected)
    later = field.of(whole, state._replace(step=state.step + 1), targets())
    other = field.of(whole, state._replace(key=jax.random.key(9)), targets())
    for columns in (slice(0, 1), slice(1, 3), slice(3, 5)):
        everything = np.concatenate([expected, later, other])[:, columns]
        assert len(np.unique(everything, axis=0)) == 3 * N
    copied = jax.tree.map(jnp.copy, state)
    np.testing.assert_allclose(field.of(devices, copied, targets()), expected, rtol=1e-6)


def test_a_source_is_called_with_its_target():
    """Catches a source that gets another example's x1: from x0 = -x1 the path is (2 t - 1) x1."""
    field = Recorder()
    options = {"source": lambda key, x1: -x1, "dropout": True}
    step = training.make_train_step(field, linear(), optax.sgd(1.0), **options)
    t, *x = field.of(jax.jit(step), start(field.model), targets()).T[:3]
    found = np.stack(x, 1) / (2 * t[:, None] - 1)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(targets(), 0), rtol=1e-4)


@functools.cache
def plain_update():
    """Loss and state after one step with everything at its default."""
    return jax.device_get(jax.jit(make())(start(), pairs()))


def test_the_update_is_the_gradient_of_the_loss():
    """Catches a gradient of something else than the loss that is returned, with other draws for instance."""
    gradient = jax.jit(jax.grad(lambda p: make()(start()._replace(params=p), pairs())[1]))(start().params)
    state, _ = plain_update()
    expected = jax.tree.map(lambda p, g: p - g, start().params, gradient)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
    assert optax.tree.norm(gradient) > 1


def test_micro_batches_do_not_change_the_update():
    """Catches a sum that is taken for a mean, and a part that is left out."""
    expected = plain_update()
    found = jax.jit(make(micro_batches=4))(start(), pairs())
    chex.assert_trees_all_close(found[0].params, expected[0].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


def test_parts_that_do_not_divide_the_batch_are_refused():
    """Catches examples that are dropped without a word."""
    with pytest.raises(ValueError, match="micro_batches must divide the 8 examples of a device's batch, got 3"):
        jax.eval_shape(make(micro_batches=3), start(), pairs())


def test_half_precision_is_for_the_field_only():
    """Catches params, moments, sums of micro-batches or a loss in bfloat16, and an option that is ignored."""
    seen = set()

    def field(params, t, x):
        seen.update(str(p.dtype) for p in jax.tree.leaves(params))
        return MODEL.apply(params, t, x)

    optimizer = training.adam(100, warmup=0)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    step = training.make_train_step(field, brownian_bridge(0.2), optimizer, compute_dtype="bfloat16", micro_batches=2)
    after, loss = jax.jit(step)(state, pairs())
    assert seen == {"bfloat16"}
    chex.assert_trees_all_equal_dtypes(after, state)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((after.params, after.ema_params, loss))} == {"float32"}
    np.testing.assert_allclose(loss, plain_update()[1], rtol=2e-2)
    assert loss != plain_update()[1]
    moved = jax.tree.map(lambda new, old: np.abs(np.asarray(new - old)).max(), after.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_the_given_precision_must_be_one():
    """Catches integers as the type of the params, in which they would all be 0."""
    with pytest.raises(ValueError, match="compute_dtype must be floating point, got int32"):
        make(compute_dtype="int32")


def updates_of(optimizer, gradients):
    """The updates that follow from one gradient after the other."""
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(lambda state, gradient: optimizer.update(gradient, state)[::-1])
        return jax.device_get(jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1])


def test_adam_clips_the_norm_and_warms_up():
    """Catches a clip by coordinate or after Adam, and a warm-up of another length: three updates by hand."""
    gradients = jnp.asarray([[30.0, 40.0], [0.3, 0.4], [0.0, -2.0]])
    found = updates_of(training.adam(100, learning_rate=0.1, warmup=4, clip=1.0, schedule="constant"), gradients)
    mean, square = np.zeros(2), np.zeros(2)
    for count, gradient in enumerate(np.asarray(gradients, float)):
        clipped = gradient / max(1, np.linalg.norm(gradient))
        mean, square = 0.9 * mean + 0.1 * clipped, 0.999 * square + 0.001 * clipped**2
        unbiased = mean / (1 - 0.9 ** (count + 1)), square / (1 - 0.999 ** (count + 1))
        expected = -0.1 * count / 4 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        np.testing.assert_allclose(found[count], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_over_a_whole_run(schedule):
    """Catches a schedule of another length or end: under a constant gradient Adam's updates are the rates."""
    steps, warmup, peak = 60, 6, 0.1
    optimizer = training.adam(steps, learning_rate=peak, warmup=500, schedule=schedule)  # cut to a tenth of the run
    rates = -updates_of(optimizer, jnp.full((steps, 1), 0.5))[:, 0]
    count = np.arange(steps)
    fraction = np.clip((count - warmup) / (steps - warmup), 0, 1)
    after = {"constant": 1.0, "cosine": 0.01 + 0.99 * (1 + np.cos(np.pi * fraction)) / 2}[schedule]
    np.testing.assert_allclose(rates, peak * np.minimum(count / warmup, 1) * after, rtol=1e-3, atol=1e-7)


def test_a_gradient_that_is_not_finite_is_told_by_the_loss():
    """Catches a run whose params become nan while its loss, one step behind, still looks right."""

    def field(params, t, x):
        return x + jnp.sqrt(params["w"])  # 0, with an infinite slope

    state = start(Model(lambda key: {"w": jnp.zeros(2)}, field))
    _, loss = jax.jit(make(field))(state, pairs())
    assert np.isnan(loss)
    _, loss = jax.jit(make(field))(state._replace(params={"w": jnp.ones(2)}), pairs())
    assert np.isfinite(loss)


def test_couplings_re_pair_the_whole_batch():
    """Catches a coupling that is left out, sees a micro-batch only, or draws the same at every step.

    The field is 0 and the path linear: the loss is the cost of the pairs, |x1 - x0|^2 / 2. Sinkhorn is in
    tests/parallel.
    """
    x0, x1 = 3 * targets(16), jnp.flip(targets(16)) + 1
    cost = np.sum((np.asarray(x0)[:, None] - np.asarray(x1)) ** 2, -1) / 2
    least = cost[scipy.optimize.linear_sum_assignment(cost)].mean()

    def losses(coupling):
        options = {"coupling": coupling, "micro_batches": 4}
        step = training.make_train_step(lambda params, t, x: 0 * x, linear(), optax.sgd(1.0), **options)
        run = jax.jit(lambda: jax.lax.map(lambda i: step(start()._replace(step=i), Pair(x0, x1))[1], jnp.arange(20)))
        return np.asarray(run())

    exact = losses(couplings.minibatch_ot())
    independent = losses(couplings.independent)
    np.testing.assert_allclose(exact, least, rtol=1e-5)
    assert len(np.unique(independent)) == 20
    error = independent.std() / np.sqrt(20)
    assert abs(independent.mean() - cost.mean()) < 4 * error
