"""Figures: one function each, rows or arrays in, a matplotlib Figure out; nothing is written or shown here."""

from experiments.plots.gaussian import angle_phase as angle_phase
from experiments.plots.gaussian import flow_trajectories as flow_trajectories
from experiments.plots.gaussian import solver_distances as solver_distances
from experiments.plots.gaussian import training_variance as training_variance
from experiments.plots.gaussian import variance_by_coupling as variance_by_coupling
from experiments.plots.gaussian import variance_by_field as variance_by_field
from experiments.plots.gaussian import variance_phase as variance_phase
from experiments.plots.images import image_grid as image_grid
from experiments.plots.images import image_training as image_training
from experiments.plots.pairs import critical_sigma as critical_sigma
from experiments.plots.pairs import image_rows as image_rows
from experiments.plots.pairs import pair_training as pair_training
from experiments.plots.pairs import sigma_curve as sigma_curve
from experiments.plots.rounds import reflow_rounds as reflow_rounds
