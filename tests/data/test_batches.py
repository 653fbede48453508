"""Batches as a function of (seed, step): every epoch complete, every cut the same, every pixel back."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from fvjax.data import _batches, batch, batch_indices, to_uint8

SEEDS = st.integers(0, 2**40)
FEW = st.integers(1, 12)


def pictures(n=11, height=2, width=3, channels=1):
    """Images without two equal pixels, so that none equals its mirror image."""
    return np.arange(n * height * width * channels, dtype=np.uint8).reshape(n, height, width, channels)


@hypothesis.given(SEEDS, FEW, st.integers(1, 30))
def test_every_epoch_visits_every_example_once(seed, size, n):
    """Catches sampling with replacement, a dropped last part, and an epoch that restarts where a batch straddles it."""
    epochs = 3
    steps = -(-epochs * n // size)
    visited = np.concatenate([batch_indices(seed, step, size, n) for step in range(steps)])[: epochs * n]
    for order in visited.reshape(epochs, n):
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    """Catches one permutation for all epochs, and a seed that is ignored."""
    orders = {tuple(batch_indices(seed, epoch, 40, 40)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@hypothesis.given(SEEDS, st.integers(0, 10**9), st.integers(1, 60), FEW)
def test_indices_depend_on_seed_and_step_alone(seed, step, size, n):
    """Catches state that earlier calls leave behind (a resumed run has made none); `size` may exceed `n`."""
    expected = batch_indices(seed, step, size, n)
    batch_indices(seed + 1, 0, size, n)
    np.testing.assert_array_equal(batch_indices(seed, step, size, n), expected)
    _batches._permutation.cache_clear()
    np.testing.assert_array_equal(batch_indices(seed, step, size, n), expected)
    assert expected.shape == (size,)
    assert expected.dtype == np.int64


@hypothesis.given(SEEDS, FEW)
def test_batch_sizes_walk_through_the_same_order(seed, size):
    """Catches an order that depends on the batch size: then the number of processes would change the run."""
    whole = batch_indices(seed, 0, 12 * size, 17)
    parts = [batch_indices(seed, step, size, 17) for step in range(12)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("flip", [False, True])
def test_batch_sizes_walk_through_the_same_examples(flip):
    """Catches flips that are drawn by (step, row) instead of the position: other batch sizes would see other images."""
    whole = batch(pictures(), seed=2, step=0, size=24, flip=flip)
    parts = [batch(pictures(), seed=2, step=step, size=4, flip=flip) for step in range(6)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_orders_and_flips_are_the_published_ones():
    """Catches a change of the random streams, which would break the resuming of every older run."""
    assert batch_indices(0, 0, 10, 10).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert np.flatnonzero(_batches._flips(0, 0, 20)).tolist() == [0, 4, 5, 14, 15, 16, 18]


def test_a_step_does_not_permute_the_epoch_anew():
    """Catches a sort of the whole data set at every step."""
    _batches._permutation.cache_clear()
    for step in range(10):
        batch_indices(3, step, 5, 100)
    assert _batches._permutation.cache_info().misses == 1


def test_the_cached_order_cannot_be_changed():
    """Catches a caller that shuffles its indices and with them all later batches."""
    first = batch_indices(5, 0, 6, 6)
    first[:] = 0
    assert sorted(batch_indices(5, 0, 6, 6)) == list(range(6))


@hypothesis.given(SEEDS, st.integers(0, 100), FEW, st.booleans(), st.data())
def test_a_batch_is_its_rows_one_after_another(seed, step, size, flip, data):
    """Catches a process that feeds other examples, or mirrors them otherwise, than a single process would."""
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    whole = batch(pictures(), seed=seed, step=step, size=size, flip=flip)
    rows = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    parts = [batch(pictures(), seed=seed, step=step, size=size, flip=flip, rows=part) for part in rows]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float32


@hypothesis.given(SEEDS, st.integers(0, 10**6), FEW, FEW)
def test_flips_depend_on_the_position_alone(seed, position, size, count):
    """Catches flips that change with the batch size, and a start inside a block of four random words."""
    together = _batches._flips(seed, position, size + count)
    np.testing.assert_array_equal(_batches._flips(seed, position + size, count), together[size:])


def test_flips_mirror_half_of_the_examples_left_to_right():
    """Catches upside-down images, a coin that is not fair, and an example that is mirrored in all epochs or in none."""
    images = pictures(n=40)
    plain, mirrored = (batch(images, seed=1, step=0, size=4000, flip=flip) for flip in (False, True))
    is_mirrored = np.all(mirrored == plain[:, :, ::-1], axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored[~is_mirrored], plain[~is_mirrored])
    assert abs(is_mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    indices = batch_indices(1, 0, 4000, 40)
    per_example = np.array([is_mirrored[indices == k].mean() for k in range(40)])
    assert np.all(abs(per_example - 0.5) < 5 * 0.5 / np.sqrt(100))


def test_a_batch_leaves_the_images_alone():
    """Catches an in-place flip or scaling of the data set, also of a read-only memory map."""
    images = pictures()
    images.flags.writeable = False
    batch(images, seed=0, step=0, size=50, flip=True)
    np.testing.assert_array_equal(images, pictures())


def test_every_level_comes_back():
    """Catches truncation instead of rounding, division by 128, and an asymmetric range."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = batch(levels, seed=0, step=0, size=1)
    assert scaled.min() == -1
    assert scaled.max() == 1
    np.testing.assert_array_equal(to_uint8(scaled), levels)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(scaled)), levels)
    np.testing.assert_array_equal(to_uint8(scaled + 0.49 / 127.5), levels)


def test_values_outside_of_the_range_are_clipped():
    """Catches the wrap-around of uint8, which makes white of what is darker than black."""
    x = np.array([-np.inf, -7.0, -1.001, 1.001, 7.0, np.inf])
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 0, 255, 255, 255])
    assert to_uint8(jnp.zeros((1,), jnp.bfloat16)).tolist() == [128]


def test_to_uint8_refuses_what_is_no_picture():
    """Catches nan, which casts to an arbitrary level, and levels that are mistaken for [-1, 1]."""
    with pytest.raises(ValueError, match="^x must not hold nan, got 1 of 2 entries that are"):
        to_uint8(np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match="^x must be floating point, got uint8"):
        to_uint8(np.zeros(3, np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"seed": True}, "seed must be an integer >= 0, got True"),
        ({"step": 1.0}, r"step must be an integer >= 0, got 1\.0"),
        ({"size": 0}, "size must be an integer >= 1, got 0"),
        ({"rows": 3}, "rows must be a slice of the batch, got 3"),
        ({"images": np.zeros((2, 3, 3, 1), np.float32)}, r"images must be uint8 \[n, h, w, c\], got float32"),
        ({"images": np.zeros((2, 3, 3), np.uint8)}, r"images must be uint8 .*, got uint8 \(2, 3, 3\)"),
        ({"images": np.zeros((0, 3, 3, 1), np.uint8)}, "n must be an integer >= 1, got 0"),
    ],
)
def test_batch_refuses(arguments, message):
    """Catches a batch of nothing, of a negative step, or of floats that would be scaled twice."""
    good = {"images": pictures(), "seed": 0, "step": 0, "size": 2}
    call = good | arguments
    with pytest.raises(ValueError, match=f"^{message}"):
        batch(call.pop("images"), **call)
