"""Figures of images and of training on them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.plots._style import BLUE, GREEN, ORANGE, PURPLE, RED, Row, column


def opaque(images: np.ndarray) -> np.ndarray:
    """Images, uint8 [..., h, w, c] with 1 or 3 channels, as RGBA: what is padded with 0 is transparent, not white."""
    colours = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    return np.concatenate([colours, np.full((*images.shape[:-1], 1), 255, np.uint8)], axis=-1)


def image_grid(images: np.ndarray, *, title: str, columns: int = 10) -> Figure:
    """Images, uint8 [n, h, w, c], side by side in rows of `columns`."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    spaced = np.pad(opaque(images), ((0, rows * columns - count), (0, 1), (0, 1), (0, 0)))
    tiled = spaced.reshape(rows, columns, height + 1, width + 1, 4).transpose(0, 2, 1, 3, 4)
    whole = tiled.reshape(rows * (height + 1), columns * (width + 1), 4)
    figure = Figure(figsize=(6, 6 * whole.shape[0] / whole.shape[1] + 0.15), layout="constrained")
    axes = figure.subplots()
    axes.imshow(whole, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return figure


def image_training(rows: Sequence[Row], *, title: str) -> Figure:
    """Loss, total gradient variance by time bin, and gradient noise scale while a network trains."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    loss, variance, noise = figure.subplots(1, 3, sharex=True)
    steps = column(rows, "step")
    loss.plot(steps, column(rows, "loss"), color=BLUE)
    loss.set_ylabel("training loss (mean over dimensions)")
    names = sorted(name for name in rows[0] if name.startswith("gradient_variance_bin_"))
    variance.plot(steps, column(rows, "gradient_variance"), color="black", label="all t")
    for k, (name, color) in enumerate(zip(names, (BLUE, GREEN, ORANGE, RED), strict=True)):
        label = f"t in [{k / len(names):g}, {(k + 1) / len(names):g})"
        variance.plot(steps, column(rows, name), color=color, lw=1, label=label)
    variance.set_ylabel("total gradient variance")
    figure.legend(*variance.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    # It is infinite where the draws do not tell the mean gradient from 0: a gap.
    scales = column(rows, "gradient_noise_scale")
    scales = np.where(np.isfinite(scales), scales, np.nan)
    noise.plot(steps, scales, color=PURPLE, marker=".", ms=3)
    noise.set_ylabel("gradient noise scale [examples]")
    for axes in (loss, variance, noise) if np.isfinite(scales).any() else (loss, variance):
        axes.set_yscale("log")
    for axes in (loss, variance, noise):
        axes.set_xlabel("training step")
    figure.suptitle(title)
    return figure
