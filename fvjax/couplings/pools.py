"""The Schroedinger coupling of whole data sets, batch by batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fvjax import _validate
from fvjax.couplings._sinkhorn import (
    SINKHORN_MAX_ITERATIONS,
    SINKHORN_THRESHOLD,
    check_noise,
    checked_clouds,
    draw_columns,
    sinkhorn_options,
    solve,
)
from fvjax.types import Array, Key, Scalar


class Partners(NamedTuple):
    """Which x1 each x0 is joined with, and how well Sinkhorn did.

    Attributes:
        indices: into x1, int[n].
        error: the largest L1 error of a batch's marginals (their mass is 1), []; nan if one diverged.
        converged: share of the batches whose error fell below the threshold, [].
    """

    indices: Array
    error: Array
    converged: Array


def entropic_partners(
    key: Key,
    x0: Array,
    x1: Array,
    *,
    sigma: Scalar,
    batch: int,
    replace: bool = True,
    max_iterations: int = SINKHORN_MAX_ITERATIONS,
    threshold: Scalar = SINKHORN_THRESHOLD,
) -> Partners:
    r"""Partners from the Schroedinger bridge's plan between random batches of two data sets: the coupling of SB-CFM.

        partners = entropic_partners(key, x0, x1, sigma=0.5, batch=256)
        pairs = Pair(x0, x1[partners.indices])
        if partners.converged < 1: ...                                    # say so, with partners.error

    Both data sets are cut into batches at random, whatever their order. Each batch is a problem of its own, solved as
    by `sinkhorn_plan(sigma=sigma)`, one after the other in one program of batch^2 memory.

    ==================  ===========================================================================================
    replace = True      every x0 draws from its own row of the plan: the pairs have the law of the plan; an x1 may
                        repeat, or be left out (of its batch a share of up to 1/e)
    replace = False     a permutation: every x1 is used once, and the last rows to draw take what is left (see
                        `minibatch_ot`)
    a finite batch      the pairs are less correlated than the bridge's: no target of the batch lies at the right place.
                        N(-.1, I) to N(.1, I), d = 5, sigma = 1, Cov(x0, x1) = .562, .601, .613 (+- .003) for batches of
                        64, 256, 1024, with replace = False .528, .583, .604, and .618 in the limit. State the batch
    a small sigma       more iterations: there, in one batch of 256, up to 10, 50, 500, 2000, 3000, 20,000 at sigma = 1,
                        .5, .2, .1, .05, .02. At .05 none of 8 batches converged within the default of 2000 (error
                        1.1e-2), all within 10,000
    ==================  ===========================================================================================

    Args:
        key: PRNG key of the batches and the draws.
        x0: source samples, [n, *dims].
        x1: target samples, [n, *dims].
        sigma: scale of the Brownian motion in units of x, > 0, shape [], may be traced.
        batch: points in a batch, a divisor of n (static).
        replace: see above (static).
        max_iterations: of each batch (static).
        threshold: L1 error of the marginals at which a batch stops, > 0.

    Returns:
        Partners; nothing is warned about here, look at `converged` and `error`.

    Raises:
        ValueError: if an option is out of range, `batch` does not divide n, the shapes of x0 and x1 differ, n = 0, or
            an entry is concrete and not finite.

    Source: Tong et al. 2024 (SB-CFM).
    """
    if not isinstance(replace, bool):
        raise ValueError(f"replace must be True or False, got {replace!r}")
    check_noise(sigma)
    options = sinkhorn_options(epsilon=None, sigma=sigma, max_iterations=max_iterations, threshold=threshold)
    x0, x1 = checked_clouds(x0, x1)
    _validate.positive_integer("batch", batch)
    if len(x0) % batch:
        raise ValueError(f"batch must divide the number of examples, {len(x0)}, got {batch}")
    return _partners(key, x0, x1, batch=int(batch), replace=replace, **options)


@functools.partial(jax.jit, static_argnames=("batch", "replace", "max_iterations"))
def _partners(
    key: Key,
    x0: Array,
    x1: Array,
    *,
    batch: int,
    replace: bool,
    epsilon: None,
    sigma: Scalar,
    max_iterations: int,
    threshold: Scalar,
) -> Partners:
    source_key, target_key, draw_key = jax.random.split(key, 3)
    rows = jax.random.permutation(source_key, len(x0)).reshape(-1, batch)
    columns = jax.random.permutation(target_key, len(x1)).reshape(-1, batch)

    def join(part: tuple[Key, Array, Array]) -> tuple[Array, Array, Array]:
        key, row, column = part
        plan = solve(
            x0[row], x1[column], epsilon=epsilon, sigma=sigma, max_iterations=max_iterations, threshold=threshold
        )
        return column[draw_columns(key, plan.log_plan, replace=replace)], plan.error, plan.converged

    keys = jax.random.split(draw_key, len(rows))
    found, errors, converged = jax.lax.map(join, (keys, rows, columns))
    indices = jnp.zeros_like(rows.ravel()).at[rows.ravel()].set(found.ravel())
    return Partners(indices, jnp.max(errors), jnp.mean(converged))
