"""Gauss rules and the panels that keep them exact next to a pole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvjax import _quadrature
from fvjax._quadrature import Poles, hermite, legendre, panels

SLOTS = 4
times = st.floats(-0.5, 1.5)
distances = st.floats(-12, 0).map(lambda exponent: 10.0**exponent)


def cut(
    poles: list[complex], *, removable: bool = False, start: float = 0.0, end: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Left ends and widths of the panels in use; poles are padded to SLOTS, so that nothing compiles again."""
    padded = [*poles, *[complex(np.inf, 0)] * (SLOTS - len(poles))]
    arrays = Poles(jnp.asarray([p.real for p in padded]), jnp.asarray([p.imag for p in padded]))
    left, width = jax.jit(panels)(arrays, jnp.full(SLOTS, removable), jnp.asarray(start), jnp.asarray(end))
    used = np.asarray(width) > 0
    return np.asarray(left)[used], np.asarray(width)[used]


def bernstein_radius(pole: complex, left: np.ndarray, width: np.ndarray) -> np.ndarray:
    """|z + sqrt(z^2 - 1)| of the pole seen from each panel: the error of n nodes falls like its power -2n."""
    z = (pole - (left + width / 2)) / (width / 2)
    root = np.sqrt(z**2 - 1)
    return np.maximum(np.abs(z + root), np.abs(z - root))


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 64])
def test_legendre_is_exact_for_polynomials(nodes: int) -> None:
    """Catches nodes left on [-1, 1] or weights that add up to 2: degree 2n - 1 must come out."""
    t, w = legendre(nodes)
    powers = np.arange(2 * nodes)
    np.testing.assert_allclose(w @ t[:, None] ** powers, 1 / (powers + 1), rtol=1e-12)


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_hermite_is_exact_for_normal_moments(nodes: int) -> None:
    """Catches the physicists' weight exp(-x^2) in place of the standard normal: E x^(2k) = (2k - 1)!!."""
    x, w = hermite(nodes)
    for k in range(nodes):
        np.testing.assert_allclose(w @ x ** (2 * k), np.prod(np.arange(2 * k - 1, 0, -2, dtype=float)), rtol=1e-12)
        np.testing.assert_allclose(w @ x ** (2 * k + 1), 0, atol=1e-9)


@given(real=times, distance=distances, start=st.floats(0, 0.4), end=st.floats(0.6, 1))
def test_panels_cover_the_interval_once(x64: None, real: float, distance: float, start: float, end: float) -> None:
    """Catches gaps, overlaps, too few panels, and panels beyond the end."""
    left, width = cut([complex(real, distance)], start=start, end=end)
    assert left[0] == start
    np.testing.assert_allclose(left[1:], left[:-1] + width[:-1], rtol=0, atol=1e-15)
    np.testing.assert_allclose(left[-1] + width[-1], end, rtol=0, atol=1e-15)
    assert width.max() <= _quadrature.LONGEST_PANEL


@given(poles=st.lists(st.tuples(times, distances), min_size=1, max_size=2))
def test_panels_keep_the_promised_radius(x64: None, poles: list[tuple[float, float]]) -> None:
    """Catches a panel that is too long for a pole before, above or behind it: rho >= 4.6 for every pole and panel."""
    left, width = cut([complex(*pole) for pole in poles])
    for pole in poles:
        assert bernstein_radius(complex(*pole), left, width).min() > 4.6


@given(real=st.floats(0, 1), distance=distances)
def test_integral_next_to_a_pole(x64: None, real: float, distance: float) -> None:
    """Catches the silent failure of a fixed rule: a Lorentzian of any width against its arctan, to 1e-11.

    The error that remains is the rounding of 1 / ((t - real)^2 + distance^2) at t near real, epsilon / distance.
    """
    left, width = cut([complex(real, distance), complex(real, -distance)])
    node, weight = legendre(_quadrature.PANEL_NODES)
    t = left[:, None] + width[:, None] * node
    total = np.sum(width[:, None] * weight * distance / ((t - real) ** 2 + distance**2))
    exact = np.arctan((1 - real) / distance) + np.arctan(real / distance)
    np.testing.assert_allclose(total, exact, rtol=1e-11 + 1e-15 / distance)


@given(real=st.floats(0.1, 0.9))
def test_a_removable_pole_only_ends_a_panel(x64: None, real: float) -> None:
    """Catches a node at 0 / 0, and hundreds of panels wasted on a place where the integrand is smooth."""
    left, width = cut([complex(real, 0.0)], removable=True)
    nodes = left[:, None] + width[:, None] * legendre(_quadrature.PANEL_NODES)[0]
    assert np.abs(nodes - real).min() > 1e-17 + 1e-3 * width.min()
    assert np.abs(left - real).min() < 4e-15
    assert len(left) <= 6


@pytest.mark.parametrize("angle", [179.0, 179.9, 179.999])
def test_many_poles_have_enough_panels(x64: None, angle: float) -> None:
    """Catches a bound that suits one plane of rotation: 25 planes with different variances, at 179.999 degrees."""
    roots = np.sqrt(np.linspace(0.25, 4, 25)) * np.exp(1j * np.deg2rad(angle))
    poles = -1 / (np.concatenate([roots, roots.conj()]) - 1)
    arrays = Poles(jnp.asarray(poles.real), jnp.asarray(poles.imag))
    left, width = panels(arrays, jnp.zeros(50, bool), jnp.zeros(()), jnp.ones(()))
    np.testing.assert_allclose(left[-1] + width[-1], 1, rtol=1e-14)
    used = np.asarray(width) > 0
    assert min(bernstein_radius(p, np.asarray(left)[used], np.asarray(width)[used]).min() for p in poles) > 4.6


def test_single_precision_reaches_the_end() -> None:
    """Catches a smallest panel that is below the resolution of float32, so that the cut never advances past a pole."""
    left, width = cut([complex(0.5, 0.0)])
    assert left.dtype == np.float32
    np.testing.assert_allclose(left[-1] + width[-1], 1, rtol=1e-6)
