"""The memorization audit: does MY flow learn a map, or memorize its pairs?

    audit = fvjax.audit(field, params, pairs, key=key, held_out=held_out_pairs)
    print(audit)                                # the verdict in words, with the numbers behind it
    audit.to_html("audit.html")                 # one page with figures
    audit.pair_memorization.verdict             # "memorizes", "follows a rule", "lets go" or "undecided"

`save_flow` keeps a network with its pairs in a folder that the command `fvjax audit` reads.
"""

from fvjax.auditing._audit import audit as audit
from fvjax.auditing._result import Audit as Audit
from fvjax.auditing._saved import Flow as Flow
from fvjax.auditing._saved import load_flow as load_flow
from fvjax.auditing._saved import save_flow as save_flow
from fvjax.auditing._types import Arrivals as Arrivals
from fvjax.auditing._types import CriticalNoise as CriticalNoise
from fvjax.auditing._types import DataMemorization as DataMemorization
from fvjax.auditing._types import Distances as Distances
from fvjax.auditing._types import GradientVariance as GradientVariance
from fvjax.auditing._types import Identifiability as Identifiability
from fvjax.auditing._types import Layer as Layer
from fvjax.auditing._types import MinimiserDistance as MinimiserDistance
from fvjax.auditing._types import OptimalTransport as OptimalTransport
from fvjax.auditing._types import PairMemorization as PairMemorization
from fvjax.auditing._types import Perplexity as Perplexity
from fvjax.auditing._types import Settings as Settings
from fvjax.auditing._types import Share as Share
from fvjax.auditing._types import SolverRow as SolverRow
from fvjax.auditing._types import SolverSensitivity as SolverSensitivity
from fvjax.auditing._types import Straightness as Straightness
from fvjax.auditing._types import TimeBin as TimeBin
from fvjax.auditing._types import VelocityDistance as VelocityDistance
