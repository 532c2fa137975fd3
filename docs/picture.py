"""Draws the README's picture of the system, docs/images/system.svg: what lies on disk, and the verb that makes it.

python docs/picture.py

The verbs are the command line's: tests/contracts/test_readme.py checks them, and that the file is what this draws.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "images" / "system.svg"
WIDTH, HEIGHT = 980, 760

STYLE = """
text { font-family: system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; fill: #1c2733; text-anchor: middle }
.name { font-size: 15px; font-weight: 600 } .note { font-size: 13px; fill: #4a5866 }
.verb { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; fill: #0b5394 }
.lane { font-size: 16px; font-weight: 700; fill: #4a5866 }
rect { rx: 8px; stroke-width: 1.5 } path { fill: none; stroke: #5d6d7e; stroke-width: 1.6; marker-end: url(#head) }
.source { fill: #f1f3f5; stroke: #868e96 } .recall { fill: #e7f5ff; stroke: #4dabf7 }
.ranking { fill: #fff4e6; stroke: #ffa94d } .result { fill: #ebfbee; stroke: #51cf66 }
"""


class Box(NamedTuple):
    """A rectangle with one or two lines of text, around a centre."""

    x: int
    y: int
    width: int
    kind: str
    name: str
    note: str = ""

    @property
    def height(self) -> int:
        return 58 if self.note else 40

    @property
    def top(self) -> int:
        return self.y - self.height // 2

    @property
    def bottom(self) -> int:
        return self.y + self.height // 2


TABLES = Box(490, 45, 540, "source", "your tables", "notes: image, title, topics, text · events: who, what, when")
PREPARED = Box(490, 150, 400, "source", "checked notes and events", "broken rows are set aside, with the reason")
PAIRS = Box(190, 290, 250, "recall", "pairs of related notes")
EMBEDDER = Box(190, 380, 250, "recall", "embedder")
VECTORS = Box(190, 470, 250, "recall", "a vector for every note")
INDEX = Box(190, 560, 260, "recall", "index of nearest neighbours")
HISTORIES = Box(620, 290, 190, "ranking", "histories, candidates")
SUMMARIES = Box(830, 290, 190, "ranking", "images as text")
TASTES = Box(725, 380, 260, "ranking", "each user's taste in words")
RANKER = Box(725, 470, 260, "ranking", "ranker: yes or no")
SCORES = Box(725, 560, 260, "ranking", "a score for every candidate")
REPORT = Box(455, 515, 140, "result", "report", "tables, samples")
SERVICE = Box(
    490, 670, 860, "result", "service and web page", "similar notes · recommendations with their reasons · live notes"
)
BOXES = (
    TABLES, PREPARED, PAIRS, EMBEDDER, VECTORS, INDEX, HISTORIES, SUMMARIES, TASTES, RANKER, SCORES, REPORT, SERVICE,
)  # fmt: skip

# The arrows' paths, and the verbs beside them: x, y, anchor, text.
PATHS = [
    f"M490 {TABLES.bottom} V{PREPARED.top}",
    f"M490 {PREPARED.bottom} V215 H190 V{PAIRS.top}",
    f"M490 {PREPARED.bottom} V215 H620 V{HISTORIES.top}",
    f"M490 {PREPARED.bottom} V215 H830 V{SUMMARIES.top}",
    f"M190 {PAIRS.bottom} V{EMBEDDER.top}",
    f"M190 {EMBEDDER.bottom} V{VECTORS.top}",
    f"M190 {VECTORS.bottom} V{INDEX.top}",
    f"M620 {HISTORIES.bottom} V335 H725 V{TASTES.top}",
    f"M830 {SUMMARIES.bottom} V335 H725 V{TASTES.top}",
    f"M725 {TASTES.bottom} V{RANKER.top}",
    f"M725 {RANKER.bottom} V{SCORES.top}",
    f"M315 470 H455 V{REPORT.top}",
    f"M595 560 H455 V{REPORT.bottom}",
    f"M190 {INDEX.bottom} V{SERVICE.top}",
    f"M855 470 H890 V{SERVICE.top}",
]
VERBS = [
    (500, 101, "start", "prepare"),
    (200, 248, "start", "mine-pairs"),
    (200, 339, "start", "train-embedder"),
    (200, 429, "start", "embed-notes"),
    (200, 519, "start", "build-index"),
    (630, 248, "start", "make-sequences"),
    (838, 248, "start", "summarize-images"),
    (735, 353, "start", "summarize-preferences"),
    (735, 429, "start", "train-ranker"),
    (735, 519, "start", "score-candidates"),
    (395, 461, "middle", "eval-retrieval"),
    (527, 579, "middle", "eval-ranking"),
    (200, 615, "start", "serve"),
]
LANES = [(65, "Recall"), (535, "Ranking in words")]


def draw() -> str:
    """The picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>From your tables to recall, ranking and the service</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" style="fill: #5d6d7e; stroke: none; marker-end: none"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *(f'<path d="{path}"/>' for path in PATHS),
    ]
    for box in BOXES:
        left, baseline = box.x - box.width // 2, box.y + (-4 if box.note else 5)
        lines += [
            f'<rect class="{box.kind}" x="{left}" y="{box.top}" width="{box.width}" height="{box.height}"/>',
            f'<text class="name" x="{box.x}" y="{baseline}">{escape(box.name)}</text>',
        ]
        if box.note:
            lines.append(f'<text class="note" x="{box.x}" y="{box.y + 17}">{escape(box.note)}</text>')
    for x, y, anchor, verb in VERBS:
        lines.append(f'<text class="verb" x="{x}" y="{y}" style="text-anchor: {anchor}">{verb}</text>')
    for x, name in LANES:
        lines.append(f'<text class="lane" x="{x}" y="208" style="text-anchor: start">{name}</text>')
    without = "Without checkpoints of your own, build-tiny and build-tiny-mllm train small models first."
    lines += [f'<text class="note" x="{WIDTH // 2}" y="{HEIGHT - 30}">{without}</text>', "</svg>", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
