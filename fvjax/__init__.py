"""fvjax: is my flow learning a transport map, or memorizing my pairs, and what does its gradient variance say?

The core is functions on pytrees and knows no framework. Networks (`fvjax.nets`) and training (`fvjax.training`) are
imported on their own, so that `import fvjax` costs little more than `import jax`.
"""

from fvjax import auditing as auditing
from fvjax import couplings as couplings
from fvjax import flows as flows
from fvjax import gaussian as gaussian
from fvjax import gradients as gradients
from fvjax import interpolants as interpolants
from fvjax import losses as losses
from fvjax import metrics as metrics
from fvjax import pairs as pairs
from fvjax import sites as sites
from fvjax.auditing import Audit as Audit
from fvjax.auditing import audit as audit
from fvjax.flows import diffuse as diffuse
from fvjax.flows import diffusion_path as diffusion_path
from fvjax.flows import straightness as straightness
from fvjax.flows import trajectory as trajectory
from fvjax.flows import transport as transport
from fvjax.gradients import GradientMoments as GradientMoments
from fvjax.gradients import gradient_moments as gradient_moments
from fvjax.gradients import gradient_noise_scale as gradient_noise_scale
from fvjax.gradients import merge_moments as merge_moments
from fvjax.gradients import per_example_gradients as per_example_gradients
from fvjax.gradients import time_bins as time_bins
from fvjax.gradients import total_variance as total_variance
from fvjax.gradients import variance_by_leaf as variance_by_leaf
from fvjax.interpolants import Interpolant as Interpolant
from fvjax.interpolants import bridge_drift as bridge_drift
from fvjax.interpolants import brownian_bridge as brownian_bridge
from fvjax.interpolants import constant_noise as constant_noise
from fvjax.interpolants import draw_path as draw_path
from fvjax.interpolants import draw_paths as draw_paths
from fvjax.interpolants import gaussian_source as gaussian_source
from fvjax.interpolants import linear as linear
from fvjax.interpolants import smooth_bridge as smooth_bridge
from fvjax.interpolants import trigonometric as trigonometric
from fvjax.losses import batch_loss as batch_loss
from fvjax.losses import squared_error as squared_error
from fvjax.pairs import empirical_minimiser as empirical_minimiser
from fvjax.pairs import identifiability as identifiability
from fvjax.pairs import memorizing_field as memorizing_field
from fvjax.pairs import sigma_critical as sigma_critical
from fvjax.sites import square_norms as square_norms
from fvjax.types import AffineMap as AffineMap
from fvjax.types import Coupling as Coupling
from fvjax.types import Model as Model
from fvjax.types import Pair as Pair
from fvjax.types import PathSample as PathSample
from fvjax.types import VelocityField as VelocityField

__version__ = "0.1.0"

__all__ = [
    "AffineMap",
    "Audit",
    "Coupling",
    "GradientMoments",
    "Interpolant",
    "Model",
    "Pair",
    "PathSample",
    "VelocityField",
    "audit",
    "auditing",
    "batch_loss",
    "bridge_drift",
    "brownian_bridge",
    "constant_noise",
    "couplings",
    "diffuse",
    "diffusion_path",
    "draw_path",
    "draw_paths",
    "empirical_minimiser",
    "flows",
    "gaussian",
    "gaussian_source",
    "gradient_moments",
    "gradient_noise_scale",
    "gradients",
    "identifiability",
    "interpolants",
    "linear",
    "losses",
    "memorizing_field",
    "merge_moments",
    "metrics",
    "pairs",
    "per_example_gradients",
    "sigma_critical",
    "sites",
    "smooth_bridge",
    "square_norms",
    "squared_error",
    "straightness",
    "time_bins",
    "total_variance",
    "trajectory",
    "transport",
    "trigonometric",
    "variance_by_leaf",
]
