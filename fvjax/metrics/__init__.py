"""Measures of a learned map and of its samples.

====================================  ==================================================================================
a target for every row                `pair_l2`, `l2_uvp`, `direction_cosine`, `fitted_rotation`
two samples                           `squared_mmd` beside its `mmd_floor`; `frechet_distance` of features
samples and the training set          `memorized_fraction`
====================================  ==================================================================================

Distances of sets do not see which source went to which target: report `pair_l2` beside them.
"""

from fvjax.metrics._distances import PairDistance as PairDistance
from fvjax.metrics._distances import direction_cosine as direction_cosine
from fvjax.metrics._distances import fitted_rotation as fitted_rotation
from fvjax.metrics._distances import l2_uvp as l2_uvp
from fvjax.metrics._distances import pair_l2 as pair_l2
from fvjax.metrics._frechet import FeatureMoments as FeatureMoments
from fvjax.metrics._frechet import feature_moments as feature_moments
from fvjax.metrics._frechet import frechet_distance as frechet_distance
from fvjax.metrics._frechet import merge_feature_moments as merge_feature_moments
from fvjax.metrics._kernels import BANDWIDTH_FACTORS as BANDWIDTH_FACTORS
from fvjax.metrics._kernels import MmdFloor as MmdFloor
from fvjax.metrics._kernels import median_bandwidths as median_bandwidths
from fvjax.metrics._kernels import mmd_floor as mmd_floor
from fvjax.metrics._kernels import squared_mmd as squared_mmd
from fvjax.metrics._memorization import MemorizedFraction as MemorizedFraction
from fvjax.metrics._memorization import memorized_fraction as memorized_fraction
from fvjax.metrics._shares import wilson_interval as wilson_interval
