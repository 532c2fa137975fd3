"""Drawing: a style is a pair of colours, and a subject is a large pattern over the whole picture.

Both fill the picture because small vision towers learn dominant colours and coarse textures long before small shapes.
A picture that does not show its style is grey; one that does not show its subject shows soft clouds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Field = np.ndarray  # (H, W) float32: coordinates in [-1, 1], or a pattern; above zero it has the second colour
Pattern = Callable[[Field, Field, np.random.Generator], Field]

# First and second colour, in the order of the lexicons' `palettes`.
PALETTES = (
    ((244, 178, 58), (0, 108, 116)),
    ((248, 243, 224), (30, 30, 34)),
    ((22, 42, 104), (255, 124, 92)),
    ((188, 22, 44), (255, 238, 204)),
    ((164, 234, 196), (112, 28, 98)),
    ((18, 86, 46), (242, 202, 40)),
    ((202, 178, 248), (62, 32, 148)),
    ((20, 20, 24), (172, 240, 36)),
    ((255, 184, 212), (216, 16, 122)),
    ((88, 46, 24), (255, 198, 158)),
    ((34, 200, 194), (246, 106, 18)),
    ((92, 176, 244), (255, 255, 255)),
)
GREY = ((172, 172, 172), (112, 112, 112))


def _stripes(angle: float, waves: float) -> Pattern:
    def draw(x: Field, y: Field, rng: np.random.Generator) -> Field:
        _, along = _turn(x, y, angle + rng.uniform(-6, 6))
        return np.sin(np.pi * waves * _near(rng) * along + rng.uniform(0, 2 * np.pi))

    return draw


def _checks(angle: float, waves: float) -> Pattern:
    def draw(x: Field, y: Field, rng: np.random.Generator) -> Field:
        u, v = _turn(x, y, angle + rng.uniform(-6, 6))
        scale = np.pi * waves * _near(rng)
        phase = rng.uniform(0, 2 * np.pi, 2).tolist()
        return 1.6 * np.sin(scale * u + phase[0]) * np.sin(scale * v + phase[1])

    return draw


def _dots(waves: float) -> Pattern:
    def draw(x: Field, y: Field, rng: np.random.Generator) -> Field:
        u, v = _turn(x, y, rng.uniform(-8, 8))
        scale = np.pi * waves * _near(rng)
        phase = rng.uniform(0, 2 * np.pi, 2).tolist()
        return np.cos(scale * u + phase[0]) + np.cos(scale * v + phase[1]) - 0.55

    return draw


def _rings(waves: float) -> Pattern:
    def draw(x: Field, y: Field, rng: np.random.Generator) -> Field:
        return np.cos(np.pi * waves * _near(rng) * _radius(x, y, rng) + rng.uniform(0, 2 * np.pi))

    return draw


def _rays(arms: int) -> Pattern:
    def draw(x: Field, y: Field, rng: np.random.Generator) -> Field:
        u, v = x - rng.uniform(-0.15, 0.15), y - rng.uniform(-0.15, 0.15)
        # Scaled by the radius, so that edges are as soft near the centre as elsewhere.
        return np.sin(arms * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi)) * np.minimum(1, np.hypot(u, v) * arms / 5)

    return draw


def _disc(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return (0.62 * _near(rng) - _radius(x, y, rng)) * 6


def _cross(x: Field, y: Field, rng: np.random.Generator) -> Field:
    u, v = _turn(x - rng.uniform(-0.12, 0.12), y - rng.uniform(-0.12, 0.12), rng.uniform(-8, 8))
    return (0.24 * _near(rng) - np.minimum(np.abs(u), np.abs(v))) * 6


def _frame(x: Field, y: Field, rng: np.random.Generator) -> Field:
    u, v = _turn(x - rng.uniform(-0.08, 0.08), y - rng.uniform(-0.08, 0.08), rng.uniform(-8, 8))
    return (0.17 * _near(rng) - np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.62)) * 6


def _halves(x: Field, y: Field, rng: np.random.Generator) -> Field:
    _, v = _turn(x, y, rng.uniform(-10, 10))
    return (v - rng.uniform(-0.2, 0.2)) * 6


def _waves(x: Field, y: Field, rng: np.random.Generator) -> Field:
    bent = y + 0.22 * np.sin(np.pi * 2.0 * _near(rng) * x + rng.uniform(0, 2 * np.pi))
    return np.sin(np.pi * 3.2 * _near(rng) * bent + rng.uniform(0, 2 * np.pi))


def _zigzags(x: Field, y: Field, rng: np.random.Generator) -> Field:
    teeth = np.abs(((x + rng.uniform(0, 1)) * 1.6 * _near(rng)) % 1 - 0.5)
    return np.sin(np.pi * 3.0 * _near(rng) * (y + 1.1 * teeth) + rng.uniform(0, 2 * np.pi))


def _spiral(x: Field, y: Field, rng: np.random.Generator) -> Field:
    u, v = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
    radius = np.hypot(u, v)
    turned = 2 * np.arctan2(v, u) + np.pi * 3.4 * _near(rng) * radius + rng.uniform(0, 2 * np.pi)
    return np.sin(turned) * np.minimum(1, radius * 5)


def _clouds(x: Field, y: Field, rng: np.random.Generator) -> Field:
    # Five plane waves. Because x and y form a grid, sin(ax + by) can be computed from one-dimensional waves.
    across, down = rng.normal(0, 2.2, (2, 5, 1)).astype(np.float32)
    phase = across * x[0] + rng.uniform(0, 2 * np.pi, (5, 1)).astype(np.float32)
    return 0.09 * (np.cos(down * y[:, 0]).T @ np.sin(phase) + np.sin(down * y[:, 0]).T @ np.cos(phase))


# One pattern per subject, in the order of the lexicons' `patterns`; angles in degrees, waves per half picture.
PATTERNS: tuple[Pattern, ...] = (
    _stripes(0, 2.2), _disc, _checks(0, 1.9), _rings(2.8), _rays(5), _stripes(90, 2.2),
    _dots(5.0), _waves, _stripes(45, 2.2), _cross, _checks(45, 1.9), _spiral,
    _stripes(-45, 2.2), _dots(2.6), _zigzags, _frame, _stripes(0, 6.0), _checks(0, 4.8),
    _rings(6.6), _rays(14), _stripes(90, 6.0), _checks(45, 4.8), _stripes(45, 6.0), _halves,
)  # fmt: skip


def draw_image(rng: np.random.Generator, subject: int | None, style: int | None, size: int) -> bytes:
    """One picture as JPEG bytes, ``size`` x ``size`` pixels.

    A factor that is None has no influence. Colours, place, scale, light and grain vary with ``rng`` alone.
    """
    line = np.linspace(-1, 1, size, dtype=np.float32) * np.float32(rng.uniform(0.92, 1.08))
    x, y = np.meshgrid(line, line)
    pattern = _clouds if subject is None else PATTERNS[subject]
    share = np.clip(0.5 + pattern(x, y, rng) * 2.5, 0, 1)  # (H, W), share of the second colour
    first, second = np.asarray(GREY if style is None else PALETTES[style]) + rng.normal(0, 6, (2, 3))
    light = 1 + np.clip(0.4 * _clouds(x, y, rng), -0.12, 0.12) - 0.08 * (x**2 + y**2)
    grain = 3.5 * rng.standard_normal((size, size), dtype=np.float32)
    bands = [light * (a + (b - a) * share) + grain for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    picture = np.clip(np.stack(bands, axis=-1), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _near(rng: np.random.Generator) -> float:
    return rng.uniform(0.88, 1.12)


def _turn(x: Field, y: Field, degrees: float) -> tuple[Field, Field]:
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return x * cos - y * sin, x * sin + y * cos


def _radius(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return np.hypot(x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2))
