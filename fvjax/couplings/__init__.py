r"""Couplings: which target sample each source sample is trained towards.

A coupling is a callable (key, x0[n, *dims], x1[n, *dims]) -> Pair, a batch in, an aligned batch out.

=================================  =============================================  =======================
name                               x1 of the pair                                 law of x1
=================================  =============================================  =======================
`paired`                           x1 as it comes                                 kept, point by point
`independent`                      a uniformly random permutation of x1           kept, point by point
`shuffled`                         a uniformly random derangement of x1           kept, point by point
`minibatch_ot()`                   the permutation of least squared distance      kept, point by point
`minibatch_ot(method="sinkhorn")`  a permutation drawn from the entropic plan     kept, point by point
the same with `replace=True`       drawn from the plan, x1 may repeat             kept in expectation
`affine(map)`                      map(x0): the given x1 is replaced              becomes that of map(x0)
`rotated(rotation, shift)`         rotation x0 + shift: the given x1 is replaced  becomes that of map(x0)
=================================  =============================================  =======================

Minibatch OT is optimal within the batch only; it tends to the optimal coupling of the two laws as n grows.
Sinkhorn with `sigma=s` is the coupling of the Schroedinger bridge with the reference dX = s dB; `entropic_partners`
draws it for whole data sets, in batches, and reports how many converged.
"""

from fvjax.couplings._sinkhorn import SinkhornPlan as SinkhornPlan
from fvjax.couplings.pairings import affine as affine
from fvjax.couplings.pairings import derangement as derangement
from fvjax.couplings.pairings import independent as independent
from fvjax.couplings.pairings import paired as paired
from fvjax.couplings.pairings import rotated as rotated
from fvjax.couplings.pairings import shuffled as shuffled
from fvjax.couplings.pools import Partners as Partners
from fvjax.couplings.pools import entropic_partners as entropic_partners
from fvjax.couplings.rotations import random_basis as random_basis
from fvjax.couplings.rotations import rotation_matrix as rotation_matrix
from fvjax.couplings.transport import assignment as assignment
from fvjax.couplings.transport import minibatch_ot as minibatch_ot
from fvjax.couplings.transport import sinkhorn_plan as sinkhorn_plan
