"""Pairs from images: the documented map, its exact inverse, optimality, and splits that share one map."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fvjax.data import DataError, Images, load
from fvjax.data.ot_benchmark import convex_pairs, verify_optimal
from fvjax.types import Pair


def noise(n, height=4, width=5, channels=3, seed=0):
    """Images uint8 [n, height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def distance(x, y):
    """Mean L2 distance of two batches."""
    return np.linalg.norm(np.reshape(x, (len(x), -1)) - np.reshape(y, (len(y), -1)), axis=1).mean()


def blur_by_expm(height, width, time):
    """exp(-time L) on the whole grid, L put together edge by edge: [h w, h w]."""
    nodes = np.arange(height * width).reshape(height, width)
    laplacian = np.zeros((nodes.size, nodes.size))
    for ends in ((nodes[1:], nodes[:-1]), (nodes[:, 1:], nodes[:, :-1])):
        for a, b in zip(*(end.ravel() for end in ends), strict=True):
            laplacian[a, a] += 1
            laplacian[b, b] += 1
            laplacian[a, b] -= 1
            laplacian[b, a] -= 1
    return scipy.linalg.expm(-time * laplacian)


@pytest.mark.parametrize(("amount", "sharpness", "blur"), [(1.0, 1.5, 0.5), (0.4, 5.0, 2.0), (1.0, 0.01, 0.0)])
def test_the_source_is_the_documented_map_of_the_image(x64, amount, sharpness, blur):
    """Catches another Laplacian, swapped axes of a grid that is not square, channels that mix, a lost factor."""
    options = {"amount": amount, "sharpness": sharpness, "blur": blur, "shift": 0.25}
    x0, x1 = convex_pairs(noise(6), **options, dtype=jnp.float64).sample(jax.random.key(0), 6)
    matrix = blur_by_expm(4, 5, blur)
    for degraded, image in zip(np.asarray(x0), np.asarray(x1), strict=True):
        x = image.reshape(20, 3)
        full = 0.2 * x + 2 * matrix @ np.tanh(sharpness * matrix @ x) / np.tanh(sharpness)
        expected = (1 - amount) * x + amount * full + 0.25
        np.testing.assert_allclose(degraded.reshape(20, 3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"amount": 0.3}, {"sharpness": 5.0}, {"blur": 3.0}, {"blur": 0.0}])
def test_transport_inverts_the_map(options):
    """Catches an iteration that stops early: 1e-5 of the image, in float32."""
    pairs = convex_pairs(**options)
    x0, x1 = pairs.sample(jax.random.key(0), 50)
    found = jax.jit(jax.vmap(pairs.transport))(x0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharpness", [1.5, 50.0])
def test_transport_inverts_the_map_in_float64(x64, sharpness):
    """Catches a tolerance of float32 in float64, and too few steps where the problem is badly conditioned: 1e-10."""
    pairs = convex_pairs(noise(8), sharpness=sharpness, dtype=jnp.float64)
    x0, x1 = pairs.sample(jax.random.key(0), 8)
    np.testing.assert_allclose(jax.vmap(pairs.transport)(x0), x1, rtol=0, atol=1e-10)


def test_pairs_that_were_made_in_float32_invert_in_float64():
    """Catches blur matrices that are rounded when the pairs are made: the map must be one, whatever the precision."""
    pairs = convex_pairs(noise(4))
    with jax.enable_x64(True):
        exact = convex_pairs(noise(4), dtype=jnp.float64)
        x0, x1 = exact.sample(jax.random.key(0), 4)
        shift = exact.transport.args[0].shift - pairs.transport.args[0].shift
        np.testing.assert_allclose(jax.vmap(pairs.transport)(x0 - shift), x1, rtol=0, atol=1e-10)


def test_the_digits_are_as_far_apart_as_was_measured_before():
    """Catches another blur or shift: distances of 1,000 digits to source, mean and shuffled digits 2.83, 4.32, 6.03."""
    pairs = convex_pairs()
    x0, x1 = pairs.sample(jax.random.key(0), 1000)
    assert (pairs.name, pairs.dims, pairs.size) == ("convex-digits-train", (8, 8, 1), 1618)
    assert distance(x0, x1) == pytest.approx(2.82, abs=0.02)
    assert distance(x1, np.broadcast_to(np.mean(x1, 0), x1.shape)) == pytest.approx(4.30, abs=0.04)
    assert distance(x1, np.roll(x1, 1, axis=0)) == pytest.approx(6.08, abs=0.1)


def test_cost_variance_and_shift_are_those_of_the_whole_set():
    """Catches a cost without its 1/2, a variance with the mean left in, and a shift that leaves the means apart."""
    images = noise(30)
    pairs = convex_pairs(images)
    x0, x1 = (np.float64(x) for x in pairs.sample(jax.random.key(3), 30))
    assert pairs.cost == pytest.approx(0.5 * ((x0 - x1) ** 2).sum((1, 2, 3)).mean(), rel=1e-5)
    assert pairs.target_variance == pytest.approx(x1.var(0).sum(), rel=1e-6)
    np.testing.assert_allclose(x0.mean(0), x1.mean(0), atol=1e-6)
    shifted = convex_pairs(images, shift=0.5)
    x0, x1 = (np.float64(x) for x in shifted.sample(jax.random.key(3), 30))
    assert shifted.cost == pytest.approx(0.5 * ((x0 - x1) ** 2).sum((1, 2, 3)).mean(), rel=1e-5)


def test_the_distance_is_proportional_to_the_amount():
    """Catches a default shift that is not scaled with the amount, and an amount of 0 that still moves images."""
    images = noise(10)
    costs = [convex_pairs(images, amount=amount).cost for amount in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(costs, [0, costs[2] / 4, costs[2]], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"sharpness": 20.0}, {"amount": 0.5, "blur": 2.0}])
def test_the_pairs_are_optimal(options):
    """Catches a map that is no gradient of a convex function; and shuffled pairs must be told from them."""
    pairs = convex_pairs(**options)
    assert verify_optimal(pairs, n=300, cycles=200).optimal
    x0, x1 = pairs.sample(jax.random.key(0), 300)
    assert not verify_optimal(Pair(x0, jnp.roll(x1, 1, axis=0)), cycles=200).optimal


def test_both_splits_have_one_map():
    """Catches a shift from the test images: the held-out pairs would belong to another transport."""
    images = load("digits")
    train, test = (convex_pairs(images, split=split) for split in ("train", "test"))
    assert (test.name, test.size) == ("convex-digits-test", 179)
    x0, x1 = test.sample(jax.random.key(0), 20)
    np.testing.assert_allclose(jax.vmap(train.transport)(x0), x1, atol=1e-5)
    expected = np.sort(images.test.reshape(179, -1) / 127.5 - 1, axis=0)
    _, every = test.sample(jax.random.key(0), 179)
    np.testing.assert_allclose(np.sort(np.reshape(every, (179, -1)), axis=0), expected, atol=1e-6)


def test_samples_are_without_replacement_and_depend_on_the_key_alone():
    """Catches an image that comes twice, a sample that another n changes, and more pairs than there are images."""
    pairs = convex_pairs(noise(12))
    x1 = np.asarray(pairs.sample(jax.random.key(0), 12).x1).reshape(12, -1)
    assert len(np.unique(x1, axis=0)) == 12
    np.testing.assert_array_equal(np.asarray(pairs.sample(jax.random.key(0), 5).x1).reshape(5, -1), x1[:5])
    assert not np.array_equal(np.asarray(pairs.sample(jax.random.key(1), 12).x1).reshape(12, -1), x1)
    with pytest.raises(ValueError, match="n must be at most 12, the number of pairs in the set, got 13"):
        pairs.sample(jax.random.key(0), 13)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        pairs.sample(jax.random.key(0), 0)


def test_the_derivatives_of_transport_are_those_of_the_inverse_function(x64):
    """Catches a derivative through the iteration, or none: against the inverse of the map's own, and differences."""
    pairs = convex_pairs(noise(3, 3, 3, 1), dtype=jnp.float64)
    x0 = pairs.sample(jax.random.key(0), 1).x0[0]
    forward, reverse = (jax.jit(mode(pairs.transport))(x0).reshape(9, 9) for mode in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, atol=1e-10)
    np.testing.assert_allclose(forward, forward.T, atol=1e-10)  # the Hessian of phi*
    assert np.all(np.linalg.eigvalsh(forward) > 0)
    assert np.linalg.eigvalsh(forward)[-1] <= 1 / 0.2 + 1e-10  # Lipschitz
    steps = 1e-5 * jnp.eye(9).reshape(9, 3, 3, 1)
    move = jax.jit(jax.vmap(pairs.transport))
    differences = ((move(x0 + steps) - move(x0 - steps)) / 2e-5).reshape(9, 9)
    np.testing.assert_allclose(forward, differences, atol=1e-7)
    gradients = jax.jit(jax.vmap(jax.grad(lambda x: (pairs.transport(x) ** 2).sum())))(jnp.stack([x0, x0]))
    np.testing.assert_allclose(gradients[1].reshape(9), 2 * forward @ pairs.transport(x0).reshape(9), atol=1e-9)


def test_the_map_of_an_array_can_be_differentiated_in_its_own_parameters(x64):
    """Catches a rule that forgets the parameters: the derivative in the shift is minus that in the source."""
    pairs = convex_pairs(noise(3, 3, 3, 1), dtype=jnp.float64)
    x0 = pairs.sample(jax.random.key(0), 1).x0[0]
    of_map, of_source = jax.jit(jax.grad(lambda move, x: move(x).sum(), argnums=(0, 1)))(pairs.transport, x0)
    np.testing.assert_allclose(of_map.args[0].shift, -of_source, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_images_of_any_size_and_colour(dtype):
    """Catches a scaling of what is scaled already, and what only holds for square grey images: 64x64x3 here."""
    smooth = np.cos(np.arange(64 * 64 * 3 * 3) / 50).reshape(3, 64, 64, 3).astype(dtype)
    pairs = convex_pairs(smooth)
    x0, x1 = pairs.sample(jax.random.key(0), 3)
    np.testing.assert_allclose(np.sort(x1, axis=0), np.sort(smooth, axis=0), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(pairs.transport)(x0), x1, atol=1e-5)
    assert convex_pairs(smooth[..., 0]).dims == (64, 64, 1)


def test_memory_maps_are_read_when_needed(tmp_path):
    """Catches a copy of the whole set into memory."""
    np.save(tmp_path / "images.npy", noise(9))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    pairs = convex_pairs(Images("mine", images[:6], images[6:], False, "here"))
    assert isinstance(pairs.sample.args[0], np.memmap)
    assert pairs.sample(jax.random.key(0), 6).x1.shape == (6, 4, 5, 3)


def test_moments_of_large_sets_come_from_a_part(monkeypatch):
    """Catches minutes of start for a set like CelebA, and an estimate that is not called one."""
    from fvjax.data.ot_benchmark import _convex

    monkeypatch.setattr(_convex, "_MOMENTS", 8)
    images = noise(40)
    pairs = convex_pairs(images)
    assert pairs.source.endswith("cost and target variance from 8 of them")
    part = images[np.linspace(0, 39, 8).astype(int)] / 127.5 - 1
    assert pairs.target_variance == pytest.approx(part.var(0).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.1}, "amount must be in [0, 1], got 1.1"),
        ({"amount": float("nan")}, "amount must be in [0, 1], got nan"),
        ({"sharpness": 0}, "sharpness must be from 0.001 to 100, got 0"),
        ({"blur": -1.0}, "blur must be >= 0 and finite, got -1.0"),
        ({"split": "train"}, "split must be left out where images is an array, got 'train'"),
        ({"shift": np.zeros((3, 2, 3))}, "shift must broadcast to (4, 5, 3), got shape (3, 2, 3)"),
        ({"shift": np.nan}, "shift must be finite, got nan"),
        ({"dtype": jnp.int32}, "dtype must be float32 (float64 needs JAX's x64 mode), got int32"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    """Catches a map that is not convex, and options that are ignored."""
    with pytest.raises(ValueError, match=re.escape(message)):
        convex_pairs(noise(3), **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(3).astype(np.float32), "images must be in [-1, 1] where they are floating point, got values from 0.0"),
        (np.full((2, 3, 3, 1), np.nan), "images must be in [-1, 1] where they are floating point, got values from nan"),
        (np.zeros((0, 3, 3, 1)), "images must be a non-empty [n, h, w] or [n, h, w, c], got (0, 3, 3, 1)"),
        (np.zeros((3, 3)), "images must be a non-empty [n, h, w] or [n, h, w, c], got (3, 3)"),
        (noise(3).astype(int), "images must be uint8, got int64"),
    ],
)
def test_what_is_no_images_is_refused(images, message):
    """Catches pixels in [0, 255] that are taken for [-1, 1], and nan that spreads into every pair."""
    with pytest.raises(DataError, match=re.escape(message)):
        convex_pairs(images)


def test_transport_refuses_other_shapes():
    """Catches a batch that is taken for an image."""
    with pytest.raises(ValueError, match=r"x0 must have shape \(4, 5, 3\), got \(3, 4, 5, 3\)"):
        convex_pairs(noise(3)).transport(jnp.zeros((3, 4, 5, 3)))


def test_the_split_of_images_must_exist():
    """Catches a typing error that gives the training images."""
    with pytest.raises(ValueError, match="split must be one of train, test, got 'valid'"):
        convex_pairs(load("digits"), split="valid")
