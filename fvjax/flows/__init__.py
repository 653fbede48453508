r"""Transport along the flow dx/dt = v(x, t) of a velocity field, its trajectories, their straightness; and diffusions.

Every function here takes ONE example; the caller vmaps:

    jax.jit(jax.vmap(lambda x: transport(field, params, x, solver="euler", steps=100)))(x0)          # x0 [n, *dims]

===================  =======================================================================================
vmap over x0         every example has its OWN error norm and step sizes, as if it were alone; the batch runs
                     until its slowest example is done
batch as one state   `def batch_field(params, t, x): return jax.vmap(field, (None, None, 0))(params, t, x)`,
                     defined once, then `transport(batch_field, params, x0)`: all examples share ONE
                     root-mean-square error norm and ONE sequence of steps
===================  =======================================================================================

With fixed `steps` the two agree to rounding. With tolerances the shared norm lets a hard example hide among easy ones,
by up to sqrt(n): with dopri5 at 1e-5 and one of 1000 examples turning 31 times faster than the others, its error was
1.3e-2, against 3.3e-4 under vmap. The shared norm took a tenth of the time there, where the field costs nothing; with
an MLP of width 64 or 256 it took 1/2.3 or 1/1.3 of it (2 CPU cores).

A diffusion dX = f(X, t) dt + sigma dB is drawn by `diffuse`, with fixed steps and with a key for each example.
"""

from fvjax.flows._diffusion import DIFFUSION_SOLVERS as DIFFUSION_SOLVERS
from fvjax.flows._diffusion import diffuse as diffuse
from fvjax.flows._diffusion import diffusion_path as diffusion_path
from fvjax.flows._solve import EVALUATIONS as EVALUATIONS
from fvjax.flows._solve import MAX_STEPS as MAX_STEPS
from fvjax.flows._solve import SOLVERS as SOLVERS
from fvjax.flows._solve import TOLERANCE as TOLERANCE
from fvjax.flows._solve import SolverOptions as SolverOptions
from fvjax.flows._transport import Counted as Counted
from fvjax.flows._transport import counted_transport as counted_transport
from fvjax.flows._transport import straightness as straightness
from fvjax.flows._transport import trajectory as trajectory
from fvjax.flows._transport import transport as transport
