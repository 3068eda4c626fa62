"""How the built-in skin lesions are drawn: skin of every tone, a pigmented lesion, hair, and a dermatoscope.

Malignant lesions tend to be larger, irregular, asymmetric and many-coloured; the ranges overlap, and some lesions
look like the other class, so that no classifier is perfect.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

from fedsec.data.base import Dataset
from fedsec.data.drawing import Field3, pink, pose, sigmoid
from fedsec.data.synthetic import (
    Draws,
    Ints,
    Layout,
    Options,
    Scanner,
    Stream,
    build,
    checked_side,
    draw,
    generator,
    poisson,
    site_draws,
    textures,
)
from fedsec.plugins import construct

ATYPICAL = 0.05
"""Share of lesions that look like the other class."""
MAX_PATCHES = 4
MAX_HAIRS = 8
HARMONICS = np.arange(2, 10)
HAIR_SEGMENTS = 10
TONES = np.array([(0.95, 0.80, 0.72), (0.84, 0.62, 0.50), (0.62, 0.42, 0.31), (0.36, 0.23, 0.17)], dtype=np.float32)
"""Anchor colours from light to dark skin."""
PIGMENTS = np.array(
    [
        (0.58, 0.38, 0.24),  # light brown
        (0.36, 0.22, 0.14),  # dark brown
        (0.13, 0.10, 0.10),  # black
        (0.70, 0.28, 0.26),  # red
        (0.40, 0.44, 0.52),  # blue-grey
        (0.90, 0.86, 0.84),  # white
    ],
    dtype=np.float32,
)
PATCH_SHARES = np.array([(0.40, 0.50, 0.05, 0.05, 0.0, 0.0), (0.05, 0.20, 0.30, 0.15, 0.20, 0.10)])
"""(benign, malignant) x pigment: which colour a patch takes."""
LESION_RANGES = {
    "irregularity": ((0.0, 0.10), (0.06, 0.21)),
    "asymmetry": ((0.0, 0.18), (0.10, 0.40)),
    "radius": ((0.26, 0.56), (0.34, 0.64)),
    "edge": ((0.03, 0.12), (0.03, 0.16)),
}
"""Benign and malignant."""

LESION_NORMAL = {"tone": (0.0, 0.12), "border": (0.0, 1.0, 8), "aspect": (0.0, 0.18)}
LESION_UNIFORM = {
    "malignant": (0.0, 1.0),
    "atypical": (0.0, 1.0),
    "irregularity": (0.0, 1.0),
    "asymmetry": (0.0, 1.0),
    "radius": (0.0, 1.0),
    "edge": (0.0, 1.0),
    "patches": (0.0, 1.0),
    "patch_colour": (0.0, 1.0, MAX_PATCHES),
    "patch_weight": (0.45, 0.90, MAX_PATCHES),
    "patch_level": (0.2, 1.0, MAX_PATCHES),
    "phase": (0.0, 2 * np.pi, 8),
    "opacity": (0.88, 0.99),
    "brown": (0.0, 1.0),
    "dark_angle": (0.0, 2 * np.pi),
}
SCENE_NORMAL = {"shift_x": (0.0, 0.06), "shift_y": (0.0, 0.06), "scale": (0.0, 0.05)}
SCENE_UNIFORM = {
    "turn": (0.0, 2 * np.pi),
    "light_angle": (0.0, 2 * np.pi),
    "hairs": (0.0, 1.0),
    "hair_ends": (-1.1, 1.1, 6 * MAX_HAIRS),
    "hair_width": (0.006, 0.014, MAX_HAIRS),
    "hair_depth": (0.5, 0.9, MAX_HAIRS),
}


@dataclass(frozen=True)
class _Site:
    """What differs between clinics beside the camera; each field is (S, …)."""

    tone: npt.NDArray[np.float64]
    hair: npt.NDArray[np.float64]
    gains: npt.NDArray[np.float64]
    """(S, 3) white balance."""
    circle: npt.NDArray[np.float64]
    """Darkness outside the dermatoscope's circle, which half of the sites have."""

    @classmethod
    def of(cls, options: Options) -> _Site:
        u = site_draws(options, 5, skip=7)
        return cls(
            tone=0.3 + options.shift * (0.05 + 0.60 * u[:, 0] - 0.3),
            hair=np.maximum(1 + options.shift * (3 * u[:, 1] - 1), 0),
            gains=1 + options.shift * (-0.14 + 0.28 * u[:, 2:5]),
            circle=np.where(np.arange(options.sites) % 2 == 1, 0.85 * min(options.shift, 1.0), 0.0),
        )


def load(path: Path | None = None, *, name: str = "synthetic-skin", size: int | None = None, **options: Any) -> Dataset:
    """Built-in skin lesions with patients and four sites; nothing to download.

    Args:
        path: not used: the images are drawn.
        name: of the data set.
        size: side in pixels; 28 by default.
        options: those of `synthetic.Options`.
    """
    chosen = construct(Options, options, name)
    layout = Layout.of(chosen)
    streams = (generator(chosen.seed, Stream.PATIENT, p) for p in range(layout.patients))
    lesion = draw(streams, LESION_NORMAL, LESION_UNIFORM)
    prevalence = np.array(chosen.site_prevalence())[np.arange(layout.patients) % chosen.sites]
    malignant = lesion["malignant"][:, 0, 0] < prevalence
    lesion |= _features(lesion, malignant ^ (lesion["atypical"][:, 0, 0] < ATYPICAL), chosen.severity)
    side = checked_side(size)
    site, scanner = _Site.of(chosen), Scanner.of(chosen).scaled(offset=0.6, noise=0.7)
    return build(
        name=name,
        options=chosen,
        size=side,
        channels=3,
        layout=layout,
        labels=malignant.astype(np.int64)[layout.patient],
        class_names=("benign", "malignant"),
        render=lambda rows: _render(chosen, layout, lesion, site, scanner, side, rows),
        recipe=__name__,
    )


def _features(u: Draws, malignant: npt.NDArray[np.bool_], severity: float) -> Draws:
    """What a lesion looks like: its uniform draws scaled to the ranges of its class.

    `severity` moves the malignant ranges away from (above 1) or towards (below 1) the benign ones.
    """
    strength = malignant[:, None, None] * np.float32(severity)
    found = {}
    for name, (benign, bad) in LESION_RANGES.items():
        low, high = (np.float32(b) + strength * np.float32(m - b) for b, m in zip(benign, bad, strict=True))
        found[name] = low + (high - low) * u[name]
    counts = np.where(malignant, _binomial(u["patches"][:, 0, 0], 4, 0.5), _binomial(u["patches"][:, 0, 0], 2, 0.35))
    cdf = np.cumsum(PATCH_SHARES, axis=1)[malignant.astype(int)]
    colour = (u["patch_colour"][:, :, None] > cdf[:, None, :-1]).sum(-1)
    return {**found, "patches": counts, "patch_colour": colour}


def _binomial(u: npt.NDArray[np.float32], n: int, p: float) -> Ints:
    """Binomial counts from uniform numbers (B,)."""
    return np.asarray((u[:, None] > bdtr(np.arange(n), n, p)).sum(-1))


def _render(
    options: Options, layout: Layout, lesion: Draws, clinic: _Site, scanner: Scanner, size: int, rows: slice
) -> Field3:
    patient, image = layout.patient[rows], layout.image[rows]
    site = patient % options.sites
    keys = zip(patient.tolist(), image.tolist(), strict=True)
    scene = draw((generator(options.seed, Stream.SCENE, *key) for key in keys), SCENE_NORMAL, SCENE_UNIFORM)
    own = {name: values[patient] for name, values in lesion.items()}
    white = textures(options.seed, layout, rows, size, MAX_PATCHES + 4)

    # The frame of the picture: light, hair and the dermatoscope do not turn with the lesion.
    still = np.zeros_like(scene["turn"])
    fx, fy = pose(size, still, still, still, scanner.zoom[site])
    scale = np.exp(scene["scale"])[:, 0, 0] * scanner.zoom[site]
    x, y = pose(size, scene["shift_x"], scene["shift_y"], scene["turn"], scale)

    tone = np.clip(clinic.tone[site][:, None, None] + own["tone"], 0, 1)
    skin = _skin(tone) * (1 + 0.03 * pink(white[MAX_PATCHES], 0.9))[..., None]
    mask, pigment = _lesion(own, x, y, white[:MAX_PATCHES])
    # Pigment under dark skin is darker too.
    pigment = pigment * (0.45 + 0.55 * _skin(tone).mean(-1, keepdims=True) / TONES[0].mean())
    picture = skin + (mask * own["opacity"])[..., None] * (pigment - skin)
    picture = (
        picture * (1 - _hair(scene, fx, fy, poisson(scene["hairs"][:, 0, 0], clinic.hair[site], MAX_HAIRS)))[..., None]
    )
    gradient = 1 + 0.10 * (np.cos(scene["light_angle"]) * fx + np.sin(scene["light_angle"]) * fy)
    circle = 1 - clinic.circle[site][:, None, None] * sigmoid((np.hypot(fx, fy) - 1.12) / 0.03)
    picture = picture * (gradient * circle)[..., None] * clinic.gains[site].astype(np.float32)[:, None, None, :]
    channels = [scanner.acquire(picture[..., c], white[MAX_PATCHES + 1 + c], site) for c in range(3)]
    return np.stack(channels, axis=-1)


def _skin(tone: Field3) -> Field3:
    """(B, 1, 1, 3) colour of a tone in [0, 1], light to dark."""
    place = np.clip(tone, 0, 1) * (len(TONES) - 1)
    lower = np.minimum(place.astype(int), len(TONES) - 2)
    return np.asarray(TONES[lower] + (place - lower)[..., None] * (TONES[lower + 1] - TONES[lower]))


def _lesion(a: Draws, x: Field3, y: Field3, white: Field3) -> tuple[Field3, Field3]:
    """The lesion's mask (B, S, S) and its colours (B, S, S, 3)."""
    stretch = np.exp(a["aspect"] / 2)
    x, y = x / stretch, y * stretch
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    outline = np.ones_like(r)
    for i, k in enumerate(HARMONICS):
        size = a["irregularity"] * a["border"][:, i, None, None] * (1.6 / k)
        outline += size * np.cos(k * theta + a["phase"][:, i, None, None])
    edge = a["radius"] * np.maximum(outline, 0.25)
    mask = sigmoid((edge - r) / (a["edge"] * a["radius"] + 0.01))

    centre = a["asymmetry"] * a["radius"]
    dx, dy = x - centre * np.cos(a["dark_angle"]), y - centre * np.sin(a["dark_angle"])
    depth = np.exp(-(dx**2 + dy**2) / (0.6 * a["radius"]) ** 2)
    colour = PIGMENTS[0] + a["brown"][..., None] * (PIGMENTS[1] - PIGMENTS[0])
    colour = colour * (1.1 - 0.35 * depth)[..., None]
    for j in range(MAX_PATCHES):
        field = sigmoid((pink(white[j], 1.6) - a["patch_level"][:, j, None, None]) / 0.15)
        weight = field * a["patch_weight"][:, j, None, None] * (a["patches"] > j)[:, None, None]
        colour = colour + weight[..., None] * (PIGMENTS[a["patch_colour"][:, j]][:, None, None, :] - colour)
    return mask, colour


def _hair(scene: Draws, x: Field3, y: Field3, count: Ints) -> Field3:
    """(B, S, S) how much light the strands take: quadratic Bezier curves, dimmed to what a pixel can show."""
    dark = np.zeros(x.shape, dtype=np.float32)
    owner, strand = np.nonzero(np.arange(MAX_HAIRS) < count[:, None])
    ends = scene["hair_ends"].reshape(-1, MAX_HAIRS, 3, 2)[owner, strand]
    t = np.linspace(0, 1, HAIR_SEGMENTS + 1, dtype=np.float32)[:, None, None]
    curve = ((1 - t) ** 2 * ends[:, 0] + 2 * t * (1 - t) * ends[:, 1] + t**2 * ends[:, 2])[..., None, None]
    nearest = np.full((len(owner), *x.shape[1:]), np.inf, dtype=np.float32)
    for start, end in pairwise(curve):
        (sx, sy), (ux, uy) = start.swapaxes(0, 1), (end - start).swapaxes(0, 1)
        dx, dy = x[owner] - sx, y[owner] - sy
        along = np.clip((dx * ux + dy * uy) / (ux * ux + uy * uy + 1e-12), 0, 1)
        np.minimum(nearest, (dx - along * ux) ** 2 + (dy - along * uy) ** 2, out=nearest)
    width = scene["hair_width"][owner, strand][:, None, None]
    seen = np.hypot(width, 1 / x.shape[-1])
    shade = scene["hair_depth"][owner, strand][:, None, None] * width / seen * np.exp(-nearest / seen**2)
    np.maximum.at(dark, owner, shade)
    return dark
