"""What the two built-in generators share: random streams, patients, sites and their scanners.

Every draw comes from a stream named by (seed, purpose, patient, image), so an image depends neither on how many
images there are nor on which of them are asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import pdtr

from fedsec.data.base import Dataset
from fedsec.data.cache import cached
from fedsec.data.digest import fingerprint, image_digests
from fedsec.data.drawing import Field3, blur_matrix, grid
from fedsec.data.images import ArrayImages, Pixels, checked_size
from fedsec.data.report import LoadReport, with_contents
from fedsec.data.splits import derived_split
from fedsec.errors import ConfigError

Ints = npt.NDArray[np.int64]
Draws = dict[str, npt.NDArray[Any]]
"""Name -> (B, 1, 1), or (B, n) for a vector."""
Table = Mapping[str, tuple[float, ...]]
"""Name -> (mean, standard deviation) or (low, high), and optionally how many."""
BLOCK_PIXELS = 256 * 28 * 28


class Stream(IntEnum):
    """The purposes of randomness; each has its own streams."""

    LAYOUT = 0
    SITE = 1
    PATIENT = 2
    SCENE = 3
    TEXTURE = 4


@dataclass(frozen=True)
class Options:
    """The dials of both generators."""

    images: Annotated[int, Field(ge=1, le=1_000_000, description="number of images")] = 2800
    seed: Annotated[int, Field(ge=0, description="other patients, other scanners")] = 0
    sites: Annotated[int, Field(ge=1, le=1000, description="hospitals; patient p belongs to site p mod sites")] = 4
    prevalence: Annotated[
        float | tuple[float, ...], Field(description="share of patients with the disease, or one share a site")
    ] = 0.5
    shift: Annotated[float, Field(ge=0, le=2, description="acquisition differences: 0 one scanner, 1 default")] = 1.0
    severity: Annotated[float, Field(ge=0, le=3, description="how visible the disease is")] = 1.0

    def __post_init__(self) -> None:
        shares = self.site_prevalence()
        if len(shares) != self.sites or min(shares) < 0 or max(shares) > 1:
            raise ValueError(f"prevalence={self.prevalence}: give one share in [0, 1], or one for each of the sites")

    def site_prevalence(self) -> tuple[float, ...]:
        """The share of patients with the disease at each site."""
        return (self.prevalence,) * self.sites if isinstance(self.prevalence, float) else tuple(self.prevalence)


@dataclass(frozen=True)
class Layout:
    """Who is on which image."""

    patient: Ints
    """(N,) patient of each image, ascending."""
    image: Ints
    """(N,) number of the image among the patient's own."""

    @property
    def patients(self) -> int:
        """Number of patients."""
        return int(self.patient[-1]) + 1

    @classmethod
    def of(cls, options: Options) -> Layout:
        """1 to 4 images a patient, 1.4 on average, until there are enough."""
        counts: list[int] = []
        total = 0
        while total < options.images:
            counts.append(min(int(generator(options.seed, Stream.LAYOUT, len(counts)).geometric(0.7)), 4))
            total += counts[-1]
        patient = np.repeat(np.arange(len(counts)), counts)
        image = np.concatenate([np.arange(c) for c in counts])
        return cls(patient[: options.images], image[: options.images])


@dataclass(frozen=True)
class Scanner:
    """How sites turn a scene into an image; each field is (S,) for S sites."""

    contrast: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]
    gamma: npt.NDArray[np.float64]
    blur: npt.NDArray[np.float64]
    """Standard deviation in pixels of a 64-pixel image."""
    noise: npt.NDArray[np.float64]
    vignette: npt.NDArray[np.float64]
    zoom: npt.NDArray[np.float64]

    @classmethod
    def of(cls, options: Options) -> Scanner:
        """Drawn once a site, and moved towards the neutral scanner by `shift`."""
        draws = site_draws(options, 7)
        between = [(0.72, 1.2), (-0.10, 0.10), (-0.45, 0.45), (0.0, 1.0), (0.01, 0.05), (0.0, 0.35), (0.92, 1.08)]
        neutral = [1.0, 0.0, 0.0, 0.3, 0.02, 0.0, 1.0]
        values = [
            middle + options.shift * (low + (high - low) * u - middle)
            for (low, high), middle, u in zip(between, neutral, draws.T, strict=True)
        ]
        values[2] = np.exp(values[2])
        return cls(*(np.maximum(v, 0) if i != 1 else v for i, v in enumerate(values)))

    def scaled(self, offset: float, noise: float) -> Scanner:
        """The same scanners with weaker offsets and noise."""
        return dataclasses.replace(self, offset=self.offset * offset, noise=self.noise * noise)

    def acquire(self, scene: Field3, noise: Field3, site: Ints) -> Field3:
        """Grey levels in [0, 1] of B scenes: tone curve, vignette, blur, sensor noise.

        Args:
            scene: (B, S, S) intensities. noise: (B, S, S) unit Gaussian. site: (B,).
        """

        def at(values: npt.NDArray[np.float64]) -> Field3:
            return values[site].astype(np.float32)[:, None, None]

        size = scene.shape[-1]
        x, y = grid(size)
        image = np.clip(scene * at(self.contrast) + at(self.offset) + 0.06, 0, 1) ** at(self.gamma)
        image *= 1 - at(self.vignette) * (x * x + y * y) / 2
        kernels = np.stack([blur_matrix(size, b * size / 64) for b in self.blur])[site]
        image = kernels @ image @ kernels.transpose(0, 2, 1)
        return np.asarray(np.clip(image + at(self.noise) * noise, 0, 1))


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """The generator of one purpose for one site, patient or image."""
    return np.random.default_rng([seed, int(stream), *keys])


def site_draws(options: Options, count: int, skip: int = 0) -> npt.NDArray[np.float64]:
    """(sites, count) uniform numbers of the sites' streams, after the first `skip`."""
    streams = (generator(options.seed, Stream.SITE, s) for s in range(options.sites))
    return np.stack([rng.random(skip + count)[skip:] for rng in streams])


def draw(streams: Iterable[np.random.Generator], normals: Table, uniforms: Table) -> Draws:
    """Fill two tables of named random numbers, once for each stream; normals first, in the tables' order."""
    lengths = [[int(entry[2]) if len(entry) > 2 else 1 for entry in table.values()] for table in (normals, uniforms)]
    pairs = [(rng.standard_normal(sum(lengths[0])), rng.random(sum(lengths[1]))) for rng in streams]
    result: Draws = {}
    for table, length, raw in zip((normals, uniforms), lengths, zip(*pairs, strict=True), strict=True):
        columns = np.split(np.stack(raw), np.cumsum(length)[:-1], axis=1)
        for (name, entry), column in zip(table.items(), columns, strict=True):
            low, width = entry[0], entry[1] if table is normals else entry[1] - entry[0]
            values = (low + width * column).astype(np.float32)
            result[name] = values if len(entry) > 2 else values[:, :, None]
    return result


def poisson(u: npt.NDArray[np.float32], rate: npt.ArrayLike, most: int) -> Ints:
    """Poisson counts from uniform numbers of the same shape, at most `most`."""
    cdf = pdtr(np.arange(most), np.asarray(rate)[..., None])
    return np.asarray((u[..., None] > cdf).sum(-1), dtype=np.int64)


def textures(seed: int, layout: Layout, rows: slice, size: int, count: int) -> npt.NDArray[np.float32]:
    """(count, B, S, S) white noise, a stream for each image and size."""
    keys = zip(layout.patient[rows].tolist(), layout.image[rows].tolist(), strict=True)
    fields = [
        generator(seed, Stream.TEXTURE, p, i, size).standard_normal((count, size, size), dtype=np.float32)
        for p, i in keys
    ]
    return np.stack(fields, axis=1)


def build(
    *,
    name: str,
    options: Options,
    size: int,
    channels: int,
    layout: Layout,
    labels: npt.NDArray[Any],
    class_names: tuple[str, ...],
    render: Callable[[slice], Field3],
    recipe: str,
) -> Dataset:
    """Render the images block by block (or take them from the cache) and make the data set.

    Args:
        name: of the data set. options: all dials. size: side in pixels. channels: 1 or 3.
        layout: who is on which image. labels: of each image. class_names: of the labels.
        render: rows -> (B, S, S) or (B, S, S, 3) in [0, 1].
        recipe: the module that draws; the cache forgets its images when the source changes.
    """
    n = options.images
    sources = [inspect.getsource(sys.modules[m]) for m in (__name__, grid.__module__, recipe)]
    key = fingerprint(name, options, size, np.__version__, *sources)

    def make() -> dict[str, Pixels]:
        step = max(1, BLOCK_PIXELS // size**2)
        pixels = np.empty((n, size, size, channels), dtype=np.uint8)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            pixels[rows] = np.rint(render(rows) * 255).reshape(pixels[rows].shape)
        return {"images": pixels}

    images = ArrayImages(cached(f"{name}-{key}", make)["images"])
    patient = np.char.add("p", np.char.zfill(layout.patient.astype(str), 6))
    site = np.char.add("site ", (layout.patient % options.sites + 1).astype(str))
    meta = {
        "image": np.char.add(np.char.add(patient, "-"), layout.image.astype(str)),
        "patient": patient,
        "site": site,
        "row": np.arange(1, n + 1),
    }
    split = derived_split(patient, labels, site)
    digests = image_digests(images)
    report = LoadReport(rows_read=n, patient_known=True, policy=vars(options))
    binary = labels.ndim == 1
    return Dataset(
        name=name,
        variant=f"size={size}",
        task="binary" if binary else "multilabel",
        images=images,
        labels=labels,
        class_names=class_names,
        positive_class=1 if binary else None,
        meta=meta,
        split=split,
        split_origin="derived",
        report=with_contents(
            report, digests=digests, labels=labels, class_names=class_names, split=split, groups=patient, official=False
        ),
        fingerprint=fingerprint(name, options, digests, labels, split),
        licence="Apache-2.0 (generated by fedsec)",
        redistributable=True,
        commercial=True,
    )


def checked_side(size: int | None) -> int:
    """The side to render; 28 where none is asked for."""
    side = checked_size(size if size is not None else 28)
    if side > 1024:
        raise ConfigError(f"size={size}: the built-in generators draw up to 1024 pixels")
    return side
