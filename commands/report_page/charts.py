"""Line charts as inline SVG: no script, no font or colour of their own, so that they follow the page's theme."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from commands.report_page.markup import Markup, tag

Point = tuple[float, float]

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 24  # margins
_LOG_SCALE_FROM = 20  # times the lowest value
_MAX_POINTS = 400  # of a curve; it is about as many pixels wide
_MAX_HOVERED = 150  # points of a curve that say their value
NUM_COLOURS = 6


@dataclass
class Curve:
    """One line of a chart. points: (step, value). colour: a number of the theme's. dashed: and with a dot a point."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass
class Level:
    """A horizontal line: what was planned, say."""

    label: str
    value: float
    colour: int = 0


def draw_chart(
    title: str, curves: Iterable[Curve], levels: Iterable[Level] = (), *, x_name: str = "step", from_zero: bool = False
) -> Markup:
    """A chart with a legend; an empty string where no curve has a point. Hovering over a curve shows its values.

    from_zero: the axis begins at 0; else it is logarithmic where the values' range is wide.
    """
    curves = [_thin(curve) for curve in curves if curve.points]
    levels = list(levels)
    if not curves:
        return Markup("")
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points] + [level.value for level in levels]
    if from_zero:
        ys.append(0.0)
    is_log = min(ys) > 0 and max(ys) > _LOG_SCALE_FROM * min(ys)
    across = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    up = _Axis(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP, is_log=is_log)
    parts = [_draw_axes(across, up)]
    for level in levels:
        y = f"{up.place(level.value):.1f}"
        line = tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_=f"level c{level.colour % NUM_COLOURS}")
        parts.append(tag("g", line, tag("title", f"{level.label}: {show(level.value)}")))
    parts += [_draw_curve(curve, across, up, x_name) for curve in curves]
    svg = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    note = ", logarithmic" if is_log else ""
    legend = _draw_legend(curves, levels) if len(curves) + len(levels) > 1 else None
    return tag("figure", tag("figcaption", tag("b", title), note, legend), svg)


def draw_sparkline(values: Sequence[float], highest: float) -> Markup:
    """A row's losses as a small line from 0 to highest; what is not finite is left out."""
    places = [(2 + 76 * i / max(1, len(values) - 1), value) for i, value in enumerate(values) if math.isfinite(value)]
    line = " ".join(f"{x:.1f},{18 - 16 * min(1, value / highest if highest else 0):.1f}" for x, value in places)
    dots = tag("circle", cx=line.split(",")[0], cy=line.split(",")[1], r=2) if len(places) == 1 else None
    return tag("svg", tag("polyline", points=line, class_="line"), dots, viewBox="0 0 80 20", class_="spark c0")


def show(value: float) -> str:
    """A number in at most seven characters or so."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.2e}"


class _Axis:
    """Values to places. Equal ends are drawn apart."""

    def __init__(self, low: float, high: float, start: float, end: float, *, is_log: bool = False):
        if high - low <= 1e-9 * max(abs(low), abs(high)) and not is_log:
            low, high = (0, 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
        self._low, self._high, self._start, self._end, self._is_log = low, high, start, end, is_log

    def place(self, value: float) -> float:
        low, high = self._low, self._high
        if self._is_log:
            low, high, value = map(math.log10, (low, high, value))
        return self._start + (value - low) / (high - low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._is_log:
            powers = range(math.floor(math.log10(self._low)), math.ceil(math.log10(self._high)) + 1)
            factors = (1, 2, 5) if len(powers) < 5 else (1,)
            every = max(1, len(powers) // 5)
            candidates = (factor * 10.0**power for power in powers[::every] for factor in factors)
            return [tick for tick in candidates if self._low <= tick <= self._high]
        rough = (self._high - self._low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first = math.ceil(self._low / step)
        return [step * number for number in range(first, math.floor(self._high / step + 1e-6) + 1)]


def _thin(curve: Curve) -> Curve:
    every = len(curve.points) // _MAX_POINTS + 1
    last = curve.points[-1:] if (len(curve.points) - 1) % every else ()
    return Curve(curve.label, [*curve.points[::every], *last], curve.colour, curve.dashed)


def _draw_axes(across: _Axis, up: _Axis) -> Markup:
    parts = []
    for tick in up.ticks():
        y = f"{up.place(tick):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", show(tick), x=_LEFT - 6, y=y, class_="up"))
    for tick in across.ticks():
        if tick == int(tick):
            parts.append(tag("text", f"{tick:,.0f}", x=f"{across.place(tick):.1f}", y=HEIGHT - 6, class_="across"))
    return tag("g", parts, class_="axes")


def _draw_curve(curve: Curve, across: _Axis, up: _Axis, x_name: str) -> Markup:
    places = [(f"{across.place(x):.1f}", f"{up.place(y):.1f}", x, y) for x, y in curve.points]
    line = tag("polyline", points=" ".join(f"{px},{py}" for px, py, *_ in places), class_="line")
    every = len(places) // _MAX_HOVERED + 1
    dot = "dot" if curve.dashed or len(places) == 1 else "hover"
    dots = [
        tag("circle", tag("title", f"{curve.label}, {x_name} {x:,.0f}: {show(y)}"), cx=px, cy=py, r=3, class_=dot)
        for px, py, x, y in places[::every]
    ]
    return tag("g", line, dots, class_=f"curve c{curve.colour % NUM_COLOURS}{' dashed' if curve.dashed else ''}")


def _draw_legend(curves: Sequence[Curve], levels: Sequence[Level]) -> Markup:
    marks = [(curve.label, curve.colour, "dashed" if curve.dashed else "") for curve in curves]
    marks += [(level.label, level.colour, "level") for level in levels]
    keys = [tag("span", label, class_=f"key c{colour % NUM_COLOURS} {kind}".strip()) for label, colour, kind in marks]
    return tag("span", keys, class_="legend")
