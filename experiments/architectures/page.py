"""The page of the architectures side by side: what their numbers say, tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.architectures.digits import MINIMISER
from experiments.architectures.gaussian_task import EXACT
from experiments.architectures.networks import Row
from experiments.common import RunFolder
from experiments.report import tabled
from fvjax.report import Page, Section, Sentence

REACHED = 10.0
"""A network reaches the affine field if its residual is at most so many times that of the trained affine field."""


def sentences(content: Mapping[str, Any]) -> list[Sentence]:
    """What the numbers of a run say, each with its evidence."""
    gaussian, digits = content.get("gaussian"), content.get("digits")
    return [*(_gaussian(gaussian) if gaussian else []), *(_digits(digits) if digits else [])]


def headline(content: Mapping[str, Any]) -> str:
    """One sentence for the whole run."""
    parts = []
    if content.get("gaussian"):
        networks = _networks(content["gaussian"])
        if networks:
            best = min(networks, key=lambda row: row["residual"])
            parts.append(f"the best network, {best['name']}, misses Lemma 1's field by {best['residual']:.2g} of E|u|²")
    if content.get("digits"):
        for sigma, rows in _by_sigma(content["digits"]):
            names = [row["name"] for row in rows if row["network"] != MINIMISER and _memorizes(row)]
            parts.append(f"shuffled digits are memorized at sigma = {sigma:g} by {report.joined(names)}")
    text = "; ".join(parts) or "closed forms alone"
    return f"{text[0].upper()}{text[1:]}."


def _networks(part: Mapping[str, Any]) -> list[Row]:
    """Those that were trained for the run's number of steps."""
    return [row for row in part["rows"] if row["network"] not in {"affine", EXACT} and row["steps"] == part["steps"]]


def _gaussian(part: Mapping[str, Any]) -> list[Sentence]:
    found, networks = [], _networks(part)
    affine = next((row for row in part["rows"] if row["network"] == "affine"), None)
    if networks:
        best, worst = (choose(networks, key=lambda row: row["residual"]) for choose in (min, max))
        evidence = (
            f"{best['parameters']} parameters, {best['steps']} steps, worst at t = {best['worst_t']:.2f};"
            f" {worst['name']} {worst['residual']:.2g}"
        )
        text = f"The best of {len(networks)} networks on x1 = mu + A x0, {best['name']}, has a residual of"
        text += f" {best['residual']:.2g}"
        if affine is None:
            found.append(Sentence(f"{text} E|u|².", "info", evidence))
        else:
            reached = best["residual"] <= REACHED * affine["residual"]
            text += f" E|u|², the trained affine field {affine['residual']:.2g}:"
            text += " it reaches that field." if reached else " it does not reach that field."
            evidence += f"; called reached up to {REACHED:g} times the affine field's"
            found.append(Sentence(text, "good" if reached else "bad", evidence))
    for fit in part["fits"]:
        text = (
            f"{fit['network']}, {fit['fixed']}: the residual goes like {fit['against']}^{fit['slope']:.2f}"
            f" (± {fit['standard_error']:.2f})."
        )
        found.append(Sentence(text, "info", f"least squares over {fit['points']} sizes, {fit['steps']} steps"))
    for row in part["longer"]:
        factor = row["longer"] / row["steps"]
        text = f"{row['name']}: {factor:g} times the steps divide the residual by {row['gain_steps']:.3g}"
        if row["gains_more"]:
            first, last = row["widths"]
            text += f", width {first} to {last} by {row['gain_width']:.3g}: {row['gains_more']} gains more"
        found.append(Sentence(f"{text}.", "info"))
    return found


def _by_sigma(part: Mapping[str, Any]) -> list[tuple[float, list[Row]]]:
    sigmas = sorted({row["sigma"] for row in part["rows"]})
    return [(sigma, [row for row in part["rows"] if row["sigma"] == sigma]) for sigma in sigmas]


def _memorizes(row: Row) -> bool:
    return bool(row["l2_shuffled_mean"] < row["l2_ot_mean"])


def _digits(part: Mapping[str, Any]) -> list[Sentence]:
    """Whose flows end nearer to the wrong target that they were shown than to the optimal one, at each sigma."""
    found = []
    for sigma, rows in _by_sigma(part):
        networks = [row for row in rows if row["network"] != MINIMISER]
        near = [row for row in networks if _memorizes(row)]
        told = []
        for row in rows:
            crossed = row.get("crossing_step")
            after = "" if crossed is None else f", from step {crossed} on"
            told.append(f"{row['name']} {row['l2_shuffled_mean']:.2f}/{row['l2_ot_mean']:.2f}{after}")
        names = report.joined([row["name"] for row in near])
        if not near:
            text = f"Digits, sigma = {sigma:g}: all {len(networks)} networks end nearer to the optimal targets."
        else:
            text = (
                f"Digits, sigma = {sigma:g}: {len(near)} of {len(networks)} networks end nearer to the wrong targets"
                f" that they were shown: {names}."
            )
        level = "bad" if near else "good"
        evidence = f"mean L2 of {rows[0]['n']} training sources to the shuffled/the optimal target: {', '.join(told)}"
        found.append(Sentence(text, level if networks else "info", evidence))
    return found


def not_tested(content: Mapping[str, Any]) -> list[str]:
    """What a reader might take for shown."""
    found = ["Other seeds: one start of every network.", "Longer trainings than stated beside each number."]
    missing = [part for part in ("gaussian", "digits") if not content.get(part)]
    return [*(f"The part {part} (`--parts`)." for part in missing), *found]


LABELS = {
    "name": "network",
    "steps": "training steps",
    "residual": "residual / E|u|²",
    "residual_error": "standard error",
    "worst_t": "worst t",
    "l2_euler_mean": "L2, Euler",
    "l2_dopri5_mean": "L2, dopri5",
    "gradient_variance_exact": "exact variance",
    "l2_shuffled_mean": "L2 to shuffled",
    "l2_ot_mean": "L2 to OT",
    "l2_held_out_ot_mean": "L2 to OT, held-out",
    "crossing_step": "nearer to shuffled from step",
    "gradient_noise_scale": "gradient noise scale",
    "sigma_c_predicted": "predicted critical σ",
    "seconds": "seconds",
}


def make_page(folder: RunFolder, content: Mapping[str, Any]) -> Page:
    """The page of a finished run, in whose folder the figures have been drawn."""
    gaussian, digits = content.get("gaussian"), content.get("digits")
    sections = [*(_gaussian_sections(folder, gaussian) if gaussian else [])]
    sections += _digits_sections(folder, digits) if digits else []
    on = {"gaussian": "Gaussian pairs", "digits": "shuffled pairs of digits"}
    return report.page_of(
        folder,
        title=f"Architectures side by side on {report.joined([on[part] for part in content['parts']])}",
        headline=headline(content),
        sentences=sentences(content),
        sections=sections,
        not_tested=not_tested(content),
        smoke=content["smoke"],
    )


def _gaussian_sections(folder: RunFolder, part: Mapping[str, Any]) -> Sequence[Section]:
    columns = {"name": "", "parameters": "", "steps": "", "residual": ".2e", "residual_error": ".1e", "worst_t": ".2f"}
    columns |= {"l2_euler_mean": ".4f", "l2_dopri5_mean": ".4f", "gradient_variance": ".2e"}
    columns |= {"gradient_variance_exact": ".2e", "loss": ".2e", "seconds": ".0f"}
    text = (
        f"x1 = mu + A x0 in {part['dim']} dimensions, rotated by {part['angle']:g} degrees, fresh pairs in every batch"
        f" of {part['batch']}; I + t (A - I) is nearest to singular at t = {part['ill_conditioned_t']:.2f} (smallest"
        f" singular value {part['smallest_singular_value']:.2f})."
    )
    told = (
        "Residual E|v - v*|² / E|u|² of networks on Gaussian pairs: over width, over parameters, and over t.",
        "Three panels of points and lines; the residuals over width and parameters are in the table above.",
    )
    shown = report.pictures(folder, {"gaussian": told})
    return [Section("Lemma 1 as a task", [text, *tabled(part["rows"], columns, "Residuals", LABELS), *shown])]


def _digits_sections(folder: RunFolder, part: Mapping[str, Any]) -> Sequence[Section]:
    columns = {"name": "", "parameters": "", "sigma": "g", "steps": "", "loss": ".4f", "l2_shuffled_mean": ".3f"}
    columns |= {"l2_ot_mean": ".3f", "l2_held_out_ot_mean": ".3f", "crossing_step": "", "gradient_variance": ".2e"}
    columns |= {"gradient_noise_scale": ".0f", "sigma_c_predicted": ".2f", "seconds": ".0f"}
    base = part["baselines"]
    text = (
        f"{part['pairs']} digits (scikit-learn, 8 x 8 pixels), each paired with the wrong one; flows by"
        f" {part['solver']}. Sources that stay where they are: L2 {base['l2_identity_to_shuffled']:.2f} to the"
        f" shuffled, {base['l2_identity_to_ot']:.2f} to the optimal target; these are"
        f" {base['l2_shuffled_to_ot']:.2f} apart."
    )
    told = (
        "Distance to the shuffled and to the optimal target while networks train; dashed: the exact minimiser.",
        "Learning curves, one row a network, one column a noise scale. Their ends are in the table above.",
    )
    shown = report.pictures(folder, {"digits": told})
    return [Section("Who memorizes shuffled digits", [text, *tabled(part["rows"], columns, "Ends", LABELS), *shown])]
