r"""Diffusion bridges between two laws: DSBM for any network, and the Schroedinger bridge of Gaussians in closed form.

    optimizer = training.adam(2000)
    train = pair_trainer(model.apply, bridge_drift(sigma), optimizer, key=train_key, steps=2000)
    params = BridgeParams(model.init(forward_key), model.init(backward_key))
    for done in dsbm(train, model.apply, params, (sources, targets), key=key, rounds=10, sigma=sigma):
        print(done.index, done.direction)
    pairs = bridge_pairs(path_key, model.apply, done.params, x0, direction="forward", sigma=sigma)  # by the diffusion
    x1 = flows.transport(probability_flow(model.apply), done.params, x0)                          # by the ODE, ONE x0

The reference is Brownian motion, dX = sigma dB, and drifts regress `interpolants.bridge_drift(sigma)`. Networks of the
backward drift are called with the time s = 1 - t that runs along with them.

=================================  =====================================================================================
system                             how
=================================  =====================================================================================
DSBM, from independent pairs       `dsbm(..., start="imf")`
DSBM, from the reference           `dsbm(..., start="ipf")`
ReFlow with Brownian noise         `dsbm(..., directions=("forward",))`
SB-CFM                             no rounds: `training.make_train_step` with `interpolants.brownian_bridge(sigma)` and
                                   `couplings.minibatch_ot(method="sinkhorn", sigma=sigma, replace=True)`
Gaussian marginals, exactly        `schroedinger_coupling`; `population_minimiser` of it with `brownian_bridge` is the
                                   velocity, with `bridge_drift` the forward drift; `markov_coupling`: one round of DSBM
=================================  =====================================================================================
"""

from fvjax.bridges._dsbm import BridgeRound as BridgeRound
from fvjax.bridges._dsbm import dsbm as dsbm
from fvjax.bridges._fields import DIRECTIONS as DIRECTIONS
from fvjax.bridges._fields import BridgeParams as BridgeParams
from fvjax.bridges._fields import bridge_pairs as bridge_pairs
from fvjax.bridges._fields import bridge_score as bridge_score
from fvjax.bridges._fields import probability_flow as probability_flow
from fvjax.bridges._gaussian import SampleDivergence as SampleDivergence
from fvjax.bridges._gaussian import bridge_law as bridge_law
from fvjax.bridges._gaussian import coupling_divergence as coupling_divergence
from fvjax.bridges._gaussian import divergence_floor as divergence_floor
from fvjax.bridges._gaussian import markov_coupling as markov_coupling
from fvjax.bridges._gaussian import sample_divergence as sample_divergence
from fvjax.bridges._gaussian import schroedinger_coupling as schroedinger_coupling
from fvjax.bridges._gaussian import swapped as swapped
