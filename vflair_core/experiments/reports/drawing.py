"""Where everything of a chart stands in an SVG: axes, points, and letters that do not lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import attrs
from attrs import field, frozen

from vflair_core.experiments.reports.charts import Chart, Point
from vflair_core.experiments.reports.leakage import (
    CONTROL_FAILED,
    NOT_EVALUATED,
    UNINFORMATIVE,
    UTILITY_UNKNOWN,
)

WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 46
SHAPES = 8
LINE = 13
SHORT = {
    CONTROL_FAILED: "failed",
    NOT_EVALUATED: "not eval.",
    UNINFORMATIVE: "uninform.",
    UTILITY_UNKNOWN: "no utility",
}
RADIUS = 5.5
CROSS = 8
_APART = 20.0  # times the least: such costs stand on a logarithmic axis


@frozen
class Axis:
    """From numbers to places: linear, or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The place of a value, at most a little outside."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, low, high))
        share = (value - low) / (high - low)
        return round(self.start + min(max(share, -0.02), 1.02) * (self.end - self.start), 1)

    @property
    def shown(self) -> list[tuple[float, str]]:
        """The places of the ticks, and their words."""
        return [(self.at(tick), f"{tick:.6g}") for tick in self.ticks]


@frozen
class Dot:
    """A point in its place, with the path of its shape and the place of its letter."""

    point: Point
    number: int
    x: float
    y: float
    path: str
    bars: tuple[tuple[float, float, float, float], ...]
    letter_at: tuple[float, float] = (0.0, 0.0)
    anchor: str = "start"  # which end of its words stands there
    leader: str = ""  # from the letter to the point, where they are apart


@frozen
class Drawing:
    """A chart that only needs to be written down."""

    chart: Chart
    x: Axis
    y: Axis
    floor_at: float
    dots: tuple[Dot, ...]
    lines: tuple[tuple[int, str], ...] = field(factory=tuple)


def draw(chart: Chart) -> Drawing:
    """Find the place of everything in a chart."""
    x, y = _across(chart), Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, (0, 0.2, 0.4, 0.6, 0.8, 1.0))
    dots, lines = list[Dot](), list[tuple[int, str]]()
    for beside, series in enumerate(chart.series):
        aside = (beside - (len(chart.series) - 1) / 2) * _beside(chart)
        each = [_dot(point, series.number, x, y, aside) for point in series.points]
        dots += each
        if chart.counts and len(each) > 1:
            lines.append((series.number, " ".join(f"{dot.x},{dot.y}" for dot in each)))
    return Drawing(chart, x, y, y.at(chart.floor), tuple(_with_letters(dots)), tuple(lines))


def _beside(chart: Chart) -> float:
    """How far points of one count stand from each other."""
    return min(14.0, 120.0 / max(len(chart.series), 1)) if chart.counts else 0.0


def shape(number: int, x: float, y: float, radius: float = RADIUS) -> str:
    """The path of a shape that stays itself in black and white; a ring of four points is what is undefended.

    Colours come again after eight; the shapes are then one further.
    """
    if number < 0:
        return _polygon(x, y, [radius * 1.5, radius * 0.55] * 4, turn=0.0)
    corners, size, turn = (
        (0, 1.0, 0.0), (4, 1.2, 0.25 * math.pi), (3, 1.35, 0.0), (4, 1.3, 0.0), (3, 1.35, math.pi),
        (6, 1.15, 0.0), (5, 1.25, 0.0), (3, 1.35, 0.5 * math.pi),
    )[(number + number // SHAPES) % SHAPES]  # fmt: skip
    r = radius * size
    if not corners:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    return _polygon(x, y, [r] * corners, turn=turn)


def _polygon(x: float, y: float, radii: Sequence[float], turn: float) -> str:
    corners = [
        (x + r * math.sin(turn + 2 * math.pi * n / len(radii)),
         y - r * math.cos(turn + 2 * math.pi * n / len(radii)))
        for n, r in enumerate(radii)
    ]  # fmt: skip
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in corners) + "Z"


def _across(chart: Chart) -> Axis:
    start, end = LEFT, WIDTH - RIGHT
    values = [v for p in chart.points for v in (p.x, *(p.x_range or ()))] or [0.0, 1.0]
    low, high = min(values), max(values)
    if chart.counts:
        ticks = tuple(float(n) for n in range(math.floor(low), math.ceil(high) + 1))
        while len(ticks) > 12:
            ticks = ticks[::2]
        return Axis(low - 0.4, high + 0.4, start, end, ticks)
    if chart.kind == "frontier":
        low, high = min(low, 0.0), max(high, 1.0)
    elif low > 0 and high > 1e-9 and high / low > _APART:
        return _logarithmic(max(low, high * 1e-9) / 1.5, high * 1.5, start, end)
    else:
        low, high = 0.0, high if high > 1e-9 else 1.0
    step = _step(high - low)
    ticks = tuple(n * step for n in range(math.ceil(low / step), math.floor(high / step + 0.5) + 1))
    room = 0.1 * (high - low)
    return Axis(low - (room if low < 0 else 0.0), max(high, ticks[-1]) + room, start, end, ticks)


def _logarithmic(low: float, high: float, start: float, end: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    apart, parts = -(-(last - first) // 6), (1, 3) if last - first < 5 else (1,)
    each = (m * 10.0**e for e in range(first, last + 1, apart) for m in parts)
    ticks = tuple(tick for tick in each if low <= tick <= high)
    return Axis(low, high, start, end, ticks, logarithmic=True)


def _step(span: float) -> float:
    """A round step that gives four to eight ticks."""
    rough = span / 5
    size = 10.0 ** math.floor(math.log10(rough))
    return next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)


def _dot(point: Point, number: int, x: Axis, y: Axis, aside: float) -> Dot:
    across, down = round(x.at(point.x) + aside, 1), y.at(point.y)
    bars = [(across, y.at(point.y_range[0]), across, y.at(point.y_range[1]))]
    if point.x_range is not None:
        bars.append((x.at(point.x_range[0]), down, x.at(point.x_range[1]), down))
    return Dot(point, number, across, down, shape(number, across, down), tuple(bars))


def _with_letters(dots: Sequence[Dot]) -> list[Dot]:
    """The dots with their letters where they cover least; what is wrong with a point stands behind its letter."""
    points = [_Box(d.x - CROSS, d.y - CROSS, 2 * CROSS, 2 * CROSS) for d in dots]
    words, placed = list[_Box](), list[Dot]()
    for dot in dots:
        box, away = min(
            _places(dot), key=lambda place: _cost(place[0], points, words) + 1.5 * place[1]
        )
        words.append(box)
        x, anchor = box.x, "start"
        if box.x < dot.x:
            beside = box.x + box.width <= dot.x
            x, anchor = (box.x + box.width, "end") if beside else (box.x + box.width / 2, "middle")
        y = box.y + LINE - 2
        leader = f"M{dot.x} {dot.y}L{x:.1f} {y - 4:.1f}" if away > 12 else ""
        placed.append(
            attrs.evolve(dot, letter_at=(round(x, 1), round(y, 1)), anchor=anchor, leader=leader)
        )
    return placed


def _places(dot: Dot) -> Iterator[tuple[_Box, float]]:
    """Where the words of a dot could stand, and how far from it."""
    word = SHORT.get(dot.point.mark, "")
    # As wide as on a phone, where words are larger.
    width = 9.0 * len(dot.point.letter) + (6.0 * len(word) + 4 if word else 0)
    for away in (10, 16, 24, 34, 46):
        left, right, middle = dot.x - away - width, dot.x + away, dot.x - width / 2
        for x, down in (
            (right, 0.0), (left, 0.0), (right, -0.7), (left, -0.7), (right, 0.7), (left, 0.7), (middle, -1.0), (middle, 1.0),
        ):  # fmt: skip
            yield _Box(x, dot.y + down * (away + 3) - LINE / 2, width, LINE), away


def _cost(box: _Box, points: Sequence[_Box], words: Sequence[_Box]) -> float:
    """How much words at a place would lie on what is there."""
    on_points, on_words = (sum(map(box.covers, others)) for others in (points, words))
    return box.outside() + 2 * on_points + 3 * on_words


@frozen
class _Box:
    """A rectangle that holds words or a point."""

    x: float
    y: float
    width: float
    height: float

    def covers(self, other: _Box) -> float:
        """The area of both."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(across, 0.0) * max(down, 0.0)

    def outside(self) -> float:
        """The area that is not between the axes."""
        room = _Box(LEFT, 0, WIDTH - LEFT, HEIGHT - BOTTOM)
        return 3 * (self.width * self.height - self.covers(room))
