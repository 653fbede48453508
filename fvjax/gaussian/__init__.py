"""Gaussian transport exactly: maps, couplings, the affine field, the variance of its gradient, and what noise selects.

Theory: docs/theory.md, sections 2 to 5.
"""

from fvjax.gaussian.laws import GaussianCoupling as GaussianCoupling
from fvjax.gaussian.laws import draw_pairs as draw_pairs
from fvjax.gaussian.laws import gaussian_coupling as gaussian_coupling
from fvjax.gaussian.laws import independent_coupling as independent_coupling
from fvjax.gaussian.laws import map_coupling as map_coupling
from fvjax.gaussian.laws import ot_map as ot_map
from fvjax.gaussian.laws import rotated_map as rotated_map
from fvjax.gaussian.minimiser import population_minimiser as population_minimiser
from fvjax.gaussian.minimiser import selected_angle as selected_angle
from fvjax.gaussian.variance import VarianceProfile as VarianceProfile
from fvjax.gaussian.variance import affine_field as affine_field
from fvjax.gaussian.variance import exact_gradient_moments as exact_gradient_moments
from fvjax.gaussian.variance import exact_gradient_variance as exact_gradient_variance
from fvjax.gaussian.variance import pair_optimal as pair_optimal
from fvjax.gaussian.variance import quadrature_paths as quadrature_paths
from fvjax.gaussian.variance import variance_profile as variance_profile
from fvjax.types import AffineMap as AffineMap
