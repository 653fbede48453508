"""What an audit found, as frozen dataclasses of plain numbers: nothing here computes.

None stands for a number that does not exist (a standard deviation of one example, a variance without parameters).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """A share of `count` cases in [0, 1] with its Wilson interval [low, high], which has a width at 0 and at 1, too."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Distances:
    """Euclidean distances over examples, in units of x: mean, standard deviation (ddof = 1), median, and quantiles.

    `quantiles` are those at 0, 2, 4, ..., 100 per cent, for a distribution function. Numbers are None where no example
    was finite.
    """

    mean: float | None
    standard_deviation: float | None
    median: float | None
    count: int
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Arrivals:
    """Where sources arrived, against their own target and against all others.

    Attributes:
        returned: share whose nearest target is their own. Equal targets count as one.
        among_nearest: share whose own target is among the nearest 1% of the targets (at least the nearest one).
        to_own: distance to the own target (pair L2).
        to_other: distance to the nearest target that is not equal to the own one.
        targets: how many targets were compared with.
        failed: sources whose solve did not stay finite; they count as not returned.
    """

    returned: Share
    among_nearest: Share
    to_own: Distances
    to_other: Distances
    targets: int
    failed: int


@dataclass(frozen=True)
class PairMemorization:
    """Does the flow return each training source to its own target, and is that memory or a rule?

    Attributes:
        verdict: "memorizes", "follows a rule", "lets go" or "undecided".
        reason: the same in a sentence.
        criterion: what decided, "nearest" or "nearest 1%" (see `fvjax.audit`).
        training: the training sources among all training targets.
        held_out: the held-out pairs among all training and held-out targets, or None.
    """

    verdict: str
    reason: str
    criterion: str
    training: Arrivals
    held_out: Arrivals | None


@dataclass(frozen=True)
class DataMemorization:
    """Are samples copies of training targets, whichever source they came from?

    Attributes:
        verdict: "memorizes", "does not" or "undecided".
        reason: the same in a sentence.
        fraction: share of samples nearer to one training target than `ratio` times the second nearest.
        ratio: 1/3.
        sources: what the samples were made of, "held-out" or "training".
        chance: the share that new data would have: of the held-out targets where they were given, else ratio^d.
        chance_from: "held-out targets" or "ratio^d".
    """

    verdict: str
    reason: str
    fraction: Share
    ratio: float
    sources: str
    chance: Share
    chance_from: str


@dataclass(frozen=True)
class SolverRow:
    """One solver on the training sources; `steps` is None for an adaptive one."""

    name: str
    solver: str
    steps: int | None
    chosen: bool
    returned: Share
    pair_l2: float | None
    failed: int


@dataclass(frozen=True)
class SolverSensitivity:
    """The same sources with several solvers.

    Attributes:
        rows: one a solver.
        largest_disagreement: over sources and pairs of solvers, of |x_a(1) - x_b(1)|, in units of x.
        median_disagreement: the median over sources of the largest over pairs of solvers.
        depends: whether the returned share is above 1/2 with one solver and below with another.
    """

    rows: tuple[SolverRow, ...]
    largest_disagreement: float | None
    median_disagreement: float | None
    depends: bool


@dataclass(frozen=True)
class TimeBin:
    """Gradient variance of the draws with start <= t < end; `noise_scale` is None where the mean is not resolved."""

    start: float
    end: float
    draws: int
    variance: float | None
    noise_scale: float | None


@dataclass(frozen=True)
class Layer:
    """Gradient variance of the parameters of one layer (the leaves that share all but the last part of their name)."""

    name: str
    parameters: int
    variance: float
    noise_scale: float | None


@dataclass(frozen=True)
class GradientVariance:
    """Variance of the gradient of the squared error (sum over dimensions) of one draw, over draws of the pairs.

    Attributes:
        variance: tr Cov(g), unbiased; a batch of B draws divides it by B.
        noise_scale: tr Cov(g) / |E g|^2, in examples; None where |E g|^2 is not resolved: from `draws` examples on.
        mean_square: |E g|^2, unbiased; None where it came out <= 0.
        draws: number of path samples.
        parameters: number of floating-point parameters.
        by_time: by bin of t.
        by_layer: by layer, in the order of the params.
    """

    variance: float
    noise_scale: float | None
    mean_square: float | None
    draws: int
    parameters: int
    by_time: tuple[TimeBin, ...]
    by_layer: tuple[Layer, ...]


@dataclass(frozen=True)
class Perplexity:
    """Mean number of pairs that a point x_t could have come from, at time `t` and (rms over t) noise `sigma`."""

    t: float
    sigma: float
    perplexity: float
    standard_error: float


@dataclass(frozen=True)
class Identifiability:
    """Does (x_t, t) still name its pair?

    Attributes:
        by_time: at several t with the interpolant of the audit.
        by_sigma: at t = 1/2 with constant noise of several sigma.
        pairs: how many (random) pairs were compared with.
        of: how many there are. With pairs < of the perplexity is a lower bound, up to the factor of / pairs.
    """

    by_time: tuple[Perplexity, ...]
    by_sigma: tuple[Perplexity, ...]
    pairs: int
    of: int


@dataclass(frozen=True)
class CriticalNoise:
    """The constant noise at which the exact minimiser of the pairs lets half of them go, in units of x.

    Attributes:
        measured: along the minimiser's flow; None where it would cost too much.
        measured_pairs: of how many (random) pairs; None without `measured`.
        predicted: from the spacing of midpoints alone.
        low: of the range of the prediction.
        high: of the range of the prediction.
        spacing: median distance between nearest midpoints.
        predicted_pairs: of how many pairs.
        interpolant: root mean square over t of gamma(t) of the audited interpolant, to compare with.
    """

    measured: float | None
    measured_pairs: int | None
    predicted: float
    low: float
    high: float
    spacing: float
    predicted_pairs: int
    interpolant: float

    @property
    def best(self) -> float:
        """The measured one where it is of all pairs, else the predicted one."""
        if self.measured is not None and self.measured_pairs == self.predicted_pairs:
            return self.measured
        return self.predicted


@dataclass(frozen=True)
class VelocityDistance:
    """Relative L2 distances sqrt(mean |a - b|^2 / mean |b|^2) of velocities over `draws` points (t, x_t).

    Attributes:
        to_minimiser: of the audited field to the exact minimiser.
        to_target: of the audited field to the target velocity u_t; None where the points have no target.
        minimiser_to_target: of the exact minimiser to u_t; what no field can be below on the training pairs.
        draws: number of points.
    """

    to_minimiser: float | None
    to_target: float | None
    minimiser_to_target: float | None
    draws: int


@dataclass(frozen=True)
class MinimiserDistance:
    """Is the field just the exact minimiser of its pairs?

    Attributes:
        reference: "exact minimiser" (gamma > 0) or "memorizing field" (gamma = 0).
        training: at x_t of training pairs.
        held_out: at x_t of held-out pairs, or between held-out sources and where the flow takes them; or None.
    """

    reference: str
    training: VelocityDistance
    held_out: VelocityDistance | None


@dataclass(frozen=True)
class Straightness:
    """S = E int |x(1) - x(0) - v|^2 dt in units of x squared, its standard error, and S / E|x(1) - x(0)|^2."""

    mean: float | None
    standard_error: float | None
    relative: float | None
    count: int


@dataclass(frozen=True)
class OptimalTransport:
    """Training sources against given optimal-transport targets.

    Attributes:
        to_optimal: distance to the source's optimal target.
        closer: share of the sources that arrive nearer to it than to their own pair, where the two differ.
        same: sources whose own target is the optimal one; they are not in `closer`.
    """

    to_optimal: Distances
    closer: Share
    same: int


@dataclass(frozen=True)
class Settings:
    """What was audited and how.

    Attributes:
        pairs: number of training pairs N.
        dims: shape of one example.
        dtype: in which the field was evaluated.
        distinct_targets: number of different training targets.
        spread: root mean square distance of training targets from their mean.
        target_spacing: median distance of a training target to the nearest different one; None if all are equal.
        held_out: "pairs", "sources" or "none".
        held_out_count: how many were given.
        sources: training sources that were carried.
        held_out_sources: held-out sources that were carried.
        draws: path samples.
        solver: of the verdicts.
        steps: of the solver; None for an adaptive one.
        level: of the intervals.
        interpolant: description, such as "constant noise, rms gamma 0.05".
    """

    pairs: int
    dims: tuple[int, ...]
    dtype: str
    distinct_targets: int
    spread: float
    target_spacing: float | None
    held_out: str
    held_out_count: int
    sources: int
    held_out_sources: int
    draws: int
    solver: str
    steps: int | None
    level: float
    interpolant: str
