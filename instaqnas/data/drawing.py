"""Draws images of textured objects on cluttered backgrounds, with a known difficulty.

A class is an outline, a texture and two typical colours, as in real objects: a detector trained from scratch for
minutes learns colours and textures, but hardly bare outlines. The difficulty of an image, from 0 to 1, controls the
number, size, occlusion and contrast of its objects, and the clutter and noise of the background.

An image is a pure function of its random generator, size and difficulty. If a change here draws other pixels, raise
`DRAWING_VERSION` in shapes.py.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

SUPERSAMPLING = 2  # samples per pixel and axis, for outlines and textures
PLACEMENT_TRIES = 20  # random places tried for an object before it is dropped

Hsv = tuple[float, float, float]  # hue in degrees, saturation and value from 0 to 1


class Drawing(NamedTuple):
    """An image and its N objects."""

    image: np.ndarray  # uint8 [H, W, 3], RGB
    boxes: np.ndarray  # int64 [N, 4], VOC's xmin, ymin, xmax, ymax: pixels counted from 1, both ends included
    names: list[str]  # N class names


def draw_image(rng: np.random.Generator, image_size: int, difficulty: float, *, empty: bool = False) -> Drawing:
    """Draws 1 to 12 objects on a background, or the background alone.

    A box encloses all of an object inside the image, including parts that others cover; at least half of each object is
    visible.

    Args:
        rng: the only source of randomness.
        image_size: side of the square image in pixels.
        difficulty: 0 for one or two large, clean objects on a plain background, up to 1.
        empty: draw no object; background, contrast, blur and noise are as in other images of this difficulty.
    """
    scene = _Scene(_draw_background(rng, image_size, difficulty))
    lowest, highest = round(1 + 4 * difficulty), round(2 + 10 * difficulty)
    for _ in range(0 if empty else rng.integers(lowest, highest + 1)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        size = image_size * rng.uniform(0.30 - 0.14 * difficulty, 0.55 - 0.20 * difficulty)
        _place(rng, scene, shape.name, _draw_sprite(rng, shape, size, difficulty), difficulty)
    image = _degrade(rng, scene.image, difficulty)
    return Drawing(image, np.array(scene.boxes, dtype=np.int64).reshape(-1, 4), scene.names)


# --- Outlines: closed polygons in the unit disc; the area between two of them is filled -------------------------------


def _regular_polygon(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _disc() -> list[np.ndarray]:
    return [_regular_polygon(64)]


def _ring() -> list[np.ndarray]:
    return [_regular_polygon(64), _regular_polygon(48, radius=0.45)]


def _triangle() -> list[np.ndarray]:
    return [_regular_polygon(3)]


def _square() -> list[np.ndarray]:
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.sqrt(0.5)]


def _hexagon() -> list[np.ndarray]:
    return [_regular_polygon(6)]


def _star() -> list[np.ndarray]:
    points = _regular_polygon(10)
    points[1::2] *= 0.48
    return [points]


def _cross() -> list[np.ndarray]:
    arm = np.array([[1, -0.34], [1, 0.34], [0.34, 0.34]])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, turn) for turn in range(4)])]


def _crescent() -> list[np.ndarray]:
    # The inner arc lies on the circle of radius 0.8 about (0.5, 0) and ends where that meets the unit circle.
    meet = np.arccos((1 + 0.5**2 - 0.8**2) / (2 * 0.5))
    outer = np.linspace(meet, 2 * np.pi - meet, 48)
    inner_end = np.arctan2(np.sin(meet), np.cos(meet) - 0.5)
    inner = np.linspace(2 * np.pi - inner_end, inner_end, 40)
    outer_arc = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    inner_arc = np.stack([0.5 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], axis=1)
    return [np.concatenate([outer_arc, inner_arc])]


# --- Textures: share of the base colour, 0 to 1, at (u, v); the object is the unit disc -------------------------------


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)  # several times faster than x % 1


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rows = v * 2.8
    columns = u * 1.6 + 0.5 * np.floor(rows)
    return (_fraction(rows) > 0.2) & (_fraction(columns) > 0.12)


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _fraction(u * 2.2) > 0.42


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (_fraction(u * 2) - 0.5) ** 2 + (_fraction(v * 2) - 0.5) ** 2 > 0.29**2


def _radial_gradient(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.clip((np.sqrt(u**2 + v**2) - 0.45) / 0.55, 0, 1)


def _target(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _fraction(2.5 * np.sqrt(u**2 + v**2)) > 0.35


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (_fraction(u * 1.5) < 0.5) ^ (_fraction(v * 1.5) < 0.5)


def _zigzag(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _fraction(v * 2.5 + np.abs(_fraction(u * 2) - 0.5)) > 0.4


def _wedges(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _fraction(np.arctan2(v, u) * (3 / np.pi)) < 0.5


# --- Classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A class. Inside `outline`, `texture` mixes the colours `accent` (0) and `base` (1)."""

    name: str
    outline: list[np.ndarray]
    texture: Callable[[np.ndarray, np.ndarray], np.ndarray]
    base: Hsv
    accent: Hsv


SHAPES = (
    Shape("brick", _square(), _bricks, base=(4, 0.80, 0.74), accent=(30, 0.22, 0.84)),
    Shape("disc", _disc(), _target, base=(25, 0.90, 0.96), accent=(42, 0.25, 0.98)),
    Shape("star", _star(), _dots, base=(51, 0.85, 0.96), accent=(28, 0.85, 0.50)),
    Shape("triangle", _triangle(), _stripes, base=(122, 0.72, 0.72), accent=(135, 0.80, 0.34)),
    Shape("crescent", _crescent(), _zigzag, base=(180, 0.70, 0.84), accent=(186, 0.80, 0.38)),
    Shape("ring", _ring(), _radial_gradient, base=(222, 0.85, 0.50), accent=(216, 0.55, 1.00)),
    Shape("cross", _cross(), _checks, base=(273, 0.70, 0.70), accent=(273, 0.22, 0.95)),
    Shape("hexagon", _hexagon(), _wedges, base=(326, 0.62, 0.95), accent=(330, 0.80, 0.52)),
)


# --- Objects ----------------------------------------------------------------------------------------------------------


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    red_green_blue = colorsys.hsv_to_rgb(hue / 360 % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return 255 * np.array(red_green_blue, dtype=np.float32)


def _jittered_colours(rng: np.random.Generator, shape: Shape, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    hue_shift = rng.uniform(-1, 1) * (3 + 9 * difficulty)
    paler = 1 - rng.uniform(0, 0.1 + 0.25 * difficulty)
    darker = 1 - rng.uniform(0, 0.1 + 0.2 * difficulty)
    base, accent = (_rgb(h + hue_shift, s * paler, v * darker) for h, s, v in (shape.base, shape.accent))
    return base, accent


class _Sprite(NamedTuple):
    rgb: np.ndarray  # float32 [h, w, 3], 0 to 255
    alpha: np.ndarray  # float32 [h, w], 0 to 1
    opaque: np.ndarray  # bool [h, w]: the pixels of the object, for its box and for occlusion


def _draw_sprite(rng: np.random.Generator, shape: Shape, size: float, difficulty: float) -> _Sprite:
    """An object, rotated and slightly stretched, whose longer side is `size` pixels."""
    angle, stretch = rng.uniform(0, 2 * np.pi), math.exp(0.2 * difficulty * rng.uniform(-1, 1))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    transform = turn @ np.diag([stretch, 1 / stretch])
    polygons = [points @ transform.T for points in shape.outline]
    corners = np.concatenate(polygons)
    low, extent = corners.min(axis=0), np.ptp(corners, axis=0)
    scale = size / extent.max()
    low -= 1 / scale  # a margin of one pixel for the soft edge
    width, height = np.ceil(extent * scale).astype(int) + 2

    alpha = _fill([(points - low) * scale for points in polygons], width, height)
    (u_x, u_y), (v_x, v_y) = (np.diag([1 / stretch, stretch]) @ turn.T).tolist()
    x = (_sample_positions(width) / scale + low[0]).astype(np.float32)
    y = (_sample_positions(height) / scale + low[1]).astype(np.float32)[:, None]
    u, v = u_x * x + u_y * y, v_x * x + v_y * y
    share = _shrink(shape.texture(u, v).astype(np.float32), width, height)[..., None]
    base, accent = _jittered_colours(rng, shape, difficulty)
    rgb = (accent + share * (base - accent)) * _light(rng, width, height)[..., None]
    return _Sprite(rgb, alpha, alpha >= 0.5)


def _sample_positions(length: int) -> np.ndarray:
    return (np.arange(length * SUPERSAMPLING) + 0.5) / SUPERSAMPLING


def _shrink(samples: np.ndarray, width: int, height: int) -> np.ndarray:
    return cv2.resize(samples, (int(width), int(height)), interpolation=cv2.INTER_AREA)


def _fill(polygons: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """Coverage [height, width], 0 to 1, of polygons in pixels; the origin is the corner of the first pixel."""
    samples = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    fraction_bits = 4
    # OpenCV puts the origin at the centre of the first pixel, hence - 0.5.
    fixed_point = [np.rint((points * SUPERSAMPLING - 0.5) * 2**fraction_bits).astype(np.int32) for points in polygons]
    cv2.fillPoly(samples, fixed_point, 255, lineType=cv2.LINE_AA, shift=fraction_bits)
    return _shrink(samples.astype(np.float32) / 255, width, height)


def _light(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    towards_x, towards_y = rng.uniform(-0.15, 0.15, size=2).tolist()
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    return 1 + towards_x * x + towards_y * y[:, None]


@dataclass
class _Scene:
    image: np.ndarray  # float32 [S, S, 3], 0 to 255
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)  # pixels of each whole object
    visible: list[int] = field(default_factory=list)  # pixels of each that are inside the image and not covered

    def __post_init__(self) -> None:
        self.owner = np.zeros(self.image.shape[:2], dtype=np.int64)  # object visible at each pixel, 0 is background

    def add(self, name: str, sprite: _Sprite, left: int, top: int, min_visible: float) -> bool:
        """Draws an object over the others, unless less than the share `min_visible` of any object would be visible.

        Returns whether it was drawn.
        """
        height, width = sprite.opaque.shape
        rows = slice(max(top, 0), min(top + height, len(self.image)))
        columns = slice(max(left, 0), min(left + width, len(self.image)))
        inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        opaque = sprite.opaque[inside]
        covered = np.bincount(self.owner[rows, columns][opaque], minlength=len(self.names) + 1)[1:]
        visible = [*(np.array(self.visible, dtype=int) - covered), int(opaque.sum())]
        areas = [*self.areas, int(sprite.opaque.sum())]
        if any(shown < min_visible * area for shown, area in zip(visible, areas, strict=True)):
            return False

        self.names.append(name)
        self.areas, self.visible = areas, visible
        self.owner[rows, columns][opaque] = len(self.names)
        alpha = sprite.alpha[inside][..., None]
        self.image[rows, columns] += alpha * (sprite.rgb[inside] - self.image[rows, columns])
        ys, xs = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
        first = np.array([columns.start, rows.start, columns.start, rows.start]) + 1  # VOC counts pixels from 1
        self.boxes.append(tuple(first + [xs[0], ys[0], xs[-1], ys[-1]]))
        return True


def _place(rng: np.random.Generator, scene: _Scene, name: str, sprite: _Sprite, difficulty: float) -> None:
    """Adds an object at a random place where all objects stay visible enough; drops it if no try finds one."""
    sprite_size = np.array(sprite.opaque.shape)
    # The first object lies completely inside, so that it always fits and no image is empty.
    overhang = (0.2 * difficulty * sprite_size).astype(int) if scene.names else 0
    for _ in range(PLACEMENT_TRIES):
        top, left = rng.integers(-overhang, len(scene.image) - sprite_size + overhang + 1)
        if scene.add(name, sprite, left, top, min_visible=1 - 0.5 * difficulty):
            return


# --- Background, never in the saturated colours of the classes --------------------------------------------------------


def _muted_colour(rng: np.random.Generator) -> np.ndarray:
    return _rgb(rng.uniform(0, 360), rng.uniform(0, 0.22), rng.uniform(0.25, 0.9))


def _draw_background(rng: np.random.Generator, image_size: int, difficulty: float) -> np.ndarray:
    image = np.empty((image_size, image_size, 3), dtype=np.float32)
    image[:] = _muted_colour(rng)
    image += difficulty * (_slope(rng, image_size) + _grating(rng, image_size))[..., None]
    image += difficulty * _clouds(rng, image_size)
    _draw_blobs(rng, image, int(rng.integers(round(6 * difficulty), round(12 * difficulty) + 1)))
    _draw_lines(rng, image, int(rng.integers(round(8 * difficulty), round(18 * difficulty) + 1)))
    return image


def _slope(rng: np.random.Generator, image_size: int) -> np.ndarray:
    ramp = np.linspace(-1, 1, image_size, dtype=np.float32)
    towards_x, towards_y = rng.uniform(-35, 35, size=2).tolist()
    return towards_x * ramp + towards_y * ramp[:, None]


def _grating(rng: np.random.Generator, image_size: int) -> np.ndarray:
    angle, cycles = rng.uniform(0, np.pi), rng.uniform(4, 20)
    ramp = np.linspace(0, 2 * np.pi * cycles, image_size, dtype=np.float32)
    return rng.uniform(0, 14) * np.sin(math.cos(angle) * ramp + math.sin(angle) * ramp[:, None])


def _clouds(rng: np.random.Generator, image_size: int) -> np.ndarray:
    cells = rng.integers(4, 16)
    coarse = 18 * rng.standard_normal((cells, cells, 1), dtype=np.float32)
    coarse = coarse + 4 * rng.standard_normal((cells, cells, 3), dtype=np.float32)
    return cv2.resize(coarse, (image_size, image_size), interpolation=cv2.INTER_CUBIC)


def _draw_blobs(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    for _ in range(count):
        corners = int(rng.integers(3, 12))
        radii = len(image) * rng.uniform(0.03, 0.14) * rng.uniform(0.6, 1.0, size=(corners, 1))
        points = rng.uniform(0, len(image), size=2) + radii * _regular_polygon(corners)
        cv2.fillPoly(image, [points.astype(np.int32)], _muted_colour(rng).tolist())


def _draw_lines(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    for _ in range(count):
        start, end = rng.integers(0, len(image), size=(2, 2)).tolist()
        cv2.line(image, start, end, _muted_colour(rng).tolist(), thickness=int(rng.integers(1, 4)))


# --- Camera -----------------------------------------------------------------------------------------------------------


def _degrade(rng: np.random.Generator, image: np.ndarray, difficulty: float) -> np.ndarray:
    """The image as uint8; contrast, brightness, blur and noise degrade with `difficulty`."""
    contrast = 1 - difficulty * rng.uniform(0.15, 0.45)
    image = image * contrast + (128 * (1 - contrast) + 25 * difficulty * rng.uniform(-1, 1))
    sigma = difficulty * rng.uniform(0, 0.9) * len(image) / 160
    if sigma > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image += difficulty * rng.uniform(5, 18) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image, out=image), 0, 255, out=image).astype(np.uint8)
