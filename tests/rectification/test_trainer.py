"""The trainer of ReFlow rounds: what a small network learns, and which keys, sets and parameters it uses."""

import jax
import numpy as np
import optax
import pytest

from fvjax import nets
from fvjax.interpolants import brownian_bridge, linear
from fvjax.rectification import pair_trainer, reflow, round_measures
from fvjax.types import Pair

MODEL = nets.mlp(2, width=16, depth=1)


def draw(key):
    """New sources."""
    return jax.random.normal(key, (12, 2))


def far_pairs(n=64):
    """Independent pairs of N(0, I) and N((4, 0), I)."""
    x0, x1 = np.asarray(jax.random.normal(jax.random.key(1), (2, n, 2)))
    return Pair(x0, x1 + np.asarray([4.0, 0.0], np.float32))


def trainer(**options):
    """A small trainer."""
    options = {"key": jax.random.key(2), "steps": 300, "batch": 64, "ema_decay": 0.95, "log_every": 300} | options
    interpolant = options.pop("interpolant", linear())
    return pair_trainer(MODEL.apply, interpolant, optax.adam(1e-2), **options)


def test_a_network_learns_its_pairs_round_by_round():
    """Catches a trainer that trains on other pairs, or starts over: round 2 returns the ends that it was trained on."""
    done = list(
        reflow(
            trainer(),
            MODEL.apply,
            MODEL.init(jax.random.key(0)),
            draw,
            key=jax.random.key(5),
            rounds=2,
            first=far_pairs(),
            solver="euler",
            steps=20,
        )
    )
    first, second = (
        round_measures(MODEL.apply, d.params, done[1].pairs, euler_steps=(1, 2), nodes=8, solver="euler", steps=20)
        for d in done
    )
    assert first.pair.mean < 1e-5  # these pairs are its own
    assert second.pair.mean < 0.5
    assert second.straightness < first.straightness
    assert second.euler[0].distance.mean < first.euler[0].distance.mean


def test_the_trainer_is_a_function_of_key_and_round_and_starts_at_the_given_parameters():
    """Catches batches that are the same in every round, global state, and parameters drawn anew."""
    pairs, params = far_pairs(), MODEL.init(jax.random.key(0))
    train = trainer(steps=3)
    one, same, other = (train(index, lambda part: pairs, params) for index in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(jax.tree.leaves(one)[0], jax.tree.leaves(other)[0])
    frozen = pair_trainer(MODEL.apply, linear(), optax.sgd(0.0), key=jax.random.key(0), steps=2)
    jax.tree.map(np.testing.assert_array_equal, frozen(2, lambda part: pairs, params), params)


def test_the_trainer_goes_through_the_sets_with_one_optimiser():
    """Catches sets that are skipped, unequal shares, and a schedule that begins anew with every set."""
    asked, logged = [], []

    def pairs_of(part):
        asked.append(part)
        return far_pairs()

    train = trainer(steps=10, regenerations=3, log_every=1, on_log=lambda i, s, loss: logged.append((i, int(s.step))))
    train(2, pairs_of, MODEL.init(jax.random.key(0)))
    assert asked == [0, 1, 2]
    assert logged == [(2, step) for step in range(1, 11)]
    asked.clear()
    train(1, pairs_of, MODEL.init(jax.random.key(0)))
    assert asked == [0]


def test_the_noise_of_the_interpolant_is_used():
    """Catches an interpolant that is ignored: all pairs are one, so only noise leaves a loss."""
    pairs, losses = Pair(np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)), []
    for interpolant in (linear(), brownian_bridge(1.0)):
        train = trainer(interpolant=interpolant, steps=50, log_every=50, on_log=lambda i, s, loss: losses.append(loss))
        train(1, lambda part: pairs, MODEL.init(jax.random.key(0)))
    assert losses[0] < 0.2
    assert losses[1] > 5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"regenerations": 0}, "regenerations must be an integer >= 1, got 0"),
        ({"steps": 2, "regenerations": 3}, "regenerations must be at most steps = 2, got 3"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_the_trainer_refuses(options, message):
    """Catches a set without steps, and options of the step that are swallowed."""
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(**options)
