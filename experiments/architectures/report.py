"""What a run leaves behind: results.json, tables as CSV and on the terminal, figures, and what the numbers say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.architectures.digits import MINIMISER
from experiments.architectures.gaussian_task import EXACT
from experiments.architectures.networks import Row
from experiments.architectures.page import make_page
from experiments.common import RunFolder, table
from experiments.plots import architectures as plots

WIDER = 4
"""Factor in width with which the factor in steps is compared."""


def write(folder: RunFolder, content: dict[str, Any]) -> None:
    """Adds the fits and the conclusions to `content`, writes everything into `folder` and prints the tables."""
    gaussian, digits = content.get("gaussian"), content.get("digits")
    sentences: list[str] = []
    if gaussian is not None:
        gaussian["fits"] = fits(gaussian["rows"], gaussian["steps"])
        gaussian["longer"] = longer(gaussian["rows"], gaussian["steps"])
        sentences += gaussian_conclusions(gaussian)
    if digits is not None:
        sentences += digits_conclusions(digits)
    content["conclusions"] = sentences
    parts = [part for part in (gaussian, digits) if part is not None]
    folder.write_json("results.json", content)
    folder.write_csv("rows.csv", [row for part in parts for row in part["rows"]])
    if gaussian is not None:
        title = (
            f"x1 = mu + A x0 in {gaussian['dim']} dimensions, {gaussian['angle']:g} degrees, batch {gaussian['batch']}"
        )
        figure = plots.gaussian_residuals(gaussian["rows"], gaussian["profile"], steps=gaussian["steps"], title=title)
        folder.write_figure("gaussian", figure, [*gaussian["rows"], *gaussian["profile"]])
        _print_gaussian(gaussian)
    if digits is not None:
        title = f"{digits['pairs']} shuffled pairs of digits, batch {digits['batch']}; flows: {digits['solver']}"
        if digits["training"]:
            figure = plots.digits_curves(digits["rows"], digits["training"], title=title)
            folder.write_figure("digits", figure, digits["training"])
        _print_digits(digits)
    folder.write_report(make_page(folder, content))
    print("\nwhat the numbers say")
    print("\n".join(f"- {sentence}" for sentence in sentences) + "\n")


def fits(rows: Sequence[Row], steps: int) -> list[Row]:
    """Slopes of log residual against log width (each depth), log depth (each width) and log parameters (each network).

    Least squares over networks of equal `steps`, three sizes at least; with its standard error, which tells how far
    from a power law the points are, not what another seed would give.
    """
    equal = [row for row in rows if row["steps"] == steps]
    mlps = [row for row in equal if row["network"] == "mlp"]
    groups = [("mlp", "width", f"depth {d}", _where(mlps, depth=d)) for d in _values(mlps, "depth")]
    groups += [("mlp", "depth", f"width {w}", _where(mlps, width=w)) for w in _values(mlps, "width")]
    names = dict.fromkeys(row["network"] for row in equal)
    groups += [(name, "parameters", "all sizes", _where(equal, network=name)) for name in names]
    found = []
    for network, against, fixed, chosen in groups:
        if len({row[against] for row in chosen}) >= 3:
            line = stats.linregress(*(np.log([row[key] for row in chosen]) for key in (against, "residual")))
            named = {"network": network, "against": against, "fixed": fixed, "points": len(chosen), "steps": steps}
            found.append(named | {"slope": float(line.slope), "standard_error": float(line.stderr)})
    return found


def longer(rows: Sequence[Row], steps: int) -> list[Row]:
    """What more steps gain for the networks that were trained for two numbers of them, and what more width gains.

    `gain_steps` is the residual divided by that after more steps. `gain_width` is that of `WIDER` times the width at
    equal `steps`: of the step up from this network, or, for the widest ones, of the last step up to it; None where the
    grid has no such network. `gains_more` is "width" or "steps".
    """
    known = {(row["width"], row["depth"]): row for row in rows if row["network"] == "mlp" and row["steps"] == steps}
    found = []
    for row in rows:
        if row["network"] != "mlp" or row["steps"] == steps:
            continue
        width, depth = row["width"], row["depth"]
        short, wide, narrow = (known.get((w, depth)) for w in (width, width * WIDER, width // WIDER))
        if short is None:
            continue
        ends = (short, wide) if wide else (narrow, short) if narrow else None
        gain_steps = short["residual"] / row["residual"]
        gain_width = ends[0]["residual"] / ends[1]["residual"] if ends and ends[0] and ends[1] else None
        named = {"name": row["name"], "steps": steps, "longer": row["steps"], "gain_steps": gain_steps}
        widths = [end["width"] for end in ends if end] if ends else None
        more = None if gain_width is None else "width" if gain_width > gain_steps else "steps"
        found.append(named | {"gain_width": gain_width, "widths": widths, "gains_more": more})
    return found


def gaussian_conclusions(part: Mapping[str, Any]) -> list[str]:
    """Sentences about part A, made of its numbers."""
    rows, steps = part["rows"], part["steps"]
    equal = [row for row in rows if row["steps"] == steps]
    networks = [row for row in equal if row["network"] not in {"affine", EXACT}]
    sentences = []
    for fit in part["fits"]:
        sentences.append(
            f"{fit['network']}, {fit['fixed']}: residual ~ {fit['against']}^({fit['slope']:.2f} +- "
            f"{fit['standard_error']:.2f}) over {fit['points']} sizes, {steps} steps"
        )
    for row in part["longer"]:
        factor = row["longer"] // row["steps"]
        text = f"{row['name']}: {factor} times the steps divide the residual by {row['gain_steps']:.2f}"
        if row["gains_more"]:
            first, last = row["widths"]
            text += f", width {first} -> {last} by {row['gain_width']:.2f}: {row['gains_more']} gains more"
        sentences.append(text)
    if networks:
        best = min(networks, key=lambda row: row["residual"])
        sentences.append(
            f"smallest residual of a network after {steps} steps: {best['name']} ({best['parameters']} parameters),"
            f" {best['residual']:.2g} of E|u|^2, worst at t = {best['worst_t']:.2f}"
            f" (I + t (A - I) is nearest to singular at t = {part['ill_conditioned_t']:.2f})"
        )
        for affine in _where(equal, network="affine"):
            sentences.append(
                f"the affine field, {affine['parameters']} parameters, after as many steps: {affine['residual']:.2g};"
                f" that network's is {best['residual'] / affine['residual']:.2g} times this"
            )
    for exact in _where(rows, network=EXACT):
        sentences.append(f"the affine field in closed form: {exact['residual']:.1g}, rounding")
    return sentences


def digits_conclusions(part: Mapping[str, Any]) -> list[str]:
    """Sentences about part B: for every sigma, whose flow ends nearer to the shuffled target than to the OT target."""
    sentences = []
    for sigma in _values(part["rows"], "sigma"):
        memorizing: list[str] = []
        others: list[str] = []
        for row in _where(part["rows"], sigma=sigma):
            if row["network"] == MINIMISER:
                place = f"exact minimiser {row['l2_shuffled_mean']:.2f}/{row['l2_ot_mean']:.2f}"
            else:
                place = f"{row['name']} {row['l2_shuffled_mean']:.2f}/{row['l2_ot_mean']:.2f} ({row['steps']} steps"
                place += ")" if row["crossing_step"] is None else f", crossing at {row['crossing_step']})"
            (memorizing if row["l2_shuffled_mean"] < row["l2_ot_mean"] else others).append(place)
        sentences.append(
            f"sigma = {sigma:g}, L2 to shuffled/OT: nearer to the shuffled target {', '.join(memorizing) or 'none'};"
            f" nearer to the OT target {', '.join(others) or 'none'}"
        )
    return sentences


def _print_gaussian(part: Mapping[str, Any]) -> None:
    ill, smallest = part["ill_conditioned_t"], part["smallest_singular_value"]
    print(
        f"\ngaussian pairs: E|v - v*|^2 / E|u|^2 on held-out paths, E|u|^2 = {part['scale']:.4g}; its worst time, and"
    )
    print(f"t = {ill:.2f} where I + t (A - I) is nearest to singular (smallest singular value {smallest:.2f});")
    print(f"L2 of the flow's ends to their pairs by {part['solvers']}; variance: of the gradient of one draw")
    columns = {
        "name": ("network", ""),
        "parameters": ("params", ""),
        "steps": ("steps", ""),
        "residual": ("residual", ".2e"),
        "residual_error": ("+-", ".1e"),
        "worst_t": ("worst t", ".2f"),
        "worst_residual": ("there", ".2e"),
        "ill_conditioned_residual": ("ill-cond.", ".2e"),
        "l2_euler_mean": ("L2 euler", ".4f"),
        "l2_dopri5_mean": ("L2 dopri5", ".4f"),
        "gradient_variance": ("variance", ".2e"),
        "gradient_variance_exact": ("exact var.", ".2e"),
        "loss": ("loss", ".2e"),
        "seconds": ("seconds", ".0f"),
    }
    print(_table(part["rows"], columns))


def _print_digits(part: Mapping[str, Any]) -> None:
    base = part["baselines"]
    print(
        "\nshuffled digits: mean L2 of the flow's ends to the shuffled and the optimal target; held-out to the optimal;"
    )
    print("crossing: first point of the curve that is nearer to the shuffled target (sources stay where they are:")
    print(
        f"{base['l2_identity_to_shuffled']:.2f}/{base['l2_identity_to_ot']:.2f}; shuffled to optimal target:", end=" "
    )
    print(f"{base['l2_shuffled_to_ot']:.2f})")
    columns = {
        "name": ("network", ""),
        "parameters": ("params", ""),
        "sigma": ("sigma", "g"),
        "steps": ("steps", ""),
        "loss": ("loss", ".4f"),
        "l2_shuffled_mean": ("shuffled", ".3f"),
        "l2_ot_mean": ("OT", ".3f"),
        "l2_held_out_ot_mean": ("held-out OT", ".3f"),
        "crossing_step": ("crossing", ""),
        "gradient_variance": ("variance", ".2e"),
        "gradient_noise_scale": ("noise scale", ".0f"),
        "sigma_c_predicted": ("sigma_c", ".2f"),
        "seconds": ("seconds", ".0f"),
    }
    print(_table(part["rows"], columns))


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """Columns under shorter names than the rows have."""
    named = [{title: row.get(key) for key, (title, _) in columns.items()} for row in rows]
    return table(named, dict(columns.values()))


def _where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})
