"""The report's charts, each drawn by Matplotlib once for a light page and once for a dark one.

Every chart is an image of its own, so that the page can lay charts side by side or below each other.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refalign_jax.report.content import Chart
from refalign_jax.report.theme import DARK, LIGHT, Theme, subject_sign
from refalign_jax.types import Float, Int

DPI = 200
"""Resolution of the PNG files. The page shows them at about half their size, so they are sharp on fine displays."""
LINES = (4.2, 2.9)
"""Width and height of a line chart in inches; small, so that its text stays legible on a phone."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One line of a chart."""

    label: str
    x: np.ndarray
    y: np.ndarray
    dashed: bool = False
    strong: bool = True
    """Drawn in the accent colour; otherwise in grey."""


def losses(
    name: str,
    title: str,
    training: tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]],
    held_out: tuple[Int[np.ndarray, " m"], Float[np.ndarray, " m"]],
) -> Chart:
    """A loss over the steps, as measured and smoothed, and its held-out values if there are any.

    Args:
      name: file name of the chart, without the extension.
      title: of the chart.
      training: steps and values.
      held_out: steps and values; may be empty.
    """
    steps, values = training
    smooth = smoothed(values)

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot(steps, values, color=theme.muted, alpha=0.35, linewidth=0.7, label="each step")
        axes.plot(steps, smooth, color=theme.accent, linewidth=1.8, label="running mean")
        if len(held_out[0]):
            axes.plot(*held_out, color=theme.ink, linewidth=1.2, marker="o", markersize=3.5, label="held out")
        _logarithmic(axes, np.concatenate([smooth, held_out[1]]))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))

    ends = smooth[np.isfinite(smooth)]
    alt = f"{title} over {len(steps)} steps"
    if len(ends):
        alt += f"; its running mean goes from {ends[0]:.3g} to {ends[-1]:.3g}"
    return _chart(name, title, alt, paint, LINES)


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The running mean of the finite values, over a window of a twentieth of all values."""
    half = len(values) // 40
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return np.array([np.mean(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])


def blocks(name: str, title: str, curves: Sequence[Curve], aligned: int, levels: Mapping[str, float]) -> Chart:
    """A measure over the transformer's blocks.

    Args:
      name: file name of the chart, without the extension.
      title: name of the measure.
      curves: lines over the blocks.
      aligned: number of aligned blocks, which are shaded.
      levels: horizontal lines by label; values that are not finite are left out.
    """
    known = {label: value for label, value in levels.items() if np.isfinite(value)}

    def paint(axes: Axes, theme: Theme) -> None:
        if aligned:
            axes.axvspan(-0.5, aligned - 0.5, color=theme.accent, alpha=0.09, linewidth=0)
        for curve in curves:
            colour = theme.accent if curve.strong else theme.muted
            style = "--" if curve.dashed else "-"
            axes.plot(
                curve.x, curve.y, style, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=curve.label
            )
        for (label, value), style in zip(known.items(), ("-.", ":"), strict=False):
            axes.axhline(value, color=theme.ink, linestyle=style, linewidth=1.1, label=label)
        axes.set_xlabel("block")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))
        axes.margins(y=0.12)

    described = [f"{c.label} from {_short(c.y[0])} to {_short(c.y[-1])}" for c in curves if len(c.y)]
    described += [f"{label} {_short(value)}" for label, value in known.items()]
    return _chart(name, title, f"{title} over the blocks: {'; '.join(described)}", paint, LINES)


def token_map(
    name: str, title: str, points: Float[np.ndarray, "n 2"], subjects: Int[np.ndarray, " n"], what: str
) -> Chart:
    """Tokens in two dimensions, coloured by subject, both axes at the same scale.

    Args:
      name: file name of the chart, without the extension.
      title: of the chart.
      points: the tokens.
      subjects: number of each token's subject.
      what: kind of the map, for its text description.
    """
    centre = (points.max(0) + points.min(0)) / 2
    reach = max(float((points.max(0) - points.min(0)).max()) * 0.54, 1e-9)

    def paint(axes: Axes, theme: Theme) -> None:
        for subject in np.unique(subjects):
            colour, marker, _ = subject_sign(int(subject))
            mine = points[subjects == subject]
            axes.scatter(
                mine[:, 0],
                mine[:, 1],
                s=20,
                c=colour,
                marker=marker,
                alpha=0.75,
                linewidths=0.25,
                edgecolors=theme.paper,
            )
        axes.set_xlim(centre[0] - reach, centre[0] + reach)
        axes.set_ylim(centre[1] - reach, centre[1] + reach)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(True)

    alt = f"{what} of {len(points)} reference tokens of {len(np.unique(subjects))} subjects, {title}"
    return _chart(name, title, alt, paint, (3.2, 3.2))


def pairs(name: str, title: str, labels: Sequence[str], aligned: Sequence[float], baseline: Sequence[float]) -> Chart:
    """A measure with and without alignment: a row for each pair of runs, with a line between the two values."""

    def paint(axes: Axes, theme: Theme) -> None:
        rows = np.arange(len(labels))
        axes.hlines(rows, baseline, aligned, color=theme.line, linewidth=3, zorder=1)
        axes.scatter(
            baseline, rows, s=42, facecolors=theme.paper, edgecolors=theme.muted, linewidths=1.6, label="λ = 0"
        )
        axes.scatter(aligned, rows, s=42, color=theme.accent, label="with alignment")
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=5))

    described = "; ".join(
        f"{row} {_short(a)} against {_short(b)}" for row, a, b in zip(labels, aligned, baseline, strict=True)
    )
    alt = f"{title} with alignment against λ = 0: {described}"
    return _chart(name, title, alt, paint, (LINES[0], 1.2 + 0.36 * len(labels)))


def _chart(name: str, title: str, alt: str, paint: Callable[[Axes, Theme], None], size: tuple[float, float]) -> Chart:
    light, dark = (_draw(paint, theme, size) for theme in (LIGHT, DARK))
    width, height = (round(side * DPI) for side in size)
    return Chart(name=name, title=title, alt=alt, light=light, dark=dark, size=(width, height))


def _draw(paint: Callable[[Axes, Theme], None], theme: Theme, size: tuple[float, float]) -> bytes:
    """Draws a chart with `paint` and encodes it as PNG."""
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=theme.paper)
    axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.muted, labelsize=8.5, width=0.6, length=3)
    axes.xaxis.label.set(color=theme.muted, size=8.5)
    axes.grid(color=theme.line, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(color=theme.line, linewidth=0.8, visible=side in ("left", "bottom"))
    paint(axes, theme)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(handles) if len(handles) < 4 else 2,
            frameon=False,
            fontsize=8.5,
            labelcolor=theme.ink,
            columnspacing=1.4,
            handlelength=1.8,
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=theme.paper)
    return file.getvalue()


def _logarithmic(axes: Axes, values: np.ndarray) -> None:
    """Sets a logarithmic scale if the values are positive and span more than a factor of five."""
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _short(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "none"


def error_curves(
    name: str, title: str, curves: Sequence[Curve], x_label: str, limit: tuple[str, np.ndarray, np.ndarray]
) -> Chart:
    """Errors on a logarithmic axis, and the limit that they must stay below.

    Args:
      name: file name of the chart, without the extension.
      title: of the chart.
      curves: lines; zeros are drawn at the smallest error that is shown.
      x_label: of the horizontal axis.
      limit: its label, positions and values.
    """
    least = 1e-9

    def paint(axes: Axes, theme: Theme) -> None:
        for number, curve in enumerate(curves):
            colour, marker, _ = subject_sign(number)
            axes.plot(
                curve.x, np.fmax(curve.y, least), color=colour, linewidth=1.4, marker=marker, markersize=3,
                label=curve.label,
            )  # fmt: skip
        axes.plot(limit[1], limit[2], "--", color=theme.ink, linewidth=1.1, label=limit[0])
        axes.set_yscale("log")
        shown = np.concatenate([limit[2], *(np.fmax(curve.y, least) for curve in curves)])
        shown = shown[np.isfinite(shown)]
        axes.set_ylim(10 ** np.floor(np.log10(shown.min())), 10 ** np.ceil(np.log10(shown.max()) + 0.01))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(x_label)
        axes.set_ylabel("relative error", color=theme.muted, size=8.5)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))

    described = "; ".join(f"{c.label} up to {_short(float(np.nanmax(c.y)))}" for c in curves if len(c.y))
    return _chart(name, title, f"{title}: {described}", paint, LINES)
