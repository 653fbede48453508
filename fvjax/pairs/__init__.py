"""Finite sets of pairs exactly: what a network would learn from them if it could represent, and find, the minimiser.

Theory: docs/theory.md, section 8.
"""

from fvjax.pairs._critical import SigmaCritical as SigmaCritical
from fvjax.pairs._critical import nearest_target_is_own as nearest_target_is_own
from fvjax.pairs._critical import recovered_fraction as recovered_fraction
from fvjax.pairs._critical import sigma_critical as sigma_critical
from fvjax.pairs._exact import exact_gradient_moments as exact_gradient_moments
from fvjax.pairs._exact import exact_loss as exact_loss
from fvjax.pairs._exact import irreducible_loss as irreducible_loss
from fvjax.pairs._identifiability import Identifiability as Identifiability
from fvjax.pairs._identifiability import identifiability as identifiability
from fvjax.pairs._minimiser import empirical_minimiser as empirical_minimiser
from fvjax.pairs._minimiser import empirical_score as empirical_score
from fvjax.pairs._minimiser import memorizing_field as memorizing_field
from fvjax.pairs._minimiser import pair_log_weights as pair_log_weights
from fvjax.pairs._nodes import NodeOptions as NodeOptions
from fvjax.pairs._nodes import pair_nodes as pair_nodes
from fvjax.pairs._spacing import PredictedSigma as PredictedSigma
from fvjax.pairs._spacing import nearest_midpoint_distances as nearest_midpoint_distances
from fvjax.pairs._spacing import predicted_sigma_critical as predicted_sigma_critical
