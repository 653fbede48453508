r"""Exact per-example gradient norms and moments of ANY JAX function, for about the price of one gradient.

The loss of one example is traced; a *site* is an equation where a value that depends on params alone meets data. One
backward pass over the batch gives the cotangents at all sites, and from these the gradient of every example follows
site by site:

=================================  =================================================================================
params meet data in                the gradient of one example
=================================  =================================================================================
a dot product, one row of data     x^T y; norms and moments follow from the rows themselves ("outer products")
a dot product, few rows            sum_l x_l^T y_l; its norm from two Gram matrices ("outer products")
a dot product, many rows           one matrix product an example, reduced at once ("outer products")
a convolution                      the patches of one image times its cotangent, reduced at once ("image patches")
a lookup of whole rows             a few rows of the table; equal ones are added first ("rows of a table")
a derivative rule of its own       its traced derivative, if that ends in a product ("outer products")
anything else                      `jax.vjp` of that one equation ("vjp of add", "vjp of cond", ...)
=================================  =================================================================================

Kernels that are concatenated, or multiplied by constants (scales, masks), are handled as they are. A parameter that is
used at several sites, or through a computation (weight standardisation, weight decay), has its gradients added, example
by example, before they are squared. Where a fast way would lose digits to cancellation, a slower one is taken.
`verify` compares some gradients with `vmap(grad)`. Theory, costs and limits: docs/theory.md, section 7.
"""

from fvjax.sites._api import DisagreementError as DisagreementError
from fvjax.sites._api import DisagreementWarning as DisagreementWarning
from fvjax.sites._api import Paths as Paths
from fvjax.sites._api import SlowPathWarning as SlowPathWarning
from fvjax.sites._api import SquareNorms as SquareNorms
from fvjax.sites._api import moments as moments
from fvjax.sites._api import moments_and_flag as moments_and_flag
from fvjax.sites._api import paths as paths
from fvjax.sites._api import square_norms as square_norms
from fvjax.sites._api import verify as verify
from fvjax.sites._api import with_care as with_care

__all__ = [
    "DisagreementError",
    "DisagreementWarning",
    "Paths",
    "SlowPathWarning",
    "SquareNorms",
    "moments",
    "moments_and_flag",
    "paths",
    "square_norms",
    "verify",
    "with_care",
]
