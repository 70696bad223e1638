"""Samples for real ONNX files: crops of photos, rendered text, sounds like speech, files; and how detections are read from outputs.

Photos are those that scikit-learn and scikit-image ship. Everything is drawn from a seed, so that two seeds have different samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import signal

Array = NDArray[Any]
Arrays = dict[str, Array]
Boxes = tuple[Array, Array, Array]
"""Of one image: corners `[n, 4]` as x0, y0, x1, y1; scores `[n]`; classes `[n]`."""

PEOPLE = ("astronaut", "camera")
"""Photos that show people, from which every other crop is taken."""
PHOTOS = (
    *PEOPLE,
    "chelsea",
    "coffee",
    "motorcycle_left",
    "motorcycle_right",
    "rocket",
    "color",
    "ihc",
    "retina",
    "brick",
    "page",
    "coins",
)
WORDS = (  # noqa: SIM905 - a text is easier to read
    "the quick brown fox jumps over a lazy dog while Invoice No. 20418 of March 1997 waits; Total: 1,284.50 EUR! call (030) 555-0199 "
    "ROOM 7B exit only & Coffee 50% off www.example.org/index Straight Ahead Zebra KIWI xylophone 3.14159 OPEN 24 HOURS"
).split()
SCORE = 0.25
OVERLAP = 0.5
SUPPRESS = 0.45
"""Scores from which a detection counts, the overlap of two that are the same, and that from which the lesser one is dropped."""


@cache
def photos(folder: Path) -> tuple[dict[str, Array], tuple[str, ...]]:
    """All photos as uint8 `[height, width, 3]`; `folder` holds the unpacked wheel of scikit-image. Beside them the names, in order."""
    import sklearn

    paths = [p for name in PHOTOS for p in folder.glob(f"scikit_image-*/skimage/data/{name}.*")]
    paths += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    if len(paths) < len(PHOTOS):
        sys.exit(f"error: '{folder}' has only {len(paths)} photos: run with --fetch '{folder}' first")
    found = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in paths}
    return found, tuple(found)


def crops(folder: Path, count: int, height: int, width: int, seed: int) -> Array:
    """uint8 `[count, height, width, 3]` in RGB: random places, sizes, flips and contrasts."""
    images, names = photos(folder)
    random = np.random.default_rng(seed)
    made = np.empty((count, height, width, 3), np.uint8)
    for position in range(count):
        of = PEOPLE if position % 2 == 0 else names
        image = images[of[random.integers(len(of)) if position % 4 else 0]]
        share = random.uniform(0.3, 1.0)
        high, wide = image.shape[:2]
        unit = share * min(high / height, wide / width)
        h, w = max(int(unit * height), 8), max(int(unit * width), 8)
        top, left = random.integers(high - h + 1), random.integers(wide - w + 1)
        piece = Image.fromarray(image[top : top + h, left : left + w]).resize((width, height), Image.Resampling.BILINEAR)
        array = np.asarray(piece, np.float32) * random.uniform(0.7, 1.15) + random.uniform(-15, 15)
        array = array[:, ::-1] if random.random() < 0.5 else array
        made[position] = array.clip(0, 255)
    return made


def line(random: np.random.Generator, height: int, width: int, background: Array | None = None) -> Array:
    """uint8 `[height, width, 3]`: one line of text."""
    paper, ink = (random.integers(150, 256, 3), random.integers(0, 90, 3))
    if random.random() < 0.25:
        paper, ink = ink, paper
    image = Image.new("RGB", (width, height), tuple(map(int, paper))) if background is None else Image.fromarray(background)
    size = int(height * random.uniform(0.5, 0.8))
    text = " ".join(WORDS[i] for i in random.integers(len(WORDS), size=max(1, width // (size * 3))))
    draw = ImageDraw.Draw(image)
    draw.text((random.integers(1, 8), random.integers(0, max(1, height - int(1.2 * size)))), text, tuple(map(int, ink)), font(size))
    array = np.asarray(image, np.float32) + random.normal(0, random.uniform(1, 8), (height, width, 3))
    return array.clip(0, 255).astype(np.uint8)


@cache
def font(size: int) -> Any:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def lines(count: int, height: int, width: int, seed: int, turned: bool = False) -> Array:
    """uint8 `[count, height, width, 3]`: lines of text; with `turned`, every other one upside down."""
    random = np.random.default_rng(seed)
    made = np.stack([line(random, height, width) for _ in range(count)])
    if turned:
        made[1::2] = made[1::2, ::-1, ::-1]
    return made


def pages(folder: Path, count: int, height: int, width: int, seed: int) -> Array:
    """uint8 `[count, height, width, 3]`: crops of photos, with lines of text put over them."""
    made = crops(folder, count, height, width, seed)
    random = np.random.default_rng(seed + 1)
    for image in made:
        for _ in range(random.integers(1, 6)):
            h, w = int(random.integers(18, max(20, height // 6))), int(random.integers(width // 4, width * 3 // 4))
            top, left = random.integers(height - h), random.integers(width - w)
            under = np.ascontiguousarray(image[top : top + h, left : left + w]) if random.random() < 0.5 else None
            image[top : top + h, left : left + w] = line(random, h, w, under)
    return made


def speech(count: int, length: int, rate: int, seed: int) -> Array:
    """float32 `[count, length]` within [-1, 1]: voiced syllables with formants, bursts of hiss, pauses, and noise below."""
    random = np.random.default_rng(seed)
    made = np.empty((count, length), np.float32)
    for sound in made:
        time = np.arange(length) / rate
        pitch = random.uniform(85, 260) * 2 ** (0.15 * np.sin(2 * np.pi * random.uniform(0.3, 2) * time + random.uniform(0, 6)))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        voiced, hiss = np.zeros(length), np.zeros(length)
        start = random.uniform(0, 0.1)
        while start * rate < length:
            spent = random.uniform(0.08, 0.3)
            part = slice(int(start * rate), min(length, int((start + spent) * rate)))
            window = np.hanning(part.stop - part.start) * random.uniform(0.2, 1)
            if random.random() < 0.7:
                formants = [random.uniform(300, 900), random.uniform(900, 2400), random.uniform(2400, 3400)]
                for harmonic in range(1, min(30, int(0.45 * rate / pitch.max()))):
                    at = harmonic * pitch[part].mean()
                    level = sum(np.exp(-(((at - f) / (90 + 0.1 * f)) ** 2)) for f in formants) + 0.3 / harmonic
                    voiced[part] += level * window * np.sin(harmonic * phase[part])
            else:
                low = random.uniform(1500, 3500)
                band = signal.butter(2, [low, min(low * 1.8, 0.45 * rate)], "bandpass", fs=rate, output="sos")
                hiss[part] += window * signal.sosfilt(band, random.normal(size=part.stop - part.start))
            start += spent + (random.uniform(0.2, 0.6) if random.random() < 0.2 else random.uniform(0, 0.06))
        whole = voiced / (abs(voiced).max() + 1e-9) + 0.4 * hiss / (abs(hiss).max() + 1e-9)
        whole = whole / (abs(whole).max() + 1e-9) * random.uniform(0.05, 0.8)
        sound[:] = (whole + random.normal(0, 10 ** random.uniform(-4, -1.7), length)).clip(-1, 1)
    return made


def file_heads(count: int, size: int, padding: int, seed: int) -> Array:
    """int32 `[count, 2 * size]`: the first and the last bytes of files of this Python installation, filled up with `padding`."""
    roots = [Path(np.__file__).parent.parent, Path(Path(sys.modules["functools"].__file__ or "").parent)]
    kinds: dict[str, list[Path]] = {}
    for path in sorted(p for root in roots for p in root.glob("*/**/*") if p.suffix and p.parent.name != "__pycache__"):
        if path.is_file() and len(kinds.setdefault(path.suffix, [])) < 400 and path.stat().st_size >= 64:
            kinds[path.suffix].append(path)
    random = np.random.default_rng(seed)
    names = sorted(kind for kind, found in kinds.items() if found)
    made = np.full((count, 2 * size), padding, np.int32)
    for row in made:
        found = kinds[names[random.integers(len(names))]]
        content = found[random.integers(len(found))].read_bytes()
        head, tail = content[:4096].lstrip()[:size], content[-4096:].rstrip()[-size:]
        row[: len(head)] = np.frombuffer(head, np.uint8)
        row[len(row) - len(tail) :] = np.frombuffer(tail, np.uint8)
    return made


def planar(images: Array, mean: float | Sequence[float], std: float | Sequence[float], bgr: bool = False) -> Array:
    """uint8 `[n, h, w, 3]` in RGB as float32 `[n, 3, h, w]`: (x - mean) / std, in the order BGR where asked."""
    ordered = images[..., ::-1] if bgr else images
    return np.ascontiguousarray(((ordered - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2), np.float32)


def nudenet(outputs: Sequence[Array]) -> list[Boxes]:
    """YOLOv8: `[n, 4 + classes, places]` with centres and sizes in pixels."""
    (made,) = outputs
    return [kept(centred(each[:4].T), each[4:].max(0), each[4:].argmax(0)) for each in made]


def slim_faces(outputs: Sequence[Array]) -> list[Boxes]:
    """Scores `[n, places, 2]` of background and face, and corners `[n, places, 4]` in shares of the image."""
    scores, corners = outputs
    return [kept(c, s[:, 1], np.zeros(len(s), int)) for s, c in zip(scores, corners, strict=True)]


def yolox(outputs: Sequence[Array]) -> list[Boxes]:
    """YOLOX for 416 x 416: `[n, places, 4 + 1 + classes]`, whose boxes are relative to a grid."""
    (made,) = outputs
    grids, strides = [], []
    for stride in (8, 16, 32):
        side = 416 // stride
        x, y = np.meshgrid(np.arange(side), np.arange(side))
        grids.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((side * side, 1), stride))
    grid, step = np.concatenate(grids), np.concatenate(strides)
    found = []
    for each in made:
        boxes = np.concatenate([(each[:, :2] + grid) * step, np.exp(each[:, 2:4].clip(-20, 20)) * step], 1)
        classes = each[:, 5:]
        found.append(kept(centred(boxes), each[:, 4] * classes.max(1), classes.argmax(1)))
    return found


def centred(boxes: Array) -> Array:
    """Corners of boxes that are given as centres and sizes."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)


def kept(corners: Array, scores: Array, classes: Array) -> Boxes:
    """What is left after the threshold and greedy suppression within each class."""
    above = np.flatnonzero(scores > SCORE)
    order = above[np.argsort(-scores[above], kind="stable")]
    chosen: list[int] = []
    while len(order):
        first, rest = int(order[0]), order[1:]
        chosen.append(first)
        same = (classes[rest] == classes[first]) & (overlaps(corners[first], corners[rest]) > SUPPRESS)
        order = rest[~same]
    return corners[chosen], scores[chosen], classes[chosen]


def overlaps(box: Array, boxes: Array) -> Array:
    """Intersection over union of one box and several."""
    size = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = size.clip(0).prod(1)
    area, areas = (box[2:] - box[:2]).clip(0).prod(), (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    return np.asarray(common / np.maximum(area + areas - common, 1e-12))


def matched(wanted: Sequence[Boxes], made: Sequence[Boxes]) -> dict[str, int]:
    """How many detections are `wanted`, how many of them were `found`, each by one of its own, and how many of the others are `new`."""
    counts = {"wanted": 0, "found": 0, "new": 0}
    for (corners, _, classes), (others, _, kinds) in zip(wanted, made, strict=True):
        free = np.ones(len(others), bool)
        counts["wanted"] += len(corners)
        for corner, kind in zip(corners, classes, strict=True):
            shares = np.where(free & (kinds == kind), overlaps(corner, others), 0) if len(others) else np.zeros(0)
            if len(shares) and shares.max() > OVERLAP:
                free[shares.argmax()] = False
                counts["found"] += 1
        counts["new"] += int(free.sum())
    return counts


def marked(threshold: float) -> Callable[[Sequence[Array], Sequence[Array]], dict[str, int]]:
    """`matched` for maps: pixels above a threshold."""

    def counted(wanted: Sequence[Array], made: Sequence[Array]) -> dict[str, int]:
        right, other = wanted[0] > threshold, made[0] > threshold
        return {"wanted": int(right.sum()), "found": int((right & other).sum()), "new": int((other & ~right).sum())}

    return counted


def detected(decode: Callable[[Sequence[Array]], list[Boxes]]) -> Callable[[Sequence[Array], Sequence[Array]], dict[str, int]]:
    """`matched` for what `decode` reads from outputs."""
    return lambda wanted, made: matched(decode(wanted), decode(made))
