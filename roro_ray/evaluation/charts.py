"""Charts as inline SVG: lines, bands and points on two axes, coloured by the page's own style sheet.

Written by hand because a report must open anywhere, without a network and in the reader's light or dark
colours: shapes carry classes (`m-roro`), and the style sheet says what they look like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 30, 42

Point = tuple[float, float]


@dataclass(slots=True)
class Chart:
    """A plot area with two linear axes; add shapes, then `render`.

    Args:
        x_range, y_range: what the axes span. Shapes beyond are drawn clipped.
        percent_x, percent_y: label the ticks of an axis as percentages of 1.
        x_ticks: most ticks on the x axis.
        title: what a screen reader says of the chart.
    """

    title: str
    x_label: str
    y_label: str
    x_range: Point
    y_range: Point
    width: int = 520
    height: int = 360
    percent_x: bool = False
    percent_y: bool = True
    x_ticks: int = 6
    _shapes: list[str] = field(default_factory=list)

    def place(self, at: Point) -> tuple[float, float]:
        """Pixel position of a point."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (at[0] - x0) / ((x1 - x0) or 1)
        up = (at[1] - y0) / ((y1 - y0) or 1)
        x = _LEFT + across * (self.width - _LEFT - _RIGHT)
        return round(x, 1), round(self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM), 1)

    def add_line(self, points: Sequence[Point], kind: str, tip: str = "") -> None:
        """Straight lines through points, in their order."""
        path = " ".join("{},{}".format(*self.place(point)) for point in points)
        self._shapes.append(f'<polyline class="line {kind}" points="{path}">{_tip(tip)}</polyline>')

    def add_band(self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], kind: str) -> None:
        """The area between two lines over the same xs."""
        there = [self.place(point) for point in zip(xs, highs, strict=True)]
        back = [self.place(point) for point in zip(reversed(xs), reversed(lows), strict=True)]
        path = " ".join(f"{x},{y}" for x, y in (*there, *back))
        self._shapes.append(f'<polygon class="band {kind}" points="{path}"/>')

    def add_point(self, at: Point, kind: str, tip: str = "", radius: float = 4) -> None:
        """A dot; its tip shows where the reader points."""
        x, y = self.place(at)
        self._shapes.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{radius}">{_tip(tip)}</circle>')

    def add_cross(self, at: Point, x_interval: Point | None, y_interval: Point | None, kind: str) -> None:
        """Whiskers of an interval on either axis."""
        for start, stop in (
            ((x_interval[0], at[1]), (x_interval[1], at[1])) if x_interval else (at, at),
            ((at[0], y_interval[0]), (at[0], y_interval[1])) if y_interval else (at, at),
        ):
            (x1, y1), (x2, y2) = self.place(start), self.place(stop)
            self._shapes.append(f'<line class="whisker {kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')

    def add_text(self, at: Point, text: str, anchor: str = "start", shift: tuple[float, float] = (0, 0)) -> None:
        """A label at a point, moved by some pixels."""
        x, y = self.place(at)
        place = f'x="{x + shift[0]}" y="{y + shift[1]}" text-anchor="{anchor}"'
        self._shapes.append(f'<text class="mark" {place}>{escape(text)}</text>')

    def render(self) -> str:
        """The SVG element."""
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        parts = [f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img">']
        parts.append(f"<title>{escape(self.title)}</title>")
        for tick in make_ticks(*self.x_range, self.x_ticks):
            x, _ = self.place((tick, self.y_range[0]))
            parts.append(f'<line class="grid" x1="{x}" y1="{_TOP}" x2="{x}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">')
            parts.append(f"{_show_tick(tick, self.percent_x)}</text>")
        for tick in make_ticks(*self.y_range):
            _, y = self.place((self.x_range[0], tick))
            parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">')
            parts.append(f"{_show_tick(tick, self.percent_y)}</text>")
        middle = (_LEFT + right) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{self.height - 6}" text-anchor="middle">')
        parts.append(f"{escape(self.x_label)}</text>")
        # The y axis is named above it, where it can be read without turning one's head.
        parts.append(f'<text class="axis" x="2" y="14">{escape(self.y_label)}</text>')
        return "".join([*parts, *self._shapes, "</svg>"])


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def make_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside a range: multiples of 1, 2 or 5 times a power of ten, at most `most` of them."""
    span = high - low
    if not span > 0:
        return [low]
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _show_tick(value: float, percent: bool) -> str:
    return f"{100 * value:g}%" if percent else f"{value:,g}"
