"""k-ReFlow for any field: train on pairs, let the flow pair its own sources, train on those pairs, repeat.

    optimizer = training.adam(2000)
    train = pair_trainer(model.apply, linear(), optimizer, key=train_key, steps=2000)
    sources = lambda key: jax.random.normal(key, (10_000, 2))
    for done in reflow(train, model.apply, model.init(key), sources, key=key, rounds=3, first=independent_pairs):
        print(done.index, round_measures(model.apply, done.params, done.pairs))

1. Round 1 trains on independent pairs.
2. z0 ~ p0, z1 = ODE(z0): `generate_pairs`.
3. The next round trains on the FIXED pairs (z0, z1), starting from the parameters of the round before.
4. Repeat.

The training is the caller's function, so that checkpoints, devices and logs stay in its hands; `pair_trainer` is one on
`fvjax.training.fit` for pairs that fit into memory. Every random number follows from (key, round, part): a run that was
stopped goes on with `first_round` and the parameters of the round before, and makes the same pairs.

===========================  ==========================================================================================
interpolant noise            that of the interpolant which the training function uses
fixed or regenerated pairs   `pairs_of(0)` again and again, or `pairs_of(0)`, `pairs_of(1)`, ...: `pair_trainer(...,
                             regenerations=r)` goes through r sets
paths with noise             `diffuse_pairs` in place of `generate_pairs`; the rounds around it are `fvjax.bridges.dsbm`
share of real pairs          `reflow(..., real=pairs, real_share=0.2)`; `invert_pairs` makes real pairs out of real
                             targets and the flow run backwards
===========================  ==========================================================================================

Source: Liu et al. 2023 (Rectified Flow).
"""

from fvjax.rectification._measures import EulerError as EulerError
from fvjax.rectification._measures import RoundMeasures as RoundMeasures
from fvjax.rectification._measures import round_measures as round_measures
from fvjax.rectification._pairs import CHUNK as CHUNK
from fvjax.rectification._pairs import diffuse_pairs as diffuse_pairs
from fvjax.rectification._pairs import generate_pairs as generate_pairs
from fvjax.rectification._pairs import invert_pairs as invert_pairs
from fvjax.rectification._pairs import mixed as mixed
from fvjax.rectification._rounds import FirstKept as FirstKept
from fvjax.rectification._rounds import PairsOf as PairsOf
from fvjax.rectification._rounds import Round as Round
from fvjax.rectification._rounds import Sources as Sources
from fvjax.rectification._rounds import TrainRound as TrainRound
from fvjax.rectification._rounds import pair_trainer as pair_trainer
from fvjax.rectification._rounds import reflow as reflow
