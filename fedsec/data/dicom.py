"""How DICOM files become grey values, and what may be read of their headers (extra `dicom`: pydicom).

A header names a person. Nothing of it is logged, stored or put into a message, except what `Header` holds: patient and
institution as numbers of our own, sex, age, view, and whether text is burned into the pixels. The decoder's own errors
and warnings quote header values, and are replaced.
"""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedsec.data.decode import Floats, ImageFault
from fedsec.data.images import MIN_SIZE
from fedsec.errors import ConfigError, DataError

TAGS = ("PatientID", "PatientSex", "PatientAge", "ViewPosition", "InstitutionName", "BurnedInAnnotation", "Modality")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
Window = Literal["file", "minmax", "percentile"] | tuple[float, float]


@dataclass(frozen=True)
class Header:
    """What is read of one file's header; the ids are the source's own and must be replaced before they are shown."""

    patient: str
    institution: str
    sex: str
    age: str
    view: str
    modality: str
    burned_in: bool


def library() -> Any:
    """pydicom, with its messages, which quote header values, switched off.

    Raises:
        DataError: it is not installed (D17).
    """
    try:
        import pydicom
    except ImportError:
        raise DataError("D17", "DICOM files need pydicom; install it with `pip install fedsec[dicom]`") from None
    warnings.filterwarnings("ignore", module=r"pydicom(\..*)?")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logger = logging.getLogger("pydicom")
    logger.setLevel(logging.CRITICAL + 1)
    logger.propagate = False
    return pydicom


def read_header(path: Path) -> Header:
    """The few header fields that are used, without the pixels.

    Raises:
        ImageFault: no DICOM file, or a damaged one (D08).
    """
    pydicom = library()
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        text = {tag: str(found.get(tag, "") or "").strip() for tag in TAGS}
    except Exception as error:  # whatever pydicom raises may quote the header
        raise ImageFault("D08", f"is no readable DICOM file ({type(error).__name__})") from None
    return Header(
        patient=text["PatientID"],
        institution=text["InstitutionName"],
        sex=text["PatientSex"],
        age=text["PatientAge"],
        view=text["ViewPosition"],
        modality=text["Modality"],
        burned_in=text["BurnedInAnnotation"].upper() == "YES",
    )


def read_pixels(content: bytes, window: str = "file") -> npt.NDArray[Any]:
    """A file's pixels: (H, W) float32 from 0 to 255, bright is dense; or (H, W, 3) uint8 of a colour image.

    Modality rescaling, then the window, then MONOCHROME1 is inverted.

    Args:
        content: the file. window: as `parse_window` takes it.

    Raises:
        ImageFault: damaged (D08), several frames or too small (D09), compressed without a decoder (D18), or not finite
            (D21).
    """
    pydicom = library()
    try:
        found = pydicom.dcmread(io.BytesIO(content))
        frames = int(found.get("NumberOfFrames", 1) or 1)
        kind = str(found.get("PhotometricInterpretation", "MONOCHROME2"))
        raw: npt.NDArray[Any] = np.asarray(found.pixel_array) if frames == 1 else np.zeros((0, 0))
    except Exception as error:  # whatever pydicom raises may quote the header
        raise _fault(pydicom, content, error) from None
    if frames != 1:
        raise ImageFault("D09", f"has {frames} frames; export them as single images")
    height, width = raw.shape[0], raw.shape[1]
    if min(height, width) < MIN_SIZE:
        raise ImageFault("D09", f"{width} x {height} pixels; {MIN_SIZE} a side are the least that is used")
    if raw.ndim == 3:
        if kind not in COLOURS or raw.dtype != np.uint8:
            raise ImageFault("D09", f"colour of kind {kind[:16]} in {raw.dtype} is not supported")
        return np.asarray(raw)
    try:
        values = pydicom.pixels.apply_modality_lut(raw, found).astype(np.float32)
        given = _file_window(found)
    except Exception as error:
        raise ImageFault("D08", f"has a damaged rescaling or window ({type(error).__name__})") from None
    if not np.isfinite(values).all():
        raise ImageFault("D21", "has NaN or Inf pixels")
    grey = windowed(values, parse_window(window), given)
    return (1 - grey if kind == "MONOCHROME1" else grey) * np.float32(255)


def parse_window(text: str) -> Window:
    """`file` (the first window of the file, else minmax), `minmax`, `percentile` (0.5 to 99.5), or `CENTRE/WIDTH`.

    Raises:
        ConfigError: anything else.
    """
    if text in ("file", "minmax", "percentile"):
        return text  # type: ignore[return-value]
    try:
        centre, width = (float(part) for part in text.split("/"))
    except ValueError:
        centre, width = 0.0, 0.0
    if width <= 1:
        raise ConfigError(f"window={text}: choose file, minmax, percentile or CENTRE/WIDTH, such as 40/80")
    return centre, width


def windowed(values: Floats, window: Window, given: tuple[float, float, str] | None = None) -> Floats:
    """Grey in [0, 1] of rescaled values.

    Args:
        values: (H, W). window: which. given: centre, width and function of the file's first window.

    Source: DICOM PS3.3, C.11.2.1.2 (linear) and C.11.2.1.3 (sigmoid, linear exact).
    """
    if isinstance(window, tuple):
        given, window = (window[0], window[1], "LINEAR"), "file"
    if window == "file" and given is not None:
        centre, width, function = given
        if function == "SIGMOID":
            return np.asarray(1 / (1 + np.exp(-4 * (values - centre) / width)), dtype=np.float32)
        if function == "LINEAR_EXACT":
            return np.asarray(np.clip((values - centre) / width + 0.5, 0, 1), dtype=np.float32)
        return np.asarray(np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1), dtype=np.float32)
    low, high = np.percentile(values, (0.5, 99.5)) if window == "percentile" else (values.min(), values.max())
    if high <= low:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0, 1), dtype=np.float32)


def _file_window(found: Any) -> tuple[float, float, str] | None:
    """The first window of a file; None where there is none."""
    centre, width = found.get("WindowCenter"), found.get("WindowWidth")
    if centre is None or width is None or centre == "" or width == "":
        return None
    first = [float(v[0]) if hasattr(v, "__len__") and not isinstance(v, str) else float(v) for v in (centre, width)]
    return (first[0], first[1], str(found.get("VOILUTFunction", "LINEAR") or "LINEAR")) if first[1] > 0 else None


def _fault(pydicom: Any, content: bytes, error: Exception) -> ImageFault:
    """Why there are no pixels, without a word of the header."""
    try:
        meta = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=[]).file_meta
        syntax = pydicom.uid.UID(meta.TransferSyntaxUID)
        if syntax.is_compressed and not pydicom.pixels.get_decoder(syntax).is_available:
            name = syntax.name if syntax.name != str(syntax) else "an unknown compression"
            packages = "pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg, or gdcm"
            return ImageFault("D18", f"is compressed as {name}; install {packages} to read it")
    except Exception:  # the header itself is damaged, which the answer below says
        pass
    return ImageFault("D08", f"cannot be decoded ({type(error).__name__})")
