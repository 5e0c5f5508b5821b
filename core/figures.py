"""Pictures of a run, by Matplotlib's object interface, without global state. Only process 0 draws."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esscher.core.reporting import writes

__all__ = ["Panel", "image_grid", "lines"]


MOST_NAMED = 16  # labels of a legend; further ones, as in a sweep, are colours on a scale


class Panel(NamedTuple):
    """Axes of a figure made by `lines`."""

    series: Mapping[str, tuple]  # label -> (x[n], y[n]) or (x[n], y[n], standard_error[n])
    xlabel: str
    ylabel: str
    log_x: bool = False  # with a tick at every x that occurs, if they are apart
    log_y: bool = False  # either stays linear where nothing is positive
    references: Mapping[str, float] = {}  # horizontal lines


def lines(path: pathlib.Path, *panels: Panel) -> pathlib.Path:
    """Draws panels side by side with one legend: training curves, or quality against effort.

    A label has one colour in all panels. Few points get markers, errors become bars, and where there are more than
    sixteen labels, as in a sweep, the colours run along a scale and the legend names some of them.
    """
    if not writes():
        return path
    styles = _styles(list(dict.fromkeys(label for panel in panels for label in panel.series)))
    named = list(styles)[:: math.ceil(len(styles) / MOST_NAMED) or 1]
    figure = _figure((4.4 * len(panels) + 1.6, max(3.2, 0.24 * len(named))), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel, styles)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(named) > 1:
        figure.legend([handles[label] for label in named], named, loc="outside right center", frameon=False)
    return _save(figure, path)


def _styles(labels: list[str]) -> dict[str, dict[str, Any]]:
    from matplotlib import colormaps

    palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"]  # Okabe and Ito's
    if len(labels) <= MOST_NAMED:
        markers, dashes = "osD^vPXp*<>hd8H4", ("-", "--", ":")
        return {x: {"color": palette[i % 7], "marker": markers[i], "ls": dashes[i // 7]} for i, x in enumerate(labels)}
    scale = colormaps["viridis"](np.linspace(0, 0.92, len(labels)))
    return {label: {"color": color, "marker": "."} for label, color in zip(labels, scale, strict=True)}


def _draw(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib import patheffects

    for label, (x, y, *error) in panel.series.items():
        style = styles[label] | ({} if len(x) <= 20 else {"marker": ""})
        axes.errorbar(x, y, *error, label=label, lw=1.4, ms=4.5, elinewidth=1, **style)
    for label, value in panel.references.items():
        axes.axhline(value, color="#999999", lw=1, ls=(0, (4, 3)), zorder=0)
        halo = [patheffects.withStroke(linewidth=3, foreground="white")]
        at = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 3), "textcoords": "offset points", "ha": "right"}
        axes.annotate(label, (1, value), color="#555555", fontsize=8, path_effects=halo, zorder=9, **at)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.log_y and _positive(values[1] for values in panel.series.values()).size:
        axes.set_yscale("log")
        _label_decades(axes.yaxis)
    ticks = _positive(values[0] for values in panel.series.values())
    if panel.log_x and ticks.size:
        if np.all(ticks[1:] > 1.3 * ticks[:-1]):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        else:
            axes.set_xscale("log")
            _label_decades(axes.xaxis)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _positive(values: Iterable[Any]) -> np.ndarray:
    """The different values that a logarithmic axis can show."""
    flat = np.unique(np.concatenate([np.zeros(0), *map(np.ravel, values)]))
    return flat[(flat > 0) & np.isfinite(flat)]


def _label_decades(axis: Any) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def image_grid(
    images: np.ndarray,
    row_labels: Sequence[str],
    col_labels: Sequence[str],
    path: pathlib.Path,
    *,
    captions: Sequence[Sequence[str]] = (),
) -> pathlib.Path:
    """Draws a sheet of images, pixel by pixel; grey ones as ink on paper.

    Args:
      images: `[R, C, H, W, 1 or 3]` in `[-1, 1]`.
      row_labels: one for each equal group of rows, from the top; of one line or more.
      col_labels: one for each equal group of columns, from the left.
      path: the PNG to write.
      captions: one line to stand under each group, by row label and column label; none by default.

    Raises:
      ValueError: images of another rank, labels that do not divide the rows and columns, or captions that are not one
        for each group.
    """
    if images.ndim != 5 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be [R, C, H, W, 1 or 3], got {list(images.shape)}")
    rows, cols, height, width, channels = images.shape
    if rows % len(row_labels) or cols % len(col_labels):
        raise ValueError(f"{len(row_labels)} and {len(col_labels)} labels must divide the {rows} x {cols} images")
    if captions and [len(row) for row in captions] != [len(col_labels)] * len(row_labels):
        raise ValueError(f"captions must be {len(row_labels)} rows of {len(col_labels)}, one for each group of images")
    if not writes():
        return path
    scale = max(1, 32 // max(height, width))
    tall, wide = height * scale, width * scale
    under = 24 if captions else 0
    tops, lefts = _offsets(rows, len(row_labels), tall, under), _offsets(cols, len(col_labels), wide)
    canvas = np.ones((tops[-1] + tall, lefts[-1] + wide, channels))
    tones = np.clip((1 + (images if channels == 3 else -images)) / 2, 0, 1).repeat(scale, 2).repeat(scale, 3)
    for i, j in np.ndindex(rows, cols):
        canvas[tops[i] : tops[i] + tall, lefts[j] : lefts[j] + wide] = tones[i, j]

    dpi, above, below = 100, 26, 6 + under
    beside = 20 + 7 * max(len(line) for label in row_labels for line in label.split("\n"))
    size = canvas.shape[1] + beside + 6, canvas.shape[0] + above + below
    figure = _figure((size[0] / dpi, size[1] / dpi), dpi=dpi)
    axes = figure.add_axes((beside / size[0], below / size[1], canvas.shape[1] / size[0], canvas.shape[0] / size[1]))
    colours = np.rint(255 * np.broadcast_to(canvas, (*canvas.shape[:2], 3))).astype(np.uint8)
    axes.imshow(colours, interpolation="none", aspect="auto")
    axes.set_axis_off()
    row_groups, col_groups = np.split(tops, len(row_labels)), np.split(lefts, len(col_labels))
    for label, group in zip(row_labels, row_groups, strict=True):
        axes.text(-9, (group[0] + group[-1] + tall) / 2, label, ha="right", va="center", fontsize=9)
    for label, group in zip(col_labels, col_groups, strict=True):
        axes.text((group[0] + group[-1] + wide) / 2, -9, label, ha="center", va="bottom", fontsize=9)
    for row, group in zip(captions, row_groups, strict=bool(captions)):
        for text, columns in zip(row, col_groups, strict=True):
            place = (columns[0] + columns[-1] + wide) / 2, group[-1] + tall + 3
            axes.text(*place, text, ha="center", va="top", fontsize=8, color="#555555")
    return _save(figure, path)


def _offsets(count: int, groups: int, extent: int, more: int = 0) -> np.ndarray:
    """Where each image begins, in pixels: a narrow gap between neighbours, a wide one and `more` between groups."""
    index = np.arange(count)
    return index * (extent + 2) + index // (count // groups) * ((10 if count > groups else 2) + more)


def _figure(size: tuple[float, float], *, dpi: int = 150, layout: str | None = None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same picture is the same file
    return path
