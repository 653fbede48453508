"""The monitor: right numbers, a warning where a flow memorizes and nowhere else, and no trace in the training."""

import csv
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fvjax
from fvjax import couplings, metrics, nets, training
from fvjax.data import ot_benchmark
from fvjax.interpolants import constant_noise, linear
from fvjax.monitoring import MemorizationWarning, Returned, VarianceMonitor, _measures, _record
from fvjax.pairs import exact_gradient_moments
from fvjax.sites import DisagreementWarning
from fvjax.types import Pair

KEY = jax.random.key(0)


def some_pairs(n=40, seed=0, dtype=np.float32):
    """Independent ends in three dimensions."""
    x0, x1 = np.random.default_rng(seed).normal(size=(2, n, 3)).astype(dtype)
    return Pair(x0, x1 + 2)


PAIRS, OTHERS = some_pairs(), some_pairs(30, seed=1)
PARAMS = {"a": jnp.asarray([[0.3, -0.2, 0.1], [0.5, 0.1, 0.4], [-0.3, 0.2, 0.2]]), "b": jnp.asarray([0.5, -1.0, 0.2])}


def field(params, t, x):
    """Not linear in x."""
    return jnp.tanh(params["a"] @ x) + params["b"] * t


def constant(params, t, x):
    """The same everywhere."""
    return params + 0 * x


def tiny(log=None, *, pairs=PAIRS, key=KEY, **options):
    """A monitor that costs little."""
    options = {"held_out": OTHERS, "draws": 8, "bins": 2, "sources": 10, "solver_steps": 2} | options
    return VarianceMonitor(field, pairs, constant_noise(0.1), key=key, log=log, **options)


def test_estimates_have_no_bias():
    """Catches a wrong ddof: few draws, in bins of time, against the exact moments of the set of pairs.

    Plug-in estimates are 4.5 to 9 standard errors off. The mean gradient is large, so that all probes resolve it: else
    those that do not would be missing in the mean of its estimates.
    """
    pairs, params = jax.tree.map(jnp.asarray, some_pairs(4)), PARAMS | {"b": jnp.asarray([5.0, -3.0, 4.0])}
    loss = fvjax.squared_error(field)

    def exact(start, end):
        moments = exact_gradient_moments(loss, params, pairs, linear()._replace(time_range=(start, end)))
        return float(fvjax.total_variance(moments)), float(sum(jnp.sum(m**2) for m in jax.tree.leaves(moments.mean)))

    options = {"draws": 8, "bins": 2, "sources": 0, "reduction": "sum"}
    found = []
    for key in jax.random.split(KEY, 200):
        record = VarianceMonitor(field, pairs, linear(), key=key, **options).measure(0, params)
        signal = record.gradient_variance / record.gradient_noise_scale
        found.append([record.gradient_variance, signal, *record.gradient_variance_bins])
    found = np.asarray(found)
    assert found[:, 1].min() > 0
    whole, squared_mean = exact(0.0, 1.0)
    expected = [whole, squared_mean, exact(0.0, 0.5)[0], exact(0.5, 1.0)[0]]
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4 * error)


def test_a_mean_gradient_that_is_not_resolved_gives_inf_not_a_negative_noise_scale():
    """Catches an estimate of |E g|^2 below zero that is divided by."""
    pairs = Pair(np.zeros((2, 1), np.float32), np.asarray([[1.0], [-1.0]], np.float32))
    scales = [
        VarianceMonitor(constant, pairs, linear(), key=key, draws=8, bins=2, sources=0)
        .measure(0, jnp.zeros(1))
        .gradient_noise_scale
        for key in jax.random.split(KEY, 8)
    ]
    assert np.inf in scales
    assert min(scales) > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_interval_solves_its_equation(share):
    """Catches a wrong formula: its limits p are where |share - p| = z sqrt(p (1 - p) / n)."""
    low, high = metrics.wilson_interval(share, 64, level=0.99)
    for limit in (low, high):
        if 0 < limit < 1:
            assert abs(share - limit) == pytest.approx(2.5758 * np.sqrt(limit * (1 - limit) / 64), rel=1e-4)
    assert (low == 0) == (share == 0)
    assert (high == 1) == (share == 1)


@pytest.mark.parametrize(
    ("share", "low", "before", "expected"),
    [
        (0.3, 0.2, False, True),
        (0.3, 0.2, True, True),
        (0.15, 0.05, False, False),
        (0.15, 0.05, True, True),
        (0.1, 0.02, False, False),
        (0.1, 0.02, True, False),
    ],
)
def test_the_rule_has_hysteresis(share, low, before, expected):
    """Catches a flag that flickers between the two limits; the upper limit of the held-out share is 0.1."""
    held_out = Returned(1.0, 0.03, 0.0, 0.1)
    assert _record.memorizes(Returned(1.0, share, low, 0.5), held_out, before=before) == expected


def test_a_source_is_returned_if_its_own_target_is_nearest_of_all():
    """Catches rivals that are left out or taken twice, and targets that belong to other rows."""
    pairs = Pair(PAIRS.x0, PAIRS.x0 + 4)
    monitor = VarianceMonitor(constant, pairs, linear(), key=KEY, draws=4, bins=1, sources=100, solver_steps=1)
    record = monitor.measure(0, jnp.full(3, 4.0))
    assert (record.train.share, record.held_out, record.memorizing) == (1.0, None, None)
    assert record.train.l2 < 1e-6
    moved = jnp.asarray([4.5, 3.0, 4.2])
    ends = pairs.x0 + np.asarray(moved)
    distances = np.linalg.norm(ends[:, None] - pairs.x1, axis=2)
    record = monitor.measure(1, moved)
    assert record.train.share == np.mean(distances.argmin(1) == np.arange(40))
    assert 0 < record.train.share < 1
    np.testing.assert_allclose(record.train.l2, np.diag(distances).mean(), rtol=1e-6)


class Rows:
    """A file of rows: shape, dtype and slices, nothing else; remembers what was read."""

    def __init__(self, array):
        self._array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, 0

    def __getitem__(self, place):
        assert isinstance(place, slice)
        part = self._array[place]
        self.read += len(part)
        return part


def test_of_pairs_on_disk_only_the_rows_needed_are_read(tmp_path):
    """Catches a monitor that loads all pairs, or takes other rows from a file than from memory."""
    pairs = some_pairs(5000)
    for name, array in zip(("x0", "x1"), pairs, strict=True):
        np.save(tmp_path / name, array)
    mapped = Pair(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x0", "x1")))
    sliced = Pair(*map(Rows, pairs))
    options = {"targets": 20, "sources": 10}
    found = [
        tiny(pairs=p, **options).measure(0, PARAMS) for p in (pairs, mapped, sliced, jax.tree.map(jnp.asarray, pairs))
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert max(sliced.x0.read, sliced.x1.read) <= 8 + 10 + 20
    double = some_pairs(5000, dtype=np.float64)
    np.testing.assert_allclose(
        tiny(pairs=double, **options).measure(0, PARAMS).gradient_variance, found[0].gradient_variance, rtol=1e-5
    )


def test_the_same_params_give_the_same_numbers_and_nothing_is_traced_again():
    """Catches a look that depends on the step or on earlier looks, and one that compiles every time."""
    traced = 0

    def counted(params, t, x):
        nonlocal traced
        traced += 1
        return field(params, t, x)

    def monitor():
        options = {"draws": 8, "bins": 2, "sources": 10, "solver_steps": 2, "every": 5}
        return VarianceMonitor(counted, PAIRS, constant_noise(0.1), key=KEY, held_out=OTHERS, **options)

    one = monitor()
    first = one(0, PARAMS)
    before = traced
    assert [one(step, PARAMS) for step in (1, 2, 3, 4)] == [None] * 4
    assert one(5, jax.tree.map(lambda x: x + 1, PARAMS)) != first._replace(step=5)
    assert one(np.int64(10), PARAMS, average=PARAMS) == first._replace(step=10)
    assert monitor().measure(10, PARAMS) == one.record
    assert traced == before > 0
    assert one.row(10) == first.row()
    assert one.row(11) == {}


def test_gradients_that_are_not_verified_give_nan(wrong_gradients):
    """Catches a variance that the first look found to be wrong, a training that ends, and a warning each look."""

    def own_field(params, t, x):
        return field(params, t, x)

    options = {"draws": 8, "bins": 2, "sources": 0}
    monitor = VarianceMonitor(own_field, PAIRS, constant_noise(0.1), key=KEY, **options)
    with pytest.warns(DisagreementWarning, match=r"the gradients of .* The variance is nan") as caught:
        record = monitor.measure(1, PARAMS)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.all(np.isnan([record.gradient_variance, *record.gradient_variance_bins, record.gradient_noise_scale]))
    assert np.isnan(monitor.measure(2, PARAMS).gradient_variance)


def test_params_on_several_devices():
    """Catches a look that runs over devices, where gradients of convolutions are zeros, and one at a part of params."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")
    params = PARAMS | {"b": jnp.zeros(3)}

    def placed(spec):
        return jax.device_put(jnp.ones(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spec)))

    whole = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert tiny().measure(0, whole) == tiny().measure(0, params)
    with pytest.raises(ValueError, match="params must be whole on every device, got NamedSharding"):
        tiny().measure(0, params | {"c": placed("data")})


def test_only_the_first_process_looks_and_writes(tmp_path, monkeypatch):
    """Catches rows and warnings that come once from every process."""
    monitor = tiny(tmp_path / "log", every=1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert monitor(0, PARAMS) is None
    assert monitor.row(0) == {}
    assert not (tmp_path / "log").exists()


def rows_of(folder):
    """metrics.csv as text."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def returning(share_train, share_held_out):
    """What a flow would do that returns these shares: distances and who is returned, ten sources of each."""
    returned = np.concatenate([np.arange(10) < 10 * share_train, np.arange(10) < 10 * share_held_out])
    return np.ones(20), returned


def test_a_resumed_monitor_goes_on_from_its_log(tmp_path, monkeypatch):
    """Catches a state that is lost: a second warning, a flag that falls between the limits, rows of steps to come."""
    shares = {0: 0.0, 5: 1.0, 10: 0.7, 15: 0.7, 20: 0.0, 25: 0.7, 30: 1.0}
    now = 0
    monkeypatch.setattr(_measures, "flow_of", lambda *_, **__: returning(shares[now], 0.0))

    def run(folder, first, last):
        nonlocal now
        monitor, warned = tiny(folder, every=5), []
        for now in range(first, last + 1):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                monitor(now, PARAMS, loss=jnp.float32(now) / 2)
            warned += [(now, entry.category) for entry in caught]
        return warned

    assert run(tmp_path / "whole", 0, 30) == [(5, MemorizationWarning)]
    assert run(tmp_path / "parts", 0, 13) == [(5, MemorizationWarning)]
    assert run(tmp_path / "parts", 8, 30) == []  # as after a checkpoint of step 7: the row of step 10 comes again
    whole, parts = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    found = rows_of(tmp_path / "whole")
    assert [float(row["memorizing"]) for row in found] == [0, 1, 1, 1, 0, 0, 1]
    assert [float(row["loss"]) for row in found] == [0, 2.5, 5, 7.5, 10, 12.5, 15]
    assert {"gradient_variance", "gradient_noise_scale", "gradient_variance_bin_1", "train_l2"} < set(found[0])
    with training.MetricsLog(tmp_path / "parts", step=17) as log:
        now = 20
        shares[20] = 0.7
        assert tiny(log, every=5)(20, PARAMS).memorizing  # it is known from the row of step 15
        assert [row["step"] for row in log.rows] == [0, 5, 10, 15, 20]
        monitor = tiny(every=5)
        monitor.resume(log.rows)
        assert monitor(20, PARAMS).memorizing
        assert not tiny(every=5)(20, PARAMS).memorizing


@functools.cache
def digits():
    """Optimal pairs of digits, training and held out, and both shuffled."""
    train, held_out = (ot_benchmark.convex_pairs(split=split).sample(KEY, 64) for split in ("train", "test"))
    optimal = [Pair(*(x.reshape(64, -1) for x in pairs)) for pairs in (train, held_out)]
    return optimal, [couplings.shuffled(jax.random.key(1), *pairs) for pairs in optimal]


MODEL = nets.mlp(64, width=128, depth=2)
OPTIMIZER = optax.adam(2e-3)
STEPS, EVERY = 600, 50


@jax.jit
def updates(params, opt_state, key, pairs, interpolant):
    """Ten steps of a plain loop."""

    def update(carry, key):
        params, opt_state = carry
        batch = training.minibatch(pairs, key, 32)
        paths = fvjax.draw_paths(key, batch, interpolant)
        loss = fvjax.squared_error(MODEL.apply, reduction="mean")
        gradient = jax.grad(lambda p: fvjax.batch_loss(loss, p, paths))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            changes, opt_state = OPTIMIZER.update(gradient, opt_state)
        return (optax.apply_updates(params, changes), opt_state), None

    return jax.lax.scan(update, (params, opt_state), jax.random.split(key, 10))[0]


def watched(pairs, held_out, sigma):
    """The records of a training, the first before its first step, and the warnings."""
    interpolant = constant_noise(jnp.float32(sigma))
    monitor = VarianceMonitor(
        MODEL.apply, pairs, interpolant, key=jax.random.key(2), held_out=held_out, every=EVERY, draws=64
    )
    params = MODEL.init(jax.random.key(3))
    opt_state, records = OPTIMIZER.init(params), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(0, STEPS + 1, 10):
            if step:
                params, opt_state = updates(params, opt_state, jax.random.fold_in(KEY, step), pairs, interpolant)
            record = monitor(step, params)
            records += [] if record is None else [record]
    return records, [entry for entry in caught if entry.category is MemorizationWarning]


def test_the_warning_comes_early_where_shuffled_digits_are_memorized():
    """Catches a warning that comes too late: it must come in the first half, while most pairs are not yet returned."""
    _, shuffled = digits()
    records, caught = watched(*shuffled, 0.0)
    first = next(record for record in records if record.memorizing)
    last = records[-1]
    assert len(caught) == 1
    assert f"memorization began by step {first.step}: " in str(caught[0].message)
    assert 0 < first.step <= STEPS / 2
    assert first.train.share < 0.5 < last.train.share
    assert first.train.l2 > 1.2 * last.train.l2
    assert all(record.memorizing == (record.step >= first.step) for record in records)
    assert last.held_out.l2 > records[1].held_out.l2  # nothing was learned for other sources
    assert len(records) == STEPS // EVERY + 1


@pytest.mark.parametrize("case", ["optimal pairs", "noise"])
def test_there_is_no_warning_where_nothing_is_memorized(case):
    """Catches a false alarm: at the start, for a rule that carries over, and for noise that breaks the pairs."""
    optimal, shuffled = digits()
    records, caught = watched(
        *(optimal if case == "optimal pairs" else shuffled), 0.0 if case == "optimal pairs" else 1.0
    )
    assert caught == []
    assert not any(record.memorizing for record in records)
    share = records[-1].train.share
    assert share > 0.9 if case == "optimal pairs" else share < 0.1
    assert records[-1].train.l2 < records[0].train.l2 / 2


@pytest.mark.parametrize("streamed", [False, True])
def test_fit_looks_at_its_steps_and_trains_the_same_bits(tmp_path, streamed):
    """Catches a monitor that costs the training a random number, a buffer or another order of sums."""
    optimizer = training.adam(40)
    step = training.make_train_step(field, constant_noise(0.1), optimizer)
    state = training.init_state(KEY, fvjax.Model(lambda _: PARAMS, field), optimizer)
    data = (lambda _: PAIRS) if streamed else jax.tree.map(jnp.asarray, PAIRS)
    rows = []

    def run(monitor, log_every):
        def on_log(state, loss):
            found = {} if monitor is None else monitor.row(int(state.step))
            rows.append((int(state.step), loss, set(found)))

        rows.clear()
        options = {"steps": 10, "log_every": log_every, "on_log": on_log}
        return training.fit(state, step, data, monitor=monitor, **options), list(rows)

    (plain, losses), means = run(None, 4)
    monitor = tiny(tmp_path, every=2)
    (seen, again), found = run(monitor, 4)
    assert losses.tobytes() == again.tobytes()
    assert [x.tobytes() for x in map(np.asarray, jax.tree.leaves(plain[:4]))] == [
        x.tobytes() for x in map(np.asarray, jax.tree.leaves(seen[:4]))
    ]
    assert [row[:2] for row in found] == [row[:2] for row in means]
    assert all(names == set(monitor.record.row()) for *_, names in found)
    logged = rows_of(tmp_path)
    assert [int(row["step"]) for row in logged] == [2, 4, 6, 8, 10]
    np.testing.assert_allclose([float(row["loss"]) for row in logged], losses.reshape(5, 2).mean(1), rtol=1e-6)
    assert monitor.record == tiny().measure(10, plain.params, average=plain.ema_params)
    with pytest.raises(ValueError, match="monitor.every must be a multiple or a divisor of log_every = 4, got 6"):
        run(tiny(every=6), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"draws": 9}, "draws must be a multiple of bins = 2, and at least 2 a bin, got 9"),
        ({"draws": 2}, "draws must be a multiple of bins = 2, and at least 2 a bin, got 2"),
        ({"sources": -1}, "sources must be an integer >= 1, got -1"),
        ({"solver": "rk4"}, "solver must be one of euler, heun"),
        ({"reduction": "max"}, "reduction must be one of sum, mean, got 'max'"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"pairs": PAIRS.x0}, "pairs must be a Pair of arrays, got ndarray"),
        ({"pairs": Pair(PAIRS.x0, PAIRS.x1[:3])}, r"pairs must be arrays of one shape, got \(40, 3\) and \(3, 3\)"),
        ({"pairs": Pair(*(np.arange(6).reshape(2, 3),) * 2)}, "pairs.x0 must be floating point, got int64"),
        (
            {"pairs": Pair(*(np.zeros(3, np.float32),) * 2)},
            r"pairs must hold at least one pair \[n, .dims\], got shape",
        ),
        ({"pairs": Pair(PAIRS.x0, np.full((40, 3), np.nan, np.float32))}, "targets must be finite, got"),
        (
            {"held_out": Pair(*(np.zeros((4, 2), np.float32),) * 2)},
            r"held_out must hold examples of .* \(3,\), got \(2,\)",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(options, message):
    """Catches a check that was dropped or does not name the argument."""
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_a_field_that_cannot_be_compiled_once_is_refused():
    """Catches an error from the depths of JAX."""
    with pytest.raises(ValueError, match="field must be a hashable function .params, t, x., got list"):
        VarianceMonitor([], PAIRS, linear(), key=KEY)
