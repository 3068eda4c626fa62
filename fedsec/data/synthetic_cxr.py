"""How the built-in chest X-rays are drawn: body, lungs, heart, ribs and vessels of a patient, and what ails them.

Bright is dense. Patients have one to four images of one anatomy; sites differ in scanner. A positive patient's
opacities can be too faint to see, and clear lungs can carry a harmless haze, so that no classifier is perfect.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import betaincinv

from fedsec.data.base import Dataset
from fedsec.data.drawing import Field3, elliptic_radius, grid, pink, pose, sigmoid, soft_line
from fedsec.data.synthetic import (
    Draws,
    Layout,
    Options,
    Scanner,
    Stream,
    build,
    checked_side,
    draw,
    generator,
    poisson,
    textures,
)
from fedsec.plugins import construct

FINDINGS = ("pneumonia", "cardiomegaly", "effusion", "nodule")
MAX_SPOTS = 5
SPOT = ("side", "reach", "angle", "radius")
WINDOWS = ((1.0, 0.0), (0.5, 0.225), (1.6, -0.175), (0.8, 0.1))
"""Gain and offset of the sites in turn, where `contrast` is 1."""
LUNG_DEPTH = 0.34
"""Intensity that air takes away."""

ANATOMY_NORMAL = {
    "body": (0.92, 0.03),
    "lung_x": (0.40, 0.02),
    "lung_y": (-0.06, 0.03),
    "lung_a": (0.27, 0.02),
    "lung_b": (0.60, 0.03),
    "lung_tilt": (0.12, 0.03),
    "dome": (0.46, 0.03),
    "dome_height": (0.14, 0.02),
    "heart_x": (0.10, 0.015),
    "heart_y": (0.26, 0.02),
    "heart_a": (0.22, 0.015),
    "heart_b": (0.27, 0.015),
    "rib_first": (-0.80, 0.03),
    "rib_step": (0.165, 0.008),
    "rib_bow": (0.42, 0.04),
    "rib_light": (0.055, 0.01),
}
ANATOMY_UNIFORM = {
    "rib_width": (0.022, 0.026),
    "findings": (0.0, 1.0, 4),
    "heart_growth": (1.38, 1.48),
    "fluid_side": (-1.0, 1.0),
    "fluid_depth": (0.10, 0.35),
    "nodule_side": (-1.0, 1.0),
    "nodule_reach": (0.0, 1.0),
    "nodule_angle": (0.0, 2 * np.pi),
    "nodule_radius": (0.05, 0.09),
    "nodule_light": (0.22, 0.40),
}
SCENE_NORMAL = {"shift_x": (0.0, 0.02), "shift_y": (0.0, 0.02), "turn": (0.0, 0.02), "aspect": (0.0, 0.25, MAX_SPOTS)}
SCENE_UNIFORM = {
    "spots": (0.0, 1.0),
    "severity": (0.0, 1.0),
    "side": (-1.0, 1.0, MAX_SPOTS),
    "reach": (0.0, 1.0, MAX_SPOTS),
    "angle": (0.0, 2 * np.pi, MAX_SPOTS),
    "radius": (0.10, 0.26, MAX_SPOTS),
    "haze": (0.0, 1.0),
    "haze_side": (-1.0, 1.0),
    "haze_reach": (0.0, 1.0),
    "haze_angle": (0.0, 2 * np.pi),
    "haze_radius": (0.06, 0.16),
    "haze_light": (0.02, 0.09),
}


@dataclass(frozen=True)
class ChestOptions(Options):
    """The dials of the chest X-rays."""

    labels: Annotated[
        Literal["binary", "multi"], Field(description="pneumonia or not, or the four findings side by side")
    ] = "binary"
    marker: Annotated[bool, Field(description="a bright block in a corner that tells the site")] = False
    contrast: Annotated[
        float, Field(ge=0, le=1, description="contrast shift: each site stores other grey levels; 0 none, 1 strong")
    ] = 0.0


Bools = npt.NDArray[np.bool_]


def load(path: Path | None = None, *, name: str = "synthetic-cxr", size: int | None = None, **options: Any) -> Dataset:
    """Built-in chest X-rays with patients and four sites; nothing to download.

    Args:
        path: not used: the images are drawn.
        name: of the data set.
        size: side in pixels; 28 by default.
        options: those of `ChestOptions`.
    """
    chosen = construct(ChestOptions, options, name)
    layout = Layout.of(chosen)
    streams = (generator(chosen.seed, Stream.PATIENT, p) for p in range(layout.patients))
    anatomy = draw(streams, ANATOMY_NORMAL, ANATOMY_UNIFORM)
    present = _findings(chosen, anatomy["findings"])
    multi = chosen.labels == "multi"
    labels = present.astype(np.float32) if multi else present[:, 0].astype(np.int64)
    side = checked_side(size)
    scanner = Scanner.of(chosen)
    return build(
        name=name,
        options=chosen,
        size=side,
        channels=1,
        layout=layout,
        labels=labels[layout.patient],
        class_names=FINDINGS if multi else ("no pneumonia", "pneumonia"),
        render=lambda rows: _render(chosen, layout, anatomy, present, scanner, side, rows),
        recipe=__name__,
    )


def _findings(options: ChestOptions, u: npt.NDArray[np.float32]) -> Bools:
    """(P, 4) which patient has which finding; in the binary set the other three are rare, and a nuisance."""
    site = np.arange(len(u)) % options.sites
    others = 0.2 if options.labels == "multi" else 0.05
    return np.asarray(u < np.stack([np.array(options.site_prevalence())[site], *[np.full(len(u), others)] * 3], axis=1))


def _render(
    options: ChestOptions,
    layout: Layout,
    anatomy: Draws,
    present: Bools,
    scanner: Scanner,
    size: int,
    rows: slice,
) -> Field3:
    patient, image = layout.patient[rows], layout.image[rows]
    site = patient % options.sites
    keys = zip(patient.tolist(), image.tolist(), strict=True)
    scene = draw((generator(options.seed, Stream.SCENE, *key) for key in keys), SCENE_NORMAL, SCENE_UNIFORM)
    own = {name: values[patient] for name, values in anatomy.items()}
    vessels, patches, noise = textures(options.seed, layout, rows, size, 3)

    x, y = pose(size, scene["shift_x"], scene["shift_y"], scene["turn"], scanner.zoom[site])
    ill = {name: present[patient, i, None, None] for i, name in enumerate(FINDINGS)}
    chest = _Chest.of(x, y, own)
    light = chest.skeleton(own, 2 / size) + chest.heart(own, ill["cardiomegaly"]) + chest.vessels(vessels)
    light += _opacities(chest, own, scene, patches, options.severity) * ill["pneumonia"]
    light += chest.fluid(own) * ill["effusion"]
    light += chest.spot(own, *(own[f"nodule_{k}"] for k in SPOT)) * own["nodule_light"] * ill["nodule"]
    haze = chest.spot(own, *(scene[f"haze_{k}"] for k in SPOT)) * scene["haze_light"]
    light += haze * (scene["haze"] < 0.35)
    if options.marker:
        light += _marker(size, site)
    image = scanner.acquire(light, noise, site)
    return _stored(image, site, options.contrast) if options.contrast else image


@dataclass(frozen=True, eq=False)
class _Chest:
    """The fields that everything else is drawn on: (B, S, S) each, but for the coordinates' sides."""

    x: Field3
    y: Field3
    body: Field3
    lung: Field3
    air: Field3
    """What the lungs take away."""
    floor: Field3
    """Height of the diaphragm."""

    @classmethod
    def of(cls, x: Field3, y: Field3, a: Draws) -> _Chest:
        half = a["body"] * (1 - 0.22 * sigmoid((-y - 0.55) / 0.12))
        body = sigmoid((1 - np.abs(x / half) ** 3 - np.abs(y / 1.25) ** 6) / 0.06)
        left = x < 0
        r = elliptic_radius(
            np.abs(x), y, a["lung_x"], a["lung_y"], a["lung_a"] * np.where(left, 1, 0.96), a["lung_b"], -a["lung_tilt"]
        )
        floor = _floor(np.abs(x), np.where(left, 1, 0.7).astype(np.float32), a)
        lung = sigmoid((1 - r) / 0.08) * sigmoid((floor - y) / 0.03)
        air = LUNG_DEPTH * lung * (0.75 + 0.25 * np.maximum(1 - r, 0))
        return cls(x, y, body, lung, air, floor)

    def skeleton(self, a: Draws, pixel: float) -> Field3:
        """Body, air, spine, mediastinum, trachea, ribs and clavicles."""
        x, y, side = self.x, self.y, np.abs(self.x)
        light: Field3 = 0.52 * self.body - self.air + 0.16 * np.exp(-((x / 0.11) ** 2)) * self.body
        light -= 0.06 * np.exp(-((x / 0.045) ** 2)) * sigmoid((-0.35 - y) / 0.04)
        chest_wall = self.body * sigmoid((side - 0.08) / 0.02) * sigmoid((0.85 - side) / 0.02)
        bow = a["rib_bow"] * (side - 0.1) ** 2 - 0.10 * side
        for i in range(9):
            centre = a["rib_first"] + i * a["rib_step"] + bow
            light += a["rib_light"] * chest_wall * soft_line(y - centre, a["rib_width"], pixel)
        clavicle = -0.72 - 0.18 * (side - 0.35)
        return np.asarray(
            light + 0.10 * chest_wall * sigmoid((0.72 - side) / 0.03) * soft_line(y - clavicle, 0.03, pixel)
        )

    def heart(self, a: Draws, large: Bools) -> Field3:
        """The heart, enlarged towards the image's right where asked."""
        half = a["heart_a"] * np.where(large, a["heart_growth"], 1)
        cx = a["heart_x"] + (half - a["heart_a"]) / 2
        r = elliptic_radius(self.x, self.y, cx, a["heart_y"], half, a["heart_b"] * np.where(large, 1.12, 1), -0.5)
        return 0.27 * sigmoid((1 - r) / 0.10) * self.body * np.clip(self.lung + 0.25, 0, 1)

    def vessels(self, white: Field3) -> Field3:
        """Branching texture, densest around the hila."""
        hila = np.exp(-(((np.abs(self.x) - 0.2) / 0.18) ** 2) - ((self.y + 0.02) / 0.35) ** 2)
        return self.lung * (0.035 * (0.5 + hila) * pink(white, 1.1) + 0.06 * hila)

    def fluid(self, a: Draws) -> Field3:
        """An effusion: what replaces the air above the diaphragm on one side, higher at the chest wall."""
        here = sigmoid(self.x * np.sign(a["fluid_side"]) / 0.03)
        wall = np.maximum(np.abs(self.x) - a["lung_x"], 0) / a["lung_a"]
        level = a["dome"] - a["dome_height"] / 2 - a["fluid_depth"] - 0.12 * wall**2
        return (self.air + 0.02 * self.lung) * here * sigmoid((self.y - level) / 0.03)

    def spot(self, a: Draws, side: Field3, reach: Field3, angle: Field3, radius: Field3, aspect: Any = 1.0) -> Field3:
        """A soft blob of height 1 inside the lung core, from uniform draws."""
        cx = a["lung_x"] + 0.75 * np.sqrt(reach) * np.cos(angle) * a["lung_a"]
        cy = a["lung_y"] + 0.75 * np.sqrt(reach) * np.sin(angle) * a["lung_b"]
        lowest = _floor(cx, np.where(side < 0, np.float32(1), np.float32(0.7)), a) - 0.05
        cy = np.where(cy > lowest, 2 * lowest - cy, cy)
        r = elliptic_radius(self.x, self.y, np.sign(side) * cx, cy, radius * aspect, radius / aspect)
        return np.asarray(np.exp(-(r**2)) * np.clip(self.lung + 0.15, 0, 1))


def _floor(distance: Field3, flatness: Field3, a: Draws) -> Field3:
    """Height of the diaphragm's dome at a distance from the midline."""
    h = a["dome_height"]
    return np.asarray(a["dome"] + h / 2 - flatness * h * (1 - ((distance - a["lung_x"]) / 0.35) ** 2))


def _opacities(chest: _Chest, a: Draws, scene: Draws, white: Field3, severity: float) -> Field3:
    """Pneumonia: one to five patchy opacities, and a veil over the lungs."""
    s = betaincinv(2, 2.2, scene["severity"]).astype(np.float32) * severity
    count = 1 + poisson(scene["spots"], 1.2, MAX_SPOTS - 1)
    total = np.zeros_like(chest.lung)
    for j in range(MAX_SPOTS):
        side, reach, angle, radius, aspect = (scene[k][:, j, None, None] for k in (*SPOT, "aspect"))
        total += chest.spot(a, side, reach, angle, radius, np.exp(aspect)) * (count > j)
    patchy: Field3 = (0.04 * severity + 0.16 * s) * total * (1 + 0.35 * pink(white, 0.8))
    patchy += 0.03 * s * chest.lung
    return patchy


def _stored(image: Field3, site: npt.NDArray[np.int64], contrast: float) -> Field3:
    """Each site's own window of grey levels: a gain around 0.5 and an offset, clipped."""
    gain, offset = np.array(WINDOWS, dtype=np.float32)[site % len(WINDOWS)].T[:, :, None, None]
    return np.asarray(np.clip(0.5 + gain**contrast * (image - 0.5) + contrast * offset, 0, 1))


def _marker(size: int, site: npt.NDArray[np.int64]) -> Field3:
    """A bright block in one of four corners, the site's own: a deliberate shortcut."""
    x, y = grid(size)
    right, low = np.where(site % 2 == 0, -1, 1), np.where(site // 2 % 2 == 0, -1, 1)
    dx, dy = x - 0.82 * right[:, None, None], y - 0.82 * low[:, None, None]
    return (0.9 * (np.maximum(np.abs(dx), np.abs(dy)) < 0.1)).astype(np.float32)
