"""k-ReFlow against its closed form for Gaussians, and its bookkeeping: keys, parts, real pairs, resumed rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax import gaussian
from fvjax.interpolants import linear
from fvjax.rectification import generate_pairs, reflow, round_measures
from fvjax.types import Pair

MEAN, COV = np.array([3.0, -1.0]), np.array([[2.0, 0.6], [0.6, 0.5]])


def gaussian_field(params, t, x):
    """The exact minimiser for the Gaussian coupling that is its parameters: what training on such pairs reaches."""
    return gaussian.population_minimiser(params, linear())(None, t, x)


def fit_gaussian(index, pairs_of, params):
    """Exact training: the coupling with the moments of the pairs."""
    pairs = pairs_of(0)
    d = pairs.x0.shape[1]
    joint = jnp.cov(jnp.concatenate([pairs.x0, pairs.x1], axis=1), rowvar=False)
    return gaussian.gaussian_coupling(
        pairs.x1.mean(axis=0), joint[d:, d:], joint[d:, :d], source_mean=pairs.x0.mean(axis=0), source_cov=joint[:d, :d]
    )


def white(key, n=400):
    """A sample whose mean is 0 and whose covariance is I, exactly, so that nothing is lost between two samples."""
    x = np.asarray(jax.random.normal(key, (n, 2)))
    x = x - x.mean(axis=0)
    return np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T).T


def independent_pairs(n=400):
    """Pairs of N(0, I) and N(MEAN, COV) with exact moments and no correlation at all."""
    both = np.asarray(jax.random.normal(jax.random.key(7), (n, 4)))
    both = both - both.mean(axis=0)
    both = np.linalg.solve(np.linalg.cholesky(np.cov(both, rowvar=False)), both.T).T
    return Pair(both[:, :2], MEAN + both[:, 2:] @ np.linalg.cholesky(COV).T)


def test_gaussian_pairs_are_straight_after_one_rectification(x64):
    """Catches a wrong pairing, sources that do not match their ends, or a round that trains on the wrong pairs.

    The flow of independent Gaussian pairs is the monotone map M^(1/2): curved in round 1, straight in round 2 (S = 0,
    one Euler step exact), and by Lemma 2 round 3 returns the same map.
    """
    found = []
    start = gaussian.independent_coupling(MEAN, COV)
    options = {"solver": "heun", "steps": 300}  # of second order: 1e-5 from the exact map
    for done in reflow(
        fit_gaussian,
        gaussian_field,
        start,
        white,
        key=jax.random.key(0),
        rounds=3,
        first=independent_pairs(),
        **options,
    ):
        measured = round_measures(gaussian_field, done.params, done.pairs, euler_steps=(1, 8), nodes=16, **options)
        found.append((done, measured))
    first, second, third = (measured for _, measured in found)
    assert first.straightness > 0.1
    assert first.euler[0].distance.mean > 0.1
    assert first.euler[1].distance.mean < first.euler[0].distance.mean / 4
    for measured in (second, third):
        assert measured.straightness < 1e-12
        assert measured.euler[0].distance.mean < 1e-6
        assert measured.pair.mean < 1e-6
    exact = gaussian.ot_map(MEAN, COV)
    for done, _ in found[1:]:
        np.testing.assert_allclose(done.pairs.x1, done.pairs.x0 @ exact.matrix.T + exact.shift, atol=2e-5)
    assert [done.index for done, _ in found] == [1, 2, 3]


def recorder(log):
    """A training function that only notes what it is given; the parameter counts the rounds."""

    def train(index, pairs_of, params):
        log.append((index, np.asarray(pairs_of(0).x0), np.asarray(pairs_of(0).x1), params))
        return params + 1

    return train


def drift(params, t, x):
    """x1 = x0 + params."""
    return jnp.broadcast_to(params, x.shape)


def draw(key):
    """New sources."""
    return jax.random.normal(key, (12, 2))


def run(log, **options):
    """Rounds of the recorder on the drift, Euler in one step, which is exact."""
    options = {"key": jax.random.key(3), "rounds": 4, "first": Pair(np.zeros((9, 2)), np.ones((9, 2)))} | options
    params, sources = options.pop("params", jnp.float32(1)), options.pop("sources", draw)
    return list(reflow(recorder(log), drift, params, sources, solver="euler", steps=1, **options))


def test_each_round_trains_on_the_pairs_of_the_round_before():
    """Catches pairs of the new parameters, parameters that start over, and a first round on generated pairs."""
    log = []
    finished = run(log)
    assert [entry[0] for entry in log] == [1, 2, 3, 4]
    assert [float(entry[3]) for entry in log] == [1, 2, 3, 4]
    assert log[0][1].shape == (9, 2)
    for (index, x0, x1, _), done in zip(log, finished, strict=True):
        np.testing.assert_allclose(x1 - x0, index if index > 1 else 1, rtol=1e-6)
        np.testing.assert_array_equal(done.pairs.x1, x1)
        assert float(done.params) == index + 1
    assert not np.array_equal(log[1][1], log[2][1])  # new sources in every round


@pytest.mark.parametrize("first_round", [2, 3, 4])
def test_a_run_can_begin_at_any_round(first_round):
    """Catches pairs that depend on the rounds made in this process instead of on (key, round)."""
    whole, rest = [], []
    finished = run(whole)
    resumed = run(rest, first_round=first_round, params=finished[first_round - 2].params, first=None)
    assert [done.index for done in resumed] == list(range(first_round, 5))
    for old, new in zip(whole[first_round - 1 :], rest, strict=True):
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)


def test_keys_decide_the_sources_and_an_array_keeps_them():
    """Catches a key that is ignored, and training sources that are redrawn."""
    logs = {}
    for name, options in {
        "one": {},
        "same": {},
        "other": {"key": jax.random.key(4)},
        "fixed": {"sources": np.ones((5, 2), np.float32)},
    }.items():
        logs[name] = []
        run(logs[name], rounds=3, **options)
    np.testing.assert_array_equal(logs["one"][1][1], logs["same"][1][1])
    assert not np.array_equal(logs["one"][1][1], logs["other"][1][1])
    for entry in logs["fixed"][1:]:
        np.testing.assert_array_equal(entry[1], np.ones((5, 2)))


def test_regenerated_parts_differ_and_part_0_is_kept():
    """Catches parts with the same sources, a part made of other parameters, and a fixed set that is made twice."""
    seen = {}

    def train(index, pairs_of, params):
        seen[index] = [pairs_of(part) for part in (0, 1, 2, 0)]
        return params + 1

    finished = list(
        reflow(
            train,
            drift,
            jnp.float32(1),
            draw,
            key=jax.random.key(0),
            rounds=2,
            first=Pair(np.zeros((3, 2)), np.ones((3, 2))),
            solver="euler",
            steps=1,
        )
    )
    parts = seen[2]
    assert parts[0] is parts[3] is finished[1].pairs
    assert not np.array_equal(parts[0].x0, parts[1].x0)
    assert not np.array_equal(parts[1].x0, parts[2].x0)
    for part in parts:
        np.testing.assert_allclose(part.x1 - part.x0, 2, rtol=1e-6)
    assert all(part.x0.shape == (3, 2) for part in seen[1])


def test_real_pairs_are_mixed_into_every_generated_set():
    """Catches a share that is ignored, or mixed into round 1: the first pairs have x0 = 0, the given ones 50."""
    log = []
    run(log, real_share=0.25)
    assert [int((entry[1][:, 0] == 0).sum()) for entry in log] == [9, 3, 3, 3]
    log = []
    run(log, real_share=0.5, real=Pair(np.full((6, 2), 50.0), np.full((6, 2), 51.0)), rounds=2)
    assert [int((entry[1][:, 0] == 50).sum()) for entry in log] == [0, 6]


def test_rounds_are_made_one_at_a_time():
    """Catches all rounds run before the first one is handed over: a caller saves between them."""
    log = []
    rounds = reflow(
        recorder(log),
        drift,
        jnp.float32(1),
        draw,
        key=jax.random.key(0),
        rounds=3,
        first=Pair(np.zeros((2, 2)), np.ones((2, 2))),
        solver="euler",
        steps=1,
    )
    assert not log
    next(rounds)
    assert len(log) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"first_round": 0}, "first_round must be an integer >= 1, got 0"),
        ({"first_round": 5}, "first_round must be at most rounds = 4, got 5"),
        ({"first": None}, "first must be given where round 1 is run, got None"),
        ({"real_share": 1.5}, r"real_share must be in \[0, 1\], got 1.5"),
        ({"first": None, "first_round": 2, "real_share": 0.5}, "real or first must be given where real_share > 0"),
        ({"chunk": 0}, "chunk must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(options, message):
    """Catches an error after hours of the first round; a generator would only begin at the first `next`."""
    arguments = {"key": jax.random.key(0), "rounds": 4, "first": Pair(np.zeros((2, 2)), np.ones((2, 2)))} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        reflow(recorder([]), drift, jnp.float32(0), draw, **arguments)


def test_parts_of_given_sources_and_wrong_parts_are_refused():
    """Catches a 'regenerated' set that is the old one, and a part that is no number."""
    for sources, part, message in (
        (np.ones((2, 2), np.float32), 1, "sources must be a function of a key where pairs are regenerated"),
        (draw, -1, "part must be an integer >= 0, got -1"),
        (draw, True, "part must be an integer >= 0, got True"),
    ):

        def train(index, pairs_of, params, part=part):
            pairs_of(part)

        rounds = reflow(
            train,
            drift,
            jnp.float32(1),
            sources,
            key=jax.random.key(0),
            rounds=2,
            first_round=2,
            solver="euler",
            steps=1,
        )
        with pytest.raises(ValueError, match=message):
            next(rounds)


def test_generated_pairs_of_a_round_are_those_of_generate_pairs():
    """Catches options of the solver that do not reach the pairs: two Euler steps of a curved field."""

    def field(params, t, x):
        return params * x

    seen = []

    def train(index, pairs_of, params):
        seen.append(pairs_of(0))
        return params

    rounds = reflow(
        train,
        field,
        jnp.float32(1),
        draw,
        key=jax.random.key(0),
        rounds=2,
        first_round=2,
        chunk=5,
        solver="euler",
        steps=2,
    )
    list(rounds)
    np.testing.assert_allclose(seen[0].x1, 2.25 * seen[0].x0, rtol=1e-6)
    again = generate_pairs(field, jnp.float32(1), seen[0].x0, solver="euler", steps=2)
    np.testing.assert_allclose(again.x1, seen[0].x1, rtol=1e-6)
