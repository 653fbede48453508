"""Checkpoints: bit-exact, in the background, the last k and every n-th; clear errors for what does not fit."""

import os
import signal
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fvjax.checkpoints import (
    CheckpointError,
    Checkpoints,
    ConfigMismatchError,
    StateMismatchError,
    diff_configs,
    stop_on_sigterm,
)
from fvjax.training import TrainState

CONFIG = {"seed": 0, "model": {"width": 16, "depth": 2}}
DTYPES = ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int32", "uint8", "uint32", "bool", "complex64"]


def state_at(step, width=3):
    """A small state of Adam with clipping, a function of the step."""
    params = {
        "dense": {"w": step + jnp.arange(2.0 * width).reshape(2, width), "b": jnp.full(width, step, jnp.bfloat16)}
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1e-3)))
    ema = jax.tree.map(lambda x: x / 3, params)
    return TrainState(jnp.asarray(step, jnp.int32), params, optimizer.init(params), ema, jax.random.key(step))


def bits(leaf):
    """Type, dtype, shape and bytes of a leaf."""
    if not hasattr(leaf, "dtype"):
        return type(leaf), leaf
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return isinstance(leaf, jax.Array), str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()


def assert_same_bits(found, expected):
    """Same tree, types, dtypes, shapes and bits, so that nan and -0.0 count."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def names(folder):
    """What lies in the folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    """Catches a conversion on the way: nan payloads, -0.0, half precision, 0-d and empty arrays, numbers, keys."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in DTYPES:
        raw = rng.integers(0, 2 if name == "bool" else 256, 40, np.uint8)
        arrays[name] = jnp.asarray(raw.view(jnp.dtype(name)))
        arrays[f"{name} 0-d"] = jnp.asarray(raw.view(jnp.dtype(name))[0])
    arrays |= {"a/b": jnp.zeros(1), "a": {"b": -jnp.zeros(2)}, "empty": jnp.zeros((0, 3), jnp.bfloat16)}
    arrays |= {"float64": rng.random(3), "int64": np.int64(2**60), "strided": np.arange(12).reshape(3, 4).T[::2]}
    arrays |= {"int": 2**40, "float": 0.1, "bool": True, "weak": jnp.asarray(1e-3), "nothing": None, "no leaves": {}}
    keys = [jax.random.key(1, impl="rbg"), jax.random.split(jax.random.key(2), (2, 2)), optax.EmptyState()]
    state = state_at(7)._replace(params=arrays, ema_params=keys)
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore(state)
    assert_same_bits(found, state)
    assert found.params["weak"].weak_type
    assert jax.random.key_impl(found.ema_params[0]) == jax.random.key_impl(keys[0])


def test_a_shape_is_enough_to_restore_on_the_devices_it_names(tmp_path):
    """Catches a `like` whose values are needed, and arrays that leave their devices or become committed."""
    mesh = Mesh(np.array(jax.devices()[:2]), "data")
    state = state_at(1)
    sharded, replicated = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    state.params["dense"]["w"] = jax.device_put(state.params["dense"]["w"], sharded)
    state = state._replace(key=jax.device_put(state.key, replicated))
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state)
        found = checkpoints.restore(state)
        abstract = checkpoints.restore(jax.eval_shape(lambda: state_at(1)))
    assert_same_bits(found, state)
    assert_same_bits(abstract, state)
    assert found.params["dense"]["w"].sharding == sharded
    assert found.key.sharding == replicated
    assert found.step.committed == state.step.committed


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """Catches a write from the memory that the next step was given."""
    params = {"w": jnp.zeros(2_000_000)}
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    add({"w": jnp.zeros(2_000_000)})
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state_at(1)._replace(params=params))
        for _ in range(3):
            params = add(params)
        found = checkpoints.restore(state_at(1)._replace(params=params))
    assert not np.asarray(found.params["w"]).any()


def test_save_returns_before_the_checkpoint_is_written(tmp_path):
    """Catches a save that blocks the training, and a wait that does not wait."""
    state = state_at(1)._replace(params={"w": np.zeros(20_000_000, np.float32)})
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state)
        assert checkpoints.steps() == []
        checkpoints.wait()
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"keep_last": 1}, [9]), ({"keep_last": 2}, [7, 9]), ({"keep_last": 1, "keep_every": 4}, [4, 8, 9])],
)
def test_the_last_and_every_nth_are_kept(tmp_path, options, kept):
    """Catches a rule that keeps too many, or counts checkpoints instead of steps; nothing else lies in the folder."""
    with Checkpoints(tmp_path, config=CONFIG, **options) as checkpoints:
        for step in (1, 4, 7, 8, 9) if "keep_every" in options else (5, 7, 9):
            checkpoints.save(state_at(step))
        checkpoints.wait()
        assert checkpoints.steps() == kept
    assert names(tmp_path) == [f"step_{step:09d}" for step in kept]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    """Catches a first start that fails, or makes up a state; the folder is made, with its parents."""
    with Checkpoints(tmp_path / "a" / "b", config=CONFIG) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore(state_at(0)) is None


def test_the_step_saved_last_is_not_written_again_and_an_older_one_is_refused(tmp_path):
    """Catches a run that was not restored and replaces the checkpoints of the one before it."""
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state_at(10))
        checkpoints.save(state_at(10))
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        for step in (1, 10):
            with pytest.raises(ValueError, match=f"state.step must be above 10, the newest .* got {step}"):
                checkpoints.save(state_at(step))
        assert_same_bits(checkpoints.restore(state_at(0)), state_at(10))
        checkpoints.save(state_at(10))
        checkpoints.save(state_at(11))
        checkpoints.wait()
        assert checkpoints.steps() == [10, 11]


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    """Catches a resume of another experiment; ignored names and a folder opened read-only follow the same rule."""
    with Checkpoints(tmp_path, config={**CONFIG, "out": "here"}, ignore=["out"]) as checkpoints:
        checkpoints.save(state_at(1))
    other = {"seed": 0, "model": {"width": 32, "depth": 2}, "out": "there", "new": [1]}
    for read_only in (False, True):
        with pytest.raises(ConfigMismatchError) as caught:
            Checkpoints(tmp_path, config=other, ignore=["out"], read_only=read_only)
        assert str(tmp_path) in str(caught.value)
        assert str(caught.value).endswith("(saved -> asked) model.width: 16 -> 32; new: (absent) -> [1]")
    with Checkpoints(tmp_path, config=other, ignore=["out", "model", "new"]) as checkpoints:
        assert checkpoints.restore(state_at(1)) is not None


@pytest.mark.parametrize(
    ("saved", "asked", "difference"),
    [
        ({"a": (1, 2)}, {"a": [1.0, 2]}, []),
        ({"a": float("nan")}, {"a": float("nan")}, []),
        ({"a": 1}, {"a": True}, ["a: 1 -> true"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b: 1 -> (absent)", "a: (absent) -> {}"]),
        ({"a": None}, {}, ["a: null -> (absent)"]),
        ({"a": np.float32(0.5)}, {"a": 0.5}, []),
    ],
)
def test_configurations_compare_by_value(saved, asked, difference):
    """Catches a resume that is refused for 1 and 1.0 or a tuple, and one that is not for true and 1."""
    assert diff_configs(saved, asked) == difference


def test_a_state_of_another_network_is_refused_by_leaf(tmp_path):
    """Catches a restore that reshapes, pads, casts or drops leaves, or says only that something differs."""
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state_at(1))
        with pytest.raises(
            StateMismatchError, match=r"state.params\['dense'\]\['w'\]: float32\[2, 3\] -> float32\[2, 4\]"
        ):
            checkpoints.restore(state_at(1, width=4))
        half = state_at(1)._replace(params={"dense": {"w": jnp.zeros((2, 3), jnp.bfloat16)}})
        message = r"got 2 that differ .*\['b'\]: bfloat16\[3\] -> \(absent\); .*float32\[2, 3\] -> bfloat16\[2, 3\]"
        with pytest.raises(StateMismatchError, match=message):
            checkpoints.restore(half)
        with pytest.raises(StateMismatchError, match=r"state.key: key<fry>\[\] -> key<rbg>\[\]"):
            checkpoints.restore(state_at(1)._replace(key=jax.random.key(1, impl="rbg")))


def test_two_runs_do_not_share_a_folder_but_a_reader_may_look_on(tmp_path):
    """Catches two runs that remove each other's checkpoints; a reader changes nothing in the folder."""
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state_at(1))
        checkpoints.wait()
        with pytest.raises(CheckpointError, match="must not be in use"):
            Checkpoints(tmp_path, config=CONFIG)
        (tmp_path / "unfinished_step_000000003").mkdir()
        with Checkpoints(tmp_path, config=CONFIG, read_only=True) as reader:
            assert_same_bits(reader.restore(state_at(0)), state_at(1))
            with pytest.raises(ValueError, match="read_only must be False to save, got True"):
                reader.save(state_at(2))
        checkpoints.save(state_at(2))
    assert names(tmp_path) == ["step_000000001", "step_000000002", "unfinished_step_000000003"]
    with Checkpoints(tmp_path, config=CONFIG):
        assert names(tmp_path) == ["step_000000001", "step_000000002"]


def test_a_folder_that_cannot_be_written_is_one_error_at_once(tmp_path):
    """Catches a run that finds out after an hour that it cannot save."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="must be writable, got .*file.inside .*NotADirectoryError"):
        Checkpoints(tmp_path / "file" / "inside", config=CONFIG)
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(CheckpointError, match="must be writable.*PermissionError"):
            Checkpoints(tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last must be an integer >= 1, got 0"),
        ({"keep_every": 0}, "keep_every must be an integer >= 1, got 0"),
        ({"config": {"out": Path("a")}}, "config.out must be a JSON value .* got PosixPath"),
    ],
)
def test_bad_input_gets_one_clear_error(tmp_path, options, message):
    """Catches a check that was dropped or does not name the argument."""
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **{"config": CONFIG, **options})


@pytest.mark.parametrize("leaf", ["text", np.array([None]), np.array(["text"])])
def test_a_leaf_that_is_no_array_is_refused(tmp_path, leaf):
    """Catches a checkpoint that lacks a leaf, or a write that fails later with an error of another library."""
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        with pytest.raises(ValueError, match=r"state must hold arrays, .* at state.params\['x'\]"):
            checkpoints.save(state_at(1)._replace(params={"x": leaf}))
        assert checkpoints.steps() == []


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a shell gives the programs that it runs in the background none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_sets_a_flag_and_the_handlers_come_back():
    """Catches a run that dies on the scheduler's SIGTERM, or a Ctrl-C that can never end it."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_sigterm() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    with stop_on_sigterm() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_signals_need_the_main_thread():
    """Catches Python's own message, which does not say what to do."""
    caught = []

    def enter():
        try:
            with stop_on_sigterm():
                pass
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter, name="worker")
    thread.start()
    thread.join()
    assert caught == ["stop_on_sigterm must be used in the main thread, got thread 'worker'"]


def test_no_library_warns(tmp_path):
    """Catches a call that orbax or jax deprecates, also in the thread that writes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
            checkpoints.save(state_at(1))
            checkpoints.restore(state_at(1))
    assert [str(warning.message) for warning in caught] == []
