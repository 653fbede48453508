"""The loop: what it asks for, when it saves and stops, and that none of it changes the numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fvjax import nets, training
from fvjax.checkpoints import Checkpoints
from fvjax.interpolants import constant_noise
from fvjax.training import TrainState
from fvjax.types import Pair

MODEL = nets.mlp(2, width=8, depth=1)
OPTIMIZER = training.adam(40)
N = 8


def batch(index):
    """The pairs of step `index`, as the host makes them."""
    x0, x1 = np.random.default_rng(index).normal(size=(2, N, 2)).astype(np.float32)
    return Pair(x0, x1 + 3)


def initial():
    """The state before the first step."""
    return training.init_state(jax.random.key(0), MODEL, OPTIMIZER)


@functools.cache
def step():
    """One step for all tests here: compiled once."""
    return training.make_train_step(MODEL.apply, constant_noise(0.1), OPTIMIZER)


@functools.cache
def on_devices(count):
    """The same on several devices."""
    made = training.make_train_step(MODEL.apply, constant_noise(0.1), OPTIMIZER, axis_name=training.AXIS)
    return training.parallelize(made, devices=jax.devices()[:count])


def bits(state):
    """The bytes of every leaf."""
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in leaves]


class Counter:
    """A step that only counts, which `fit` takes for one that is compiled; the loss of step i is i, or nan."""

    compiled = True

    def __init__(self, wrong=None):
        self.wrong = wrong

    def __call__(self, state, batch):
        """Advances by one; `params` becomes what the batch was."""
        count = int(state.step) + 1
        loss = np.nan if count == self.wrong else count
        return state._replace(step=np.int32(count), params=batch), jnp.float32(loss)


def counting(first=0):
    """A state for the counter."""
    return TrainState(np.int32(first), np.int32(-1), (), (), ())


def test_streamed_and_resident_data_give_the_same_bits():
    """Catches a compiled loop whose steps are not the single step: other random numbers, another order of sums."""
    fixed = jax.tree.map(jnp.asarray, batch(0))
    resident, losses = training.fit(initial(), step(), fixed, steps=12, log_every=4)
    streamed, again = training.fit(initial(), step(), lambda _: fixed, steps=12, log_every=5)
    np.testing.assert_array_equal(losses, again)
    assert losses.shape == (12,)
    assert losses.dtype == again.dtype == np.float32
    assert bits(resident) == bits(streamed)


@pytest.mark.parametrize(("first", "log_every"), [(0, 1), (0, 4), (7, 4), (3, 100)])
def test_each_batch_is_asked_for_once_and_in_order(first, log_every):
    """Catches a batch made twice, skipped or handed to another step: a position in the data that drifts."""
    asked, states = [], []

    def data(index):
        asked.append(index)
        return np.int32(index)

    state, losses = training.fit(
        counting(first), Counter(), data, steps=13, log_every=log_every, on_log=lambda s, _: states.append(s)
    )
    assert asked == list(range(first, 13))
    assert [int(s.params) for s in states] == [int(s.step) - 1 for s in states]
    assert (int(state.step), int(state.params)) == (13, 12)
    np.testing.assert_array_equal(losses, np.arange(first, 13) + 1)


def test_what_is_logged_and_saved_when():
    """Catches means over the wrong steps, a checkpoint that is left out, and one too many at the end."""
    logged, saved = [], []
    training.fit(
        counting(2),
        Counter(),
        np.int32,
        steps=11,
        log_every=2,
        on_log=lambda state, loss: logged.append((int(state.step), loss)),
        save_every=4,
        save=lambda state: saved.append(int(state.step)),
    )
    assert logged == [(4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5), (11, 11.0)]
    assert saved == [4, 8, 11]
    saved.clear()
    training.fit(counting(), Counter(), np.int32, steps=8, log_every=4, save_every=4, save=saved.append)
    assert [int(s.step) for s in saved] == [4, 8]
    training.fit(counting(8), Counter(), np.int32, steps=8, save=saved.append)
    assert len(saved) == 2  # a finished run is left as it is


class Looks:
    """A monitor that only remembers what it was given."""

    def __init__(self, every):
        self.every, self.seen = every, []

    def measure(self, step, params, *, average=None, **also):
        """Remembers."""
        self.seen.append(("look", step, int(params), *also.values()))


@pytest.mark.parametrize(
    ("every", "looks"),
    [
        (2, [(4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5), (11, 11.0)]),
        (4, [(4, 3.5), (8, 6.5), (11, 10.0)]),
        (8, [(8, 5.5), (11, 10.0)]),
    ],
)
def test_the_monitor_looks_at_its_own_steps_and_before_the_log(every, looks):
    """Catches looks at the steps of the log, means over the wrong steps, and a log that cannot know of the look."""
    monitor = Looks(every)
    options = {
        "steps": 11,
        "log_every": 4,
        "on_log": lambda state, loss: monitor.seen.append(("log", int(state.step), loss)),
    }
    training.fit(counting(2), Counter(), np.int32, monitor=monitor, **options)
    logs = [(4, 3.5), (8, 6.5), (11, 10.0)]
    found = [("look", step, step - 1, loss) for step, loss in looks] + [("log", *row) for row in logs]
    assert monitor.seen == sorted(found, key=lambda entry: (entry[1], entry[0] == "log"))


def test_a_stopped_run_is_not_looked_at():
    """Catches a look at a step that the resumed run does not look at."""
    monitor, asked = Looks(4), iter([False] * 6 + [True])
    training.fit(counting(), Counter(), np.int32, steps=50, log_every=4, monitor=monitor, stop=lambda: next(asked))
    assert [entry[:2] for entry in monitor.seen] == [("look", 4)]


def test_a_stop_saves_at_once():
    """Catches a stop that waits for the next log, loses the steps since the last one, or is logged as a whole mean."""
    saved, logged, asked = [], [], iter([False] * 6 + [True])
    state, losses = training.fit(
        counting(),
        Counter(),
        np.int32,
        steps=50,
        log_every=4,
        on_log=lambda state, loss: logged.append(loss),
        save=lambda state: saved.append(int(state.step)),
        stop=lambda: next(asked),
    )
    assert (int(state.step), saved, logged) == (6, [6], [2.5])
    np.testing.assert_array_equal(losses, np.arange(6) + 1)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_step_is_traced_once(parallel):
    """Catches a loop that retraces, because a state comes back as something else than it went in."""
    chex.clear_trace_counter()  # it knows functions by their name
    axis = training.AXIS if parallel else None
    made = training.make_train_step(MODEL.apply, constant_noise(0.1), OPTIMIZER, axis_name=axis)
    once = chex.assert_max_traces(made, n=1)
    runner = training.parallelize(once, devices=jax.devices()[:2]) if parallel else once
    state = initial()
    for steps in (5, 9):
        state, _ = training.fit(state, runner, batch, steps=steps, log_every=2)
    assert int(state.step) == 9


@pytest.mark.parametrize("parallel", [False, True])
def test_a_stopped_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, parallel):
    """Catches anything that is not in the checkpoint, and a state that comes back with another type or placement."""
    options = {"steps": 20, "log_every": 2}
    runner = on_devices(2) if parallel else step()
    whole, losses = training.fit(initial(), runner, batch, **options)
    found, polls = [], iter([False] * 7 + [True])
    while True:
        with Checkpoints(tmp_path, config={}) as checkpoints:
            state = checkpoints.restore(initial()) or initial()
            stop = lambda: next(polls, False)  # noqa: E731
            state, part = training.fit(state, runner, batch, save_every=4, save=checkpoints.save, stop=stop, **options)
            found.append(part)
            if int(state.step) == 20:
                break
    assert [len(part) for part in found] == [7, 13]
    np.testing.assert_array_equal(np.concatenate(found), losses)
    with Checkpoints(tmp_path, config={}, read_only=True) as checkpoints:
        assert checkpoints.steps() == [12, 16, 20]
        assert bits(checkpoints.restore(initial())) == bits(whole)


def test_the_given_state_survives_a_stream():
    """Catches a donated input buffer: the caller's state must stay usable, here and with several devices."""
    state = initial()
    before = bits(state)
    training.fit(state, step(), batch, steps=2)
    training.fit(state, on_devices(2), batch, steps=2)
    assert bits(state) == before


def nan_at(count):
    """A pure step whose loss is nan at step `count`."""

    def advance(state, task):
        state = state._replace(step=state.step + 1)
        return state, jnp.where(state.step == count, jnp.nan, 1.0)

    return advance


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("wrong", [5, 8])
def test_a_loss_that_is_not_finite_names_its_step_and_is_never_saved(streamed, wrong):
    """Catches an error that names the log instead of the step, and a checkpoint that a resumed run would die of."""
    saved, logged = [], []
    data = (lambda _: jnp.zeros(1)) if streamed else jnp.zeros(1)
    with pytest.raises(training.NonFiniteLossError, match=f"got nan or inf at step {wrong} ") as caught:
        training.fit(
            counting()._replace(step=jnp.int32(0)),
            nan_at(wrong),
            data,
            steps=20,
            log_every=4,
            on_log=lambda state, _: logged.append(int(state.step)),
            save_every=4,
            save=lambda state: saved.append(int(state.step)),
        )
    assert caught.value.step == wrong
    assert logged == saved == [4]
    assert (caught.value.state is None) == streamed
    if not streamed:
        assert int(caught.value.state.step) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"save_every": 4}, "save_every must be None where there is no save, got 4"),
        ({"save_every": 3, "save": print, "log_every": 2}, "save_every must be a multiple of log_every = 2, got 3"),
        ({"save_every": 0, "save": print}, "save_every must be an integer >= 1, got 0"),
        (
            {"monitor": Looks(6), "log_every": 4},
            "monitor.every must be a multiple or a divisor of log_every = 4, got 6",
        ),
        ({"data": batch(0)}, "data must be a function where the step is parallelized, got Pair"),
        ({"data": lambda i: batch(i)[:1]}, "batch must divide evenly among the 3 devices of this process, got 8 exam"),
        ({"data": lambda i: (np.zeros(3), np.zeros(6))}, "batch must have one common leading axis"),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    """Catches a check that was dropped or does not name the argument."""
    options = {"data": batch, "steps": 4} | call
    with pytest.raises(ValueError, match=message):
        training.fit(counting(), on_devices(3), options.pop("data"), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training.process_rows(6), "size must be divisible by the 4 devices, got 6"),
        (lambda: training.process_rows(0), "size must be an integer >= 1, got 0"),
        (lambda: training.initialize_distributed("127.0.0.1:1", 2), "processes and process_id must be given together"),
        (lambda: training.initialize_distributed(process_id=0), "must be given together, got .None, None, 0."),
        (lambda: training.adam(10, warmup=-1), "warmup must be an integer >= 1, got -1"),
        (lambda: training.adam(10, learning_rate=0.0), "learning_rate must be .*, got 0.0"),
        (lambda: training.adam(10, schedule="linear"), "schedule must be one of cosine, constant, got 'linear'"),
        (
            lambda: training.make_train_step(MODEL.apply, constant_noise(0.1), optax.sgd(0.1), micro_batches=0),
            "micro_batches must be an integer >= 1, got 0",
        ),
    ],
)
def test_bad_settings_get_one_clear_error(call, message):
    """Catches a check that was dropped or does not name the argument."""
    with pytest.raises(ValueError, match=message):
        call()


def test_a_replicated_state_comes_back_to_one_device():
    """Catches a leaf that stays on all devices, keys too, where code for one device goes on with it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), training.AXIS)
    state = jax.device_put(initial(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    found = training.on_first_device(state)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {2}
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(found)} == {True}
    assert bits(found) == bits(state)


def test_rows_of_a_single_process_are_all():
    """Catches a share by devices instead of by processes; two processes are in tests/parallel."""
    assert training.process_rows(8) == slice(0, 8)
