"""`audit`: everything that this library can tell of a velocity field and its pairs, in one call."""

from collections.abc import Callable
from typing import Any

import jax

from fvjax.auditing import _inputs, _solvers
from fvjax.auditing._inputs import Field
from fvjax.auditing._result import Audit
from fvjax.auditing._run import Keys, Plan, run
from fvjax.interpolants import Interpolant, linear
from fvjax.types import Key, Pair, Params, VelocityField


def audit(
    field: VelocityField,
    params: Params,
    pairs: Pair,
    *,
    key: Key,
    interpolant: Interpolant | None = None,
    held_out: Any = None,
    ot_targets: Any = None,
    solver: str = "dopri5",
    steps: int | None = None,
    sources: int = 512,
    draws: int = 2048,
    bins: int = 8,
    level: float = 0.95,
    euler_steps: tuple[int, int] = (51, 50),
    progress: Callable[[str, float], None] | None = None,
) -> Audit:
    r"""Audits a velocity field and the pairs it was trained on: has it learned a map, or stored the list?

    Pair memorization is decided by r, the share of training sources whose nearest target among ALL training targets is
    their own, by the same share of held-out pairs (own target among training and held-out targets), and their Wilson
    intervals at `level`:

    ========================================================  ==========================================================
    r above 1/2, held-out share above 1/2                     "follows a rule": the pairing is a function that carries
                                                              to new sources. Whether it is the optimal map is for
                                                              `ot_targets` to say
    r above 1/2, held-out share below 1/2                     "memorizes"
    r below 1/2                                               "lets go"
    r above 1/2 without 20 or more held-out PAIRS             "undecided"; the reason says what to give
    an interval that contains 1/2; most solves failed         "undecided"
    ========================================================  ==========================================================

    "Above" means the lower limit of the interval, "below" the upper one. In one and two dimensions thousands of targets
    lie closer together than any network is exact, and the nearest one is too fine a question. Therefore, where the
    share is not above 1/2, a source counts as found if its own target is among the nearest 1% of all (with 100 targets
    or fewer that is the nearest one); "memorizes" and "lets go" need both shares below 1/2, and `criterion` says which
    one decided.

    Data memorization is another question: whether samples, whichever source they came from, are copies of training
    targets (nearest one closer than 1/3 of the second nearest). Samples come from held-out sources, without any from
    training sources, which is said. It "memorizes" if the share is above 1/2 and above what the held-out targets
    themselves have (without them 3^-d), and "does not" if it is below 1/2 and its interval reaches down to that share,
    or to 10%.

    ==============================  ====================================================================================
    N = 2, 3                        "undecided": Wilson's lower limit stays below 1/2, and chance returns 1/N anyway
    equal targets                   count as one; arriving at a copy is a return; the report gives their number
    pairs redrawn at every step     pass one draw of them: r is near 1/N, "lets go". Only data memorization can happen
    a failed solve                  that source counts as not returned
    velocities not finite           ValueError, at points of the training paths
    gamma(0) > 0                    the flow starts at x0 itself, not at x0 + gamma(0) z
    ==============================  ====================================================================================

    Pairs are read in chunks of at most 8192 rows and 2^22 numbers, once from start to end and in some thousand drawn
    rows, so that memory-mapped arrays and files of HDF5 may be larger than the memory; an array in memory gives the
    same bits. The one pass finds nearest targets (by float32 products, then float64 differences of the 8 best), the
    exact minimiser at 512 points, and the spacing of midpoints. What would need all pairs at once (identifiability,
    the measured sigma_critical) takes 4096 random ones.

    A small network costs 20 s on 2 CPU cores, of which 19 compile; the next audit of the same field, shapes and solver
    takes a second.

        audit = fvjax.audit(model.apply, params, pairs, key=key, held_out=held_out_pairs)           # Linen, plain JAX
        audit = fvjax.audit(lambda net, t, x: net(t, x), net, pairs, key=key)                          # Equinox
        graph, state = nnx.split(net)                                                                   # Flax NNX
        audit = fvjax.audit(lambda state, t, x: nnx.merge(graph, state)(t, x), state, pairs, key=key)

    Args:
        field: (params, t [], x [*dims]) -> velocity [*dims] of ONE example. It is given t and x in the floating dtype
            of the pairs, at least float32; velocities are cast to it.
        params: any pytree, also of arrays beside other things (an Equinox module); None or () if the field has none.
            The gradient is that of its floating-point arrays.
        pairs: the training pairs, x0 and x1 [N, *dims] each, N >= 2, floating point: of JAX, numpy, or anything with
            shape, dtype and row slicing (by slices and by ascending integer arrays).
        key: typed PRNG key; the audit is a function of it and of its arguments.
        interpolant: of the training; None means `linear()`.
        held_out: pairs of the same coupling that were not trained on, or an array of sources alone, or None.
        ot_targets: the optimal-transport targets of pairs.x0, [N, *dims], or None.
        solver: of the verdicts, as in `fvjax.transport`. Beside it run Euler with `euler_steps` and, if it is not
            adaptive, dopri5.
        steps: of the solver; None for an adaptive one.
        sources: training sources that are carried, and held-out ones; at most all.
        draws: path samples for the gradient, >= 2.
        bins: of t for the gradient.
        level: of all intervals, in (0, 1).
        euler_steps: an odd and an even number.
        progress: called as progress(stage, done) with done in [0, 1].

    Returns:
        Audit.

    Raises:
        ValueError: before anything heavy runs, for shapes, dtypes, keys, solvers or numbers outside of the above, a
            field that does not map one example to its like, and nan or infinity in arrays of up to 2^24 numbers
            (larger ones: when they are read) or in the velocities on training paths.

    Source: Reu et al. 2025 for pair memorization, Yoon et al. 2023 for the ratio 1/3, Wilson 1927; docs/theory.md,
    section 8, for the exact minimiser and sigma_critical.
    """
    _inputs.check_key(key)
    solvers = _solvers.chosen_solvers(solver, steps, euler_steps)
    _inputs.check_numbers(sources=sources, draws=draws, bins=bins)
    if draws < 2:
        raise ValueError(f"draws must be >= 2 (one has no variance), got {draws}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    interpolant = linear() if interpolant is None else interpolant
    if not isinstance(interpolant, Interpolant):
        raise ValueError(f"interpolant must be an fvjax.Interpolant or None, got {type(interpolant).__name__}")
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be callable as progress(stage, done) or None, got {progress!r}")
    given = _inputs.checked_inputs(pairs, held_out, ot_targets)
    wrapped = Field.of(field, params)
    _inputs.check_field(wrapped, given.dims, given.dtype)
    keys = Keys(*jax.random.split(key, len(Keys._fields)))
    tell = progress if progress is not None else _silent
    return run(Plan(wrapped, given, interpolant, solvers, sources, draws, bins, level, keys, tell))


def _silent(stage: str, done: float) -> None:
    del stage, done
