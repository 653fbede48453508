"""Whole audits of fields whose truth is known without training; all of one shape, so that they compile once."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import fvjax
from fvjax import AffineMap, Pair, gaussian
from fvjax.auditing import GradientVariance, Layer, TimeBin, _inputs, _noise, _run, _solvers

N, HELD, DIM = 60, 30, 4
KEY = jax.random.key(0)
CLEAR = fvjax.constant_noise(0.0)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Fewer points at once, in loops of fewer steps: here everything is compiled for speed of compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_solvers, "CARRIED", 64)
        patch.setattr(_run, "POINTS", 32)
        patch.setattr(_noise, "DRAWS", 16)
        patch.setattr(_noise, "STEPS", 20)
        yield


def random_pairs(n: int = N, seed: int = 0) -> Pair:
    """Independent Gaussian sources and targets, float32 of numpy, [n, DIM]."""
    x0, x1 = np.random.default_rng(seed).standard_normal((2, n, DIM)).astype(np.float32)
    return Pair(x0, x1 + np.float32(3))


def rotation(degrees: float) -> np.ndarray:
    """In both planes, [DIM, DIM]."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.kron(np.eye(2), np.array([[cos, -sin], [sin, cos]])).astype(np.float32)


def rotated_pairs(degrees: float, n: int = N, seed: int = 0) -> Pair:
    """x1 = R x0 + 3: a rule, but not the optimal map, x0 + 3."""
    x0 = random_pairs(n, seed).x0
    return Pair(x0, x0 @ rotation(degrees).T + np.float32(3))


def blend(parts: dict[str, Any], params: Any, t: jax.Array, x: jax.Array) -> jax.Array:
    """One of three fields, chosen by weights; nan beyond a limit of the first coordinate."""
    del params
    shift, steep = parts["map"].shift, 1 - 2 * t
    half_turn = shift - 2 * steep / (steep**2 + 1e-4) * (x - t * shift)
    fields = parts["minimiser"](None, t, x), gaussian.affine_field(parts["map"], t, x), half_turn
    velocity = sum(weight * field for weight, field in zip(parts["weights"], fields, strict=True))
    return jnp.where(x[0] > parts["limit"], jnp.nan, velocity)


def known_field(kind: str, pairs: Pair, *, sigma: float = 0.0, degrees: float = 0.0, limit: float = np.inf) -> Partial:
    """A field without params.

    ===========  =======================================================================================
    minimiser    the exact minimiser of the pairs at constant noise sigma; at 0 the memorizing field
    affine       the pair-optimal field of x1 = R x0 + 3; at 0 degrees a translation
    half turn    the pair-optimal field of 180 degrees, smoothed at its pole, t = 1/2
    ===========  =======================================================================================
    """
    index = ("minimiser", "affine", "half turn").index(kind)
    generator = rotation(degrees) - np.eye(DIM, dtype=np.float32)
    parts = {
        "minimiser": fvjax.empirical_minimiser(pairs, fvjax.constant_noise(sigma)),
        "map": AffineMap(jnp.asarray(generator), jnp.full(DIM, 3.0)),
        "weights": tuple(jnp.float32(k == index) for k in range(3)),
        "limit": jnp.float32(limit),
    }
    return Partial(blend, parts)


def quick(field: Any, pairs: Any, **options: Any) -> fvjax.Audit:
    """An audit in a second, once its programs are compiled.

    By Euler: off its pairs the memorizing field jumps, which costs an adaptive solver thousands of steps.
    """
    given: dict[str, Any] = {"key": KEY, "interpolant": CLEAR, "draws": 64, "euler_steps": (5, 4)}
    given |= {"solver": "euler", "steps": 20} | options
    return fvjax.audit(field, None, pairs, **given)


@pytest.fixture(scope="module")
def memorized() -> fvjax.Audit:
    """Of a field that stores its pairs."""
    pairs = random_pairs()
    return quick(known_field("minimiser", pairs), pairs, held_out=random_pairs(HELD, 1))


def test_a_field_that_stores_its_pairs_memorizes(memorized):
    """Catches a held-out share among the wrong targets, and a minimiser that is another one than the field's."""
    found = memorized
    assert found.pair_memorization.verdict == "memorizes"
    training = found.pair_memorization.training
    assert (training.returned.value, training.returned.count, training.targets) == (1.0, N, N)
    assert training.to_own.mean < 1e-5
    held_out = found.pair_memorization.held_out
    assert (held_out.returned.count, held_out.targets) == (HELD, N + HELD)
    assert held_out.returned.high < 0.5
    assert found.minimiser.reference == "memorizing field"
    assert max(found.minimiser.training.to_minimiser, found.minimiser.training.to_target) < 1e-6
    assert found.minimiser.held_out.to_minimiser < 1e-6 < found.minimiser.held_out.to_target
    assert found.straightness.relative < 1e-6
    assert found.gradients is None
    assert any(line.startswith("Gradient variance") for line in found.not_tested)
    assert not found.solvers.depends
    assert "memorizes" in found.headline
    # Among 100 pairs or fewer the points name their pairs, and the noise that changes that is known.
    assert [row.perplexity for row in found.identifiability.by_time] == [1.0] * 5
    assert found.critical_noise.measured_pairs == found.critical_noise.predicted_pairs == N
    assert found.critical_noise.best == pytest.approx(found.critical_noise.predicted, rel=0.6)


def test_a_field_that_follows_the_rule_of_its_pairs_does_not_memorize():
    """Catches held-out sources compared with training targets only, and optimal targets taken for own ones."""
    pairs = rotated_pairs(120)
    field = known_field("affine", pairs, degrees=120)
    found = quick(field, pairs, held_out=rotated_pairs(120, HELD, 1), ot_targets=pairs.x0 + 3)
    assert found.pair_memorization.verdict == "follows a rule"
    assert found.pair_memorization.held_out.returned.value == 1.0
    assert found.pair_memorization.held_out.to_own.mean < 1e-3
    assert found.data_memorization.verdict != "memorizes"
    assert found.data_memorization.sources == "held-out"
    assert found.optimal_transport.closer.value == 0.0
    expected = np.linalg.norm(pairs.x1 - pairs.x0 - 3, axis=1).mean()
    assert found.optimal_transport.to_optimal.mean == pytest.approx(expected, rel=1e-3)
    assert "Distance to the optimal-transport map: give `ot_targets`." not in found.not_tested


def test_without_held_out_pairs_memory_and_rule_are_not_told_apart():
    """Catches a verdict that rests on nothing, and sources alone taken for pairs."""
    pairs = rotated_pairs(120)
    field = known_field("affine", pairs, degrees=120)
    alone = quick(field, pairs)
    assert alone.pair_memorization.verdict == "undecided"
    assert "held_out" in alone.pair_memorization.reason
    assert (alone.data_memorization.sources, alone.data_memorization.verdict) == ("training", "undecided")
    assert alone.minimiser.held_out is None
    sources = quick(field, pairs, held_out=rotated_pairs(120, HELD, 1).x0)
    assert sources.settings.held_out == "sources"
    assert sources.pair_memorization.verdict == "undecided"
    assert sources.pair_memorization.held_out is None
    assert sources.data_memorization.fraction.count == HELD
    assert sources.minimiser.held_out.to_target is None
    few = quick(field, pairs, held_out=rotated_pairs(120, 5, 1))
    assert few.pair_memorization.verdict == "undecided"
    assert "5 held-out pairs" in few.pair_memorization.reason


@pytest.mark.parametrize(("kind", "sigma"), [("affine", 0.0), ("minimiser", 5.0)])
def test_a_field_that_goes_elsewhere_lets_go(kind, sigma):
    """Catches a share that is high by chance: a translation, and the minimiser with much noise."""
    pairs = random_pairs()
    field = known_field(kind, pairs, sigma=sigma)
    noise = fvjax.constant_noise(sigma)
    found = quick(field, pairs, interpolant=noise, held_out=random_pairs(HELD, 1), ot_targets=pairs.x0 + 3)
    assert found.pair_memorization.verdict == "lets go"
    assert found.pair_memorization.training.returned.high < 0.5
    assert found.critical_noise.interpolant == pytest.approx(sigma)
    if kind == "affine":
        assert found.optimal_transport.closer.value == 1.0
        assert found.optimal_transport.to_optimal.mean < 1e-5
    else:
        assert found.minimiser.reference == "exact minimiser"
        assert found.minimiser.training.to_minimiser < 1e-4
        assert found.identifiability.by_time[2].perplexity > N / 2


def test_a_half_turn_depends_on_the_solver():
    """Catches one solver taken for all: 5 Euler steps jump over t = 1/2, 4 meet it, an adaptive one turns nothing."""
    pairs = rotated_pairs(180)
    found = quick(known_field("half turn", pairs), pairs, held_out=rotated_pairs(180, HELD, 1))
    shares = {row.name: row.returned.value for row in found.solvers.rows}
    assert shares["euler, 5 steps"] == 1.0
    assert shares["dopri5, adaptive"] < 0.5
    assert found.solvers.depends
    assert found.headline.endswith("With another solver the answer is another one.")
    assert any(sentence.level == "unsure" and "solver" in sentence.text for sentence in found.sentences)


def test_few_pairs_and_equal_targets():
    """Catches two pairs that are called memorized by chance, and a target whose copy counts as another one."""
    two = Pair(*(x[:2] for x in random_pairs()))
    found = quick(known_field("minimiser", random_pairs()), two, held_out=random_pairs(HELD, 1))
    assert found.pair_memorization.verdict == "undecided"
    assert found.settings.pairs == 2
    assert any("few training sources" in sentence.text for sentence in found.sentences)
    pairs = random_pairs()
    pairs.x1[: N // 2] = pairs.x1[0]
    found = quick(known_field("minimiser", pairs), pairs, held_out=random_pairs(HELD, 1))
    assert found.settings.distinct_targets == N // 2 + 1
    assert found.pair_memorization.training.returned.value == 1.0
    assert found.pair_memorization.training.to_other.mean > 0.1
    assert any("more than once" in sentence.text for sentence in found.sentences)


def test_solves_that_fail_are_not_returned():
    """Catches a nan that counts as near, or that spreads into the distances of the others."""
    pairs = random_pairs()
    short = Pair(pairs.x0, pairs.x0 + np.float32(0.5))
    limit = float(short.x1[:, 0].max()) + 0.5
    found = quick(known_field("affine", pairs, limit=limit), short)
    # The field moves by 3, and the last of 20 steps starts at t = 0.95.
    failed = int(np.sum(pairs.x0[:, 0] + 2.85 > limit))
    assert 0 < failed < N
    assert found.pair_memorization.training.failed == failed
    assert found.pair_memorization.training.to_own.count == N - failed
    assert found.pair_memorization.training.to_own.mean == pytest.approx(5.0, rel=1e-4)
    assert found.pair_memorization.training.returned.count == N
    assert any("solver failed" in sentence.text for sentence in found.sentences)
    with pytest.raises(ValueError, match=r"^field must give finite velocities .* got nan or infinity at \d+ of 32"):
        quick(known_field("half turn", pairs, limit=0.0), pairs)


class OnDisk:
    """Stands for an array that does not fit in memory: it counts the rows of every reading."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.largest = self.slices = 0

    def __getitem__(self, rows: Any) -> np.ndarray:
        assert isinstance(rows, slice) or (rows.ndim == 1 and np.all(np.diff(rows) > 0))
        found = self._array[rows]
        self.largest = max(self.largest, len(found))
        self.slices += len(found) if isinstance(rows, slice) else 0
        return found


def test_pairs_on_disk_are_streamed_and_give_the_same_bits(tmp_path, monkeypatch):
    """Catches a whole array that is read, rows that are read twice, and a result that depends on where pairs lie."""
    monkeypatch.setattr(_inputs, "CHUNK_ROWS", 16)
    monkeypatch.setattr(_inputs, "CHECKED_ELEMENTS", 0)
    pairs = random_pairs(400)
    field = known_field("affine", random_pairs())
    options: dict[str, Any] = {"held_out": random_pairs(5, 1), "sources": 4, "draws": 20}
    monkeypatch.setattr(_noise, "COMPARED", 30)
    monkeypatch.setattr(_noise, "SOURCES", 10)
    in_memory = quick(field, pairs, **options)
    disk = Pair(OnDisk(pairs.x0), OnDisk(pairs.x1))
    assert quick(field, disk, **options) == in_memory
    assert all(x.largest < 200 and x.slices == 400 for x in disk)
    for name, x in (("x0", pairs.x0), ("x1", pairs.x1)):
        np.save(tmp_path / name, x)
    mapped = Pair(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x0", "x1")))
    assert quick(field, mapped, **options) == in_memory
    assert in_memory.identifiability.pairs == in_memory.critical_noise.measured_pairs == 30
    assert in_memory.critical_noise.predicted_pairs == in_memory.identifiability.of == 400
    assert sum("random ones" in line for line in in_memory.not_tested) == 2
    assert in_memory.settings.distinct_targets == 400
    spread = np.sqrt(np.sum(np.var(pairs.x1.astype(float), axis=0)))
    assert in_memory.settings.spread == pytest.approx(spread, rel=1e-6)
    monkeypatch.setattr(_inputs, "CHUNK_ROWS", 400)
    whole = quick(field, pairs, **options)
    assert whole.minimiser.training.to_minimiser == pytest.approx(in_memory.minimiser.training.to_minimiser, rel=1e-5)
    assert whole.pair_memorization == in_memory.pair_memorization


def test_an_audit_is_a_function_of_its_key():
    """Catches randomness from anywhere else, a key that is ignored, and a progress callback that runs backwards."""
    pairs = random_pairs()
    field = known_field("minimiser", pairs)
    stages: list[tuple[str, float]] = []
    options: dict[str, Any] = {"held_out": random_pairs(HELD, 1), "sources": 20}
    first = quick(field, pairs, progress=lambda stage, done: stages.append((stage, done)), **options)
    assert first == quick(field, Pair(*map(jnp.asarray, pairs)), **options)
    assert first != quick(field, pairs, key=jax.random.key(1), **options)
    assert stages[-1] == ("done", 1.0)
    assert all(0 <= done <= 1 for _, done in stages)
    assert f"The other {N - 20} training sources: 20 were carried." in first.not_tested


def with_gradients(audit: fvjax.Audit) -> fvjax.Audit:
    """The audit with a gradient section, some numbers of which do not exist."""
    bins = (TimeBin(0.0, 0.5, 1, None, None), TimeBin(0.5, 1.0, 63, 0.1, 2.0))
    layers = tuple(Layer(f"layer_{k}", 10, 1.0 + k, None) for k in range(30))
    return dataclasses.replace(audit, gradients=GradientVariance(495.0, None, None, 64, 300, bins, layers))


def test_json_comes_back_equal(memorized, tmp_path):
    """Catches NaN in the JSON, an int for a float, a list for a tuple, and a record that is read wrongly in silence."""
    noise = dataclasses.replace(memorized.critical_noise, measured=float("inf"))
    audit = dataclasses.replace(with_gradients(memorized), critical_noise=noise)
    text = audit.to_json(tmp_path / "audit.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    content = json.loads(text, parse_constant=refuse)
    assert content == audit.to_dict()
    assert content["critical_noise"]["measured"] == "Infinity"
    assert content["gradients"]["noise_scale"] is None
    for source in (text, tmp_path / "audit.json", str(tmp_path / "audit.json")):
        assert fvjax.Audit.from_json(source) == audit
    for path, value, message in (
        ("headline", 3, "the audit.headline must be of type str, got 3"),
        ("settings", {}, "the audit.settings must have the fields of Settings, differs in"),
        ("sentences", {}, "the audit.sentences must be a list, got dict"),
        ("straightness", content["straightness"] | {"mean": "x"}, "the audit.straightness.mean must be a number"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            fvjax.Audit.from_json(json.dumps(content | {path: value}))


def test_report_in_text_and_as_a_page(memorized, tmp_path):
    """Catches a sentence, a table or a caveat that is computed and not shown, and numbers that do not exist as nan."""
    audit = with_gradients(memorized)
    text = str(audit)
    html = audit.to_html(tmp_path / "audit.html", command="fvjax audit here")
    assert (tmp_path / "audit.html").read_text(encoding="utf-8") == html
    for shown in (text, html):
        assert "nan" not in shown.replace("nanmean", "").split()
        assert "layer_29" in shown
        assert "10 others" in shown
    flat = " ".join(text.split())
    page = audit.to_page()
    assert page.headline == audit.headline
    assert list(page.sentences) == list(audit.sentences)
    assert audit.headline in flat
    for sentence in audit.sentences:
        assert sentence.text in flat
        assert sentence.evidence in flat
    for line in audit.not_tested:
        assert line in flat
    titles = [section.title for section in page.sections]
    assert [title for title in titles if title in text] == titles
    assert html.count("<svg") >= 4
    assert "fvjax audit here" in html
    assert page.config["pairs"] == N
