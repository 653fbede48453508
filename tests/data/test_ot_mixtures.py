"""Mix3ToMix10: the benchmark's numbers, dimensions and file forms; a convex map; one line for what cannot be read."""

import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvjax.data import DataError
from fvjax.data.ot_benchmark import mix3tomix10, verify_optimal

FOLDER = "mix3tomix10"


def network(generator, dim):
    """Random weights of one input-convex network, by their names in the .npz."""
    widths = (max(2 * dim, 64), max(2 * dim, 64), max(dim, 32))
    weights = {}
    for index, width in enumerate(widths):
        layer = f"quadratic_layers/{index}"
        weights[f"{layer}/quadratic_decomposed"] = generator.normal(size=(dim, 1, width)) / np.sqrt(dim)
        weights[f"{layer}/weight"] = generator.normal(size=(width, dim)) / np.sqrt(dim)
        weights[f"{layer}/bias"] = generator.normal(size=width)
    for name, shape in (("convex_layers/0", (1, 0)), ("convex_layers/1", (2, 1))):
        rows, columns = (widths[index] for index in shape)
        weights[f"{name}/weight"] = np.abs(generator.normal(size=(rows, columns))) / columns
    weights["final_layer/weight"] = np.abs(generator.normal(size=(1, widths[-1])))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def documented(dim, seed=0):
    """What an .npz of this dimension holds at least: the documented keys, random numbers."""
    generator = np.random.default_rng(seed)
    arrays = {f"{v}/{key}": value for v in ("v1", "v2") for key, value in network(generator, dim).items()}
    maps = generator.normal(size=(3, dim, dim)) / np.sqrt(dim)
    return arrays | {
        "standardize/scale": np.float32(0.1),
        "standardize/shift": generator.normal(size=dim).astype(np.float32),
        "mixture/centers": generator.normal(size=(3, dim)).astype(np.float32),
        "mixture/maps": maps.astype(np.float32),
        "mixture/std": np.float32(0.4),
        "mixture/weights": np.full(3, 1 / 3),
        "mixture/covs": 0.16 * maps @ maps.transpose(0, 2, 1),
        "cost_half_w2sq": np.float64(1.25),
    }


def write(folder, dim, **changes):
    """Writes the .npz of a dimension, with changed arrays (None: left out)."""
    arrays = {name: value for name, value in (documented(dim) | changes).items() if value is not None}
    np.savez(folder / f"mix3tomix10_d{dim}.npz", **arrays)
    return arrays


def write_torch(path, weights):
    """Writes float32 arrays as torch.save writes a state dict, under names with dots."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def integers(values):
        return b"".join(b"J" + int(value).to_bytes(4, "little") for value in values)

    program = b"\x80\x02ccollections\nOrderedDict\n)R("
    with zipfile.ZipFile(path, "w") as archive:
        for index, (name, value) in enumerate(weights.items()):
            storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu")
            storage += integers([value.size]) + b"tQ"
            strides = [stride // 4 for stride in np.ascontiguousarray(value).strides]
            view = integers([0]) + b"(" + integers(value.shape) + b"t(" + integers(strides) + b"t"
            program += text(name.replace("/", ".")) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view
            program += b"\x89ccollections\nOrderedDict\n)RtR"
            archive.writestr(f"archive/data/{index}", value.astype("<f4").tobytes())
        archive.writestr("archive/data.pkl", program + b"u.")
        archive.writestr("archive/version", b"3\n")


def potential_by_numpy(arrays, x):
    """psi of a batch in float64, written down a second time: [n, d] -> [n]."""

    def celu(values):
        return np.maximum(values, 0) + np.minimum(np.expm1(np.minimum(values, 0)), 0)

    total = x @ np.float64(arrays["standardize/shift"])
    for name in ("v1", "v2"):
        get = {key.removeprefix(f"{name}/"): np.float64(value) for key, value in arrays.items() if key[:2] == name}
        quadratic = [
            (x @ get[f"quadratic_layers/{i}/quadratic_decomposed"][:, 0]) ** 2
            + x @ get[f"quadratic_layers/{i}/weight"].T
            + get[f"quadratic_layers/{i}/bias"]
            for i in range(3)
        ]
        hidden = celu(quadratic[0] @ get["convex_layers/0/weight"].T + quadratic[1])
        hidden = celu(hidden @ get["convex_layers/1/weight"].T + quadratic[2])
        total = total + hidden @ get["final_layer/weight"][0] + 0.005 * (x**2).sum(1)
    return np.float64(arrays["standardize/scale"]) * total


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_the_map_is_the_benchmarks_in_float64(shared_data, x64, dim):
    """Catches another activation, a lost 1/2 of the convexity term, a rounded scale: 1e-12 of the vectors."""
    vectors = np.load(shared_data / FOLDER / f"testvec_d{dim}.npz")
    pairs = mix3tomix10(shared_data / FOLDER, dim, dtype=jnp.float64)
    mapped = jax.jit(jax.vmap(pairs.transport))(jnp.asarray(vectors["X"], jnp.float64))
    np.testing.assert_allclose(mapped, vectors["Y_f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_the_map_is_the_benchmarks_in_float32(shared_data, dim):
    """Catches matrix products of reduced precision: 1e-5 (1 + |Y|) of the vectors, and OT of their sample."""
    vectors = np.load(shared_data / FOLDER / f"testvec_d{dim}.npz")
    pairs = mix3tomix10(shared_data / FOLDER / f"mix3tomix10_d{dim}.npz", dim)
    mapped = jax.jit(jax.vmap(pairs.transport))(vectors["X"])
    assert mapped.dtype == jnp.float32
    expected = vectors["Y_f64"]
    assert np.max(np.abs(mapped - expected) / (1 + np.abs(expected))) < 1e-5
    assert verify_optimal(pairs, n=200).optimal


@pytest.mark.parametrize("dim", [2, 16])
def test_the_sample_has_the_moments_that_the_file_states(shared_data, dim):
    """Catches a component that is never drawn, a transposed map, a cost without its 1/2: within 4 standard errors."""
    pairs = mix3tomix10(shared_data / FOLDER, dim)
    arrays = np.load(shared_data / FOLDER / f"mix3tomix10_d{dim}.npz")
    assert pairs.cost == arrays["cost_half_w2sq"]
    assert pairs.target_variance == arrays["output/var"]
    assert (pairs.name, pairs.dims, pairs.size) == (f"mix3tomix10-d{dim}", (dim,), None)
    x0, x1 = (np.float64(x) for x in pairs.sample(jax.random.key(0), 4000))
    costs = 0.5 * ((x0 - x1) ** 2).sum(1)
    assert abs(costs.mean() - pairs.cost) < 4 * costs.std() / np.sqrt(4000)
    for index in range(dim):
        squares = x0[:, index] ** 2
        assert abs(squares.mean() - arrays["input/cov"][index, index]) < 4 * squares.std() / np.sqrt(4000)
        other = x0[:, index] * x0[:, index - 1]
        assert abs(other.mean() - arrays["input/cov"][index, index - 1]) < 4 * other.std() / np.sqrt(4000)


@pytest.mark.parametrize("dim", [4, 8, 32, 128])
def test_every_dimension_loads_from_the_documented_keys(tmp_path, x64, dim):
    """Catches widths of one dimension taken for all, keys that only some files have, and a gradient of something else.

    Against central differences of a second implementation of psi, and monotone in all pairs.
    """
    arrays = write(tmp_path, dim)
    pairs = mix3tomix10(str(tmp_path), dim, dtype=jnp.float64)
    x0, x1 = (np.asarray(x) for x in pairs.sample(jax.random.key(1), 20))
    assert pairs.cost == 1.25
    steps = 1e-5 * np.eye(dim)
    for x, y in zip(x0[:3], x1[:3], strict=True):
        slopes = (potential_by_numpy(arrays, x + steps) - potential_by_numpy(arrays, x - steps)) / 2e-5
        np.testing.assert_allclose(y, slopes, rtol=1e-6, atol=1e-6 * np.abs(y).max())
    growth = np.einsum("ijd,ijd->ij", x0[:, None] - x0, x1[:, None] - x1)
    assert np.all(growth[~np.eye(20, dtype=bool)] > 0)


def test_a_variance_that_the_file_lacks_is_estimated(tmp_path):
    """Catches a variance with the mean left in, and a record that does not tell an estimate from a file's number."""
    write(tmp_path, 4)
    pairs = mix3tomix10(tmp_path, 4)
    x1 = np.float64(pairs.sample(jax.random.key(5), 4000).x1)
    assert pairs.target_variance == pytest.approx(x1.var(0).sum(), rel=0.2)
    assert "cost from the file, target variance from 16384 draws" in pairs.source


def test_the_first_examples_do_not_depend_on_how_many_are_drawn(tmp_path):
    """Catches one key for a whole batch: a longer sample would then be another one."""
    write(tmp_path, 4)
    pairs = mix3tomix10(tmp_path, 4)
    few, many = (pairs.sample(jax.random.key(2), n) for n in (3, 1500))
    np.testing.assert_allclose(few.x0, many.x0[:3], rtol=1e-6)
    np.testing.assert_allclose(few.x1, many.x1[:3], rtol=1e-5)


def test_the_map_is_an_argument_of_jitted_functions_and_has_a_symmetric_derivative(tmp_path):
    """Catches a closure that cannot cross jit, and a map that is no gradient."""
    write(tmp_path, 4)
    pairs = mix3tomix10(tmp_path, 4)
    x = jnp.ones(4)
    np.testing.assert_allclose(jax.jit(lambda move, x: move(x))(pairs.transport, x), pairs.transport(x), rtol=1e-5)
    derivative = jax.jacrev(pairs.transport)(x)
    np.testing.assert_allclose(derivative, derivative.T, rtol=1e-4, atol=1e-6)


def test_the_benchmarks_own_files_give_its_mixture_and_its_map(shared_data, tmp_path):
    """Catches other names of weights, another mixture than the seed's, a standardisation of the wrong sign.

    scale and shift are estimates on both sides, from 2^14 draws: within 2% of each other.
    """
    dim = 16
    arrays = np.load(shared_data / FOLDER / f"mix3tomix10_d{dim}.npz")
    for name in ("v1", "v2"):
        weights = {key[3:]: arrays[key] for key in arrays.files if key.startswith(name)}
        write_torch(tmp_path / f"{dim}_{name}.pt", weights)
    ours, theirs = mix3tomix10(tmp_path, dim), mix3tomix10(shared_data / FOLDER, dim)
    drawn, expected = (pairs.sample(jax.random.key(0), 500) for pairs in (ours, theirs))
    np.testing.assert_array_equal(drawn.x0, expected.x0)  # the seed gives the mixture bit for bit
    error = np.linalg.norm(drawn.x1 - expected.x1, axis=1) / np.linalg.norm(expected.x1, axis=1)
    assert np.median(error) < 0.02
    assert ours.cost == pytest.approx(theirs.cost, rel=0.03)
    assert ours.target_variance == pytest.approx(dim, rel=0.03)
    assert "cost and target variance from 16384 draws" in ours.source


def test_files_that_torch_writes_are_read(tmp_path):
    """Catches a reader that only knows this test's own files."""
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    for name in ("v1", "v2"):
        weights = {key.replace("/", "."): torch.from_numpy(v) for key, v in network(generator, 4).items()}
        torch.save(weights, tmp_path / f"4_{name}.pt")
    x1 = np.float64(mix3tomix10(tmp_path, 4).sample(jax.random.key(0), 4000).x1)
    assert x1.var(0).sum() == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v1/final_layer/weight": None}, "must hold an array v1/final_layer/weight"),
        ({"cost_half_w2sq": None}, "must hold an array cost_half_w2sq"),
        ({"mixture/maps": np.zeros((3, 4, 5))}, r"mixture/maps must have shape (3, 4, 4), got (3, 4, 5)"),
        ({"standardize/shift": np.full(4, np.nan)}, "standardize/shift must hold finite floating-point numbers"),
        ({"mixture/std": np.array("0.4")}, "mixture/std must hold finite floating-point numbers"),
        ({"standardize/scale": np.float32(-1)}, "standardize/scale must be > 0, got -1.0"),
        ({"v2/convex_layers/0/weight": np.full((64, 64), -1.0)}, "must be >= 0 (else psi is not convex), got an entry"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, message):
    """Catches a map that is loaded though it cannot be the benchmark's, and a KeyError."""
    write(tmp_path, 4, **changes)
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        mix3tomix10(tmp_path, 4)
    assert "\n" not in str(refused.value)
    assert "mix3tomix10_d4.npz" in str(refused.value)


def test_files_that_are_not_there_or_of_another_dimension_are_refused(tmp_path):
    """Catches the pairs of another dimension, a silent fallback, and numpy's own errors."""
    with pytest.raises(DataError, match=r"must hold mix3tomix10_d8.npz, or 8_v1.pt and 8_v2.pt: found neither"):
        mix3tomix10(tmp_path, 8)
    with pytest.raises(DataError, match="path must be a folder or an .npz file that exists"):
        mix3tomix10(tmp_path / "nowhere.npz", 8)
    write(tmp_path, 4)
    with pytest.raises(DataError, match=r"must have shape \(8, 1, 64\), got \(4, 1, 64\): is it of this dimension\?"):
        mix3tomix10(tmp_path / "mix3tomix10_d4.npz", 8)
    damaged = tmp_path / "mix3tomix10_d4.npz"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    with pytest.raises(DataError, match="cannot be read as an .npz file of numbers"):
        mix3tomix10(tmp_path, 4)
    damaged.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read as an .npz file of numbers"):
        mix3tomix10(tmp_path, 4)


@pytest.mark.parametrize("dim", [1, 257, 2.0, True])
def test_dimensions_out_of_range_are_refused(tmp_path, dim):
    """Catches a dimension that no file can have."""
    with pytest.raises(ValueError, match="dim must be"):
        mix3tomix10(tmp_path, dim)


def test_bad_arguments_are_refused(tmp_path):
    """Catches a silent truncation of float64, an integer or wrong-shaped x0, an empty sample."""
    write(tmp_path, 4)
    with pytest.raises(ValueError, match=r"dtype must be float32 \(float64 needs JAX's x64 mode\), got float64"):
        mix3tomix10(tmp_path, 4, dtype=np.float64)
    with pytest.raises(ValueError, match="dtype must be float32 .*, got nothing"):
        mix3tomix10(tmp_path, 4, dtype="nothing")
    pairs = mix3tomix10(tmp_path, 4)
    with pytest.raises(ValueError, match=r"x0 must have shape \(4,\), got \(2, 4\)"):
        pairs.transport(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="x0 must be floating point, got int32"):
        pairs.transport(jnp.ones(4, int))
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        pairs.sample(jax.random.key(0), 0)
