"""An SVG drawing of the imports between packages: one box per package, in levels."""

from dataclasses import dataclass
from html import escape
from itertools import pairwise

from docs_build.modules import COMMANDS, Module, cycle_edges, levels, package_graph, reduced

BOX_WIDTH, BOX_HEIGHT, GAP, LEVEL_HEIGHT, MARGIN = 150, 44, 22, 92, 24
LANE_WIDTH = 26  # space for an edge that crosses a level between two boxes
STYLE = """\
<style>
  .box { fill: #eef2fb; stroke: #3f51b5; stroke-width: 1.2 }
  .top { fill: #dfe6f8 }
  .edge { fill: none; stroke: #7a86a8; stroke-width: 1.3 }
  .cycle { fill: none; stroke: #c62828; stroke-width: 1.5; stroke-dasharray: 5 3 }
  text { font-family: sans-serif; fill: #1d2433; text-anchor: middle }
  .name { font-size: 14px; font-weight: 600 }
  .note { font-size: 11px; fill: #56607a }
</style>"""


@dataclass
class Slot:
    """A slot of a level: the box of a package, or the lane of an edge that crosses the level (`package` is empty)."""

    package: str
    edge: tuple[str, str] | None = None
    x: float = 0.0

    @property
    def width(self) -> int:
        """Horizontal space in pixels."""
        return BOX_WIDTH if self.package else LANE_WIDTH


def imports_svg(modules: list[Module]) -> str:
    """The drawing. An arrow points from a package to one that it imports, unless a longer path of arrows implies it."""
    graph = package_graph(modules)
    level = levels(graph)
    edges = sorted((a, b) for a, imported in reduced(graph).items() for b in imported)
    rows = _arranged(level, edges)
    width = max(_row_width(row) for row in rows) + 2 * MARGIN
    height = LEVEL_HEIGHT * (len(rows) - 1) + BOX_HEIGHT + 2 * MARGIN
    _set_positions(rows, width)
    parts = [_path(points, "edge") for points in _routes(rows, level, edges)]
    spots = {slot.package: (slot.x, _y(rows, n)) for n, row in enumerate(rows) for slot in row if slot.package}
    for a, b in sorted(cycle_edges(graph)):
        parts.append(_path([(spots[a][0], spots[a][1]), (spots[b][0], spots[b][1] + BOX_HEIGHT)], "cycle"))
    for package, (x, y) in spots.items():
        parts.append(_box(package, x, y, [m for m in modules if m.package == package]))
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#7a86a8"/></marker></defs>'
    )
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Imports between packages">'
    paper = f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([head, STYLE, marker, paper, *parts, "</svg>", ""])


def _arranged(level: dict[str, int], edges: list[tuple[str, str]]) -> list[list[Slot]]:
    """Levels from the lowest to the highest, with lanes for crossing edges, ordered to reduce intersections."""
    rows: list[list[Slot]] = [[] for _ in range(max(level.values()) + 1)]
    for package in sorted(level):
        rows[level[package]].append(Slot(package))
    for a, b in edges:
        for n in range(level[b] + 1, level[a]):
            rows[n].append(Slot("", (a, b)))
    for _ in range(12):
        for n in range(len(rows) - 2, -1, -1):
            _sort(rows[n], rows[n + 1], edges, upwards=True)
        for n in range(1, len(rows)):
            _sort(rows[n], rows[n - 1], edges, upwards=False)
    return rows


def _sort(row: list[Slot], neighbours: list[Slot], edges: list[tuple[str, str]], upwards: bool) -> None:
    """Order a level by the mean position of its neighbours in the level above or below."""
    position = {id(slot): i / max(1, len(neighbours) - 1) for i, slot in enumerate(neighbours)}

    def mean(slot: Slot, i: int) -> float:
        own_edges = (
            [e for e in edges if e == slot.edge or slot.package in (e[0], e[1])] if slot.package else [slot.edge]
        )
        positions = []
        for edge in own_edges:
            assert edge is not None
            end = edge[0] if upwards else edge[1]
            if slot.package == end:
                continue
            positions += [position[id(s)] for s in neighbours if s.edge == edge or s.package == end]
        return sum(positions) / len(positions) if positions else i / max(1, len(row) - 1)

    keys = {id(slot): mean(slot, i) for i, slot in enumerate(row)}
    row.sort(key=lambda slot: keys[id(slot)])


def _row_width(row: list[Slot]) -> float:
    return sum(slot.width for slot in row) + GAP * (len(row) - 1)


def _set_positions(rows: list[list[Slot]], width: float) -> None:
    for row in rows:
        x = (width - _row_width(row)) / 2
        for slot in row:
            slot.x = x + slot.width / 2
            x += slot.width + GAP


def _y(rows: list[list[Slot]], n: int) -> float:
    return MARGIN + LEVEL_HEIGHT * (len(rows) - 1 - n)


def _routes(
    rows: list[list[Slot]], level: dict[str, int], edges: list[tuple[str, str]]
) -> list[list[tuple[float, float]]]:
    routes = []
    for a, b in edges:
        start = next(slot for slot in rows[level[a]] if slot.package == a)
        end = next(slot for slot in rows[level[b]] if slot.package == b)
        points = [(start.x, _y(rows, level[a]) + BOX_HEIGHT)]
        for n in range(level[a] - 1, level[b], -1):
            lane = next(slot for slot in rows[n] if slot.edge == (a, b))
            points += [(lane.x, _y(rows, n)), (lane.x, _y(rows, n) + BOX_HEIGHT)]
        points.append((end.x, _y(rows, level[b])))
        routes.append(points)
    return routes


def _path(points: list[tuple[float, float]], kind: str) -> str:
    """A smooth path through points, vertical at each end of a segment."""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        text += f" C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return f'<path class="{kind}" d="{text}" marker-end="url(#arrow)"/>'


def _box(package: str, x: float, y: float, members: list[Module]) -> str:
    count = sum("__init__" not in m.path for m in members)
    name, kind = ("*.py (commands)", "box top") if package == COMMANDS else (f"{package}/", "box")
    note = f"{count} module{'s' * (count != 1)}"
    left = x - BOX_WIDTH / 2
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x:.1f}" y="{y + 19:.1f}">{escape(name)}</text>'
        f'<text class="note" x="{x:.1f}" y="{y + 35:.1f}">{note}</text>'
    )
