"""The small trainer: pure steps, one compilation, resumable, stopped by a loss that is not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fvjax import couplings, nets, training
from fvjax.interpolants import constant_noise, linear
from fvjax.types import Pair

MODEL = nets.mlp(2, width=16, depth=1)


def rotated_pairs(n=64):
    """Fixed pairs x1 = swapped x0 + 5."""
    x0 = jax.random.normal(jax.random.key(5), (n, 2))
    return Pair(x0, x0[:, ::-1] + 5)


def make_step(optimizer, interpolant=None, **options):
    """The step of the little network."""
    return training.make_train_step(MODEL.apply, interpolant or linear(), optimizer, **options)


def test_training_lowers_the_loss():
    """Catches an update with the wrong sign or a gradient of the wrong argument."""
    optimizer = training.adam(300)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    _, losses = training.fit(state, make_step(optimizer), rotated_pairs(), steps=300)
    assert losses.shape == (300,)
    assert losses[-20:].mean() < 0.2 * losses[:20].mean()


def test_a_run_in_two_parts_equals_one_run_bit_for_bit():
    """Catches random numbers that depend on how often the loop was entered instead of on the step's number."""
    optimizer = training.adam(30)
    step = make_step(optimizer, constant_noise(0.1))
    start = training.init_state(jax.random.key(0), MODEL, optimizer)
    whole, losses = training.fit(start, step, rotated_pairs(), steps=30, log_every=15)  # two lengths are compiled
    half, first = training.fit(start, step, rotated_pairs(), steps=10, log_every=5)
    resumed, second = training.fit(half, step, rotated_pairs(), steps=30, log_every=5)
    np.testing.assert_array_equal(losses, np.concatenate([first, second]))
    jax.tree.map(np.testing.assert_array_equal, whole._replace(key=None), resumed._replace(key=None))


def test_fit_leaves_the_given_state_usable():
    """Catches a donated input buffer: the caller's state must survive."""
    optimizer = training.adam(4)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    training.fit(state, make_step(optimizer), rotated_pairs(), steps=4)
    assert int(state.step) == 0
    chex.assert_tree_all_finite(state.params)


def test_the_step_compiles_once_for_all_tasks():
    """Catches a retrace for each sigma, data set or seed: minutes on a grid of runs."""
    optimizer = training.adam(20)

    @chex.assert_max_traces(2)  # once abstractly, for the scan's carry, and once for its body
    def step(state, task):
        return make_step(optimizer, task[1])(state, task[0])

    for seed, sigma in ((0, 0.0), (1, 0.5)):
        state = training.init_state(jax.random.key(seed), MODEL, optimizer)
        training.fit(state, step, (rotated_pairs(), constant_noise(sigma)), steps=20, log_every=10)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state():
    """Catches a run that goes on with nan parameters, or loses the good ones."""
    optimizer = optax.sgd(1e12)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    with pytest.raises(training.NonFiniteLossError, match="loss must stay finite") as caught:
        training.fit(state, make_step(optimizer), rotated_pairs(), steps=50, log_every=1)
    chex.assert_tree_all_finite(caught.value.state.params)
    assert int(caught.value.state.step) < 50


def test_ema_follows_the_parameters():
    """Catches an average that stays at the initialisation or is the parameters themselves."""
    optimizer = optax.sgd(1e-2)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    step = jax.jit(make_step(optimizer, ema_decay=0.5))
    average = state.params
    for count in range(3):
        state, _ = step(state, rotated_pairs())
        decay = min(0.5, (1 + count) / (10 + count))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
    chex.assert_trees_all_close(state.ema_params, average, rtol=1e-5)


def test_the_coupling_re_pairs_the_batch():
    """Catches a coupling argument that is accepted and ignored: identity pairs cost more when shuffled."""
    optimizer = optax.sgd(0.0)
    state = training.init_state(jax.random.key(0), MODEL, optimizer)
    x0 = 10 * jax.random.normal(jax.random.key(1), (256, 2))
    batch = Pair(x0, x0)
    _, paired = jax.jit(make_step(optimizer))(state, batch)
    _, shuffled = jax.jit(make_step(optimizer, coupling=couplings.shuffled))(state, batch)
    assert shuffled > paired + 50  # E|x1 - x0|^2 / d = 200 for a derangement, 0 for the pairs


def test_minibatch_draws_aligned_pairs_by_key():
    """Catches x0 and x1 drawn with different indices, and a draw that ignores its key."""
    x0 = jnp.arange(50.0)[:, None]
    one, same, other = (training.minibatch(Pair(x0, -x0), jax.random.key(k), 20) for k in (0, 0, 1))
    np.testing.assert_array_equal(one.x0, -one.x1)
    np.testing.assert_array_equal(one.x0, same.x0)
    assert not np.array_equal(one.x0, other.x0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training.adam(0), "steps must be an integer >= 1, got 0"),
        (lambda: make_step(optax.sgd(0.1), ema_decay=1.0), r"ema_decay must be in \[0, 1\), got 1.0"),
        (lambda: make_step(optax.sgd(0.1), reduction="max"), "reduction must be one of sum, mean, got 'max'"),
        (lambda: training.minibatch(rotated_pairs(), jax.random.key(0), 0), "size must be an integer >= 1, got 0"),
        (lambda: training.fit(None, None, None, steps=0), "steps must be an integer >= 1, got 0"),
        (lambda: training.fit(None, None, None, steps=1, log_every=0), "log_every must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    """Catches a check that was dropped or does not name the argument."""
    with pytest.raises(ValueError, match=message):
        call()
