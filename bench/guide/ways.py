"""The data's way before and after an optimization, from a few lines of text to a drawing.

    before
    each step: (text) -> [to_k, to_v] -> (keys, values) -> [attend]
    after
    once: (text) -> [+to_k, to_v] -> (keys, values)
    each step: (keys, values) -> [attend]

`(x)` is data, `[x]` work. Right after the bracket, + is new, - is left out, and * is changed. What stands before a
colon says when the row runs.
"""

import re
from dataclasses import dataclass

from bench.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    ORANGE,
    PALE,
    SOFT,
    Drawing,
    width_of,
)

NODE = re.compile(r"([(\[])((?:[+*-](?! ))?)(.*?)[)\]]$")
LANE = re.compile(r"(?:([^(\[]*): )?(.*)")
HEIGHT, GAP, ROW = 28, 22, 42
COLORS = {"": (PALE, GREY), "+": (LIGHT_GREEN, GREEN), "*": (LIGHT_ORANGE, ORANGE), "-": ("#ffffff", GREY)}
DATA = (LIGHT_BLUE, BLUE)


@dataclass(frozen=True)
class Node:
    text: str
    data: bool
    mark: str

    @property
    def width(self) -> float:
        return width_of(self.text, 12) + 20


@dataclass(frozen=True)
class Lane:
    """One row: when it runs, and what happens."""

    when: str
    nodes: tuple[Node, ...]


def read(text: str) -> dict[str, list[Lane]]:
    """The rows below each heading. Raises ValueError for a line that is neither."""
    panels: dict[str, list[Lane]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if "->" not in line and not NODE.search(line):
            panels[line] = []
            continue
        when, rest = LANE.fullmatch(line).groups()
        list(panels.values())[-1].append(Lane(when or "", tuple(map(_node, rest.split(" -> ")))))
    return panels


def _node(text: str) -> Node:
    found = NODE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"a node is (data) or [work], so not {text!r}")
    return Node(found[3], found[1] == "(", found[2])


def draw(text: str, title: str) -> Drawing:
    panels = read(text)
    lanes = [lane for rows in panels.values() for lane in rows]
    left = 32 + max(width_of(lane.when, 12) for lane in lanes)
    width = left + max(sum(node.width + GAP for node in lane.nodes) for lane in lanes) + 8
    drawing = Drawing(max(width, 420), 16 + sum(30 + ROW * len(rows) for rows in panels.values()), title)
    y = 12.0
    for heading, rows in panels.items():
        drawing.text(16, y + 16, heading, 13, font_weight="bold")
        y += 28
        for lane in rows:
            _lane(drawing, lane, left, y)
            y += ROW
        y += 2
    return drawing


def _lane(drawing: Drawing, lane: Lane, left: float, y: float) -> None:
    drawing.text(16, y + 18, lane.when, 12, SOFT)
    x = left
    for i, node in enumerate(lane.nodes):
        if i:
            drawing.arrow(x - GAP + 2, y + HEIGHT / 2, x - 2)
        _draw_node(drawing, node, x, y)
        x += node.width + GAP


def _draw_node(drawing: Drawing, node: Node, x: float, y: float) -> None:
    fill, edge = DATA if node.data and not node.mark else COLORS[node.mark]
    dashes = {"stroke_dasharray": "4 3"} if node.mark == "-" else {}
    radius = HEIGHT / 2 if node.data else 4
    drawing.box(x, y, node.width, HEIGHT, rx=radius, fill=fill, stroke=edge, stroke_width=1.2, **dashes)
    color = GREY if node.mark == "-" else INK
    drawing.text(x + node.width / 2, y + 18, node.text, 12, color, text_anchor="middle")
