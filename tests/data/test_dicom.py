"""DICOM files made here: grey values as the standard has them, and not a word of a patient anywhere."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsec import data
from fedsec.data.decode import ImageFault, Look, decode
from fedsec.data.dicom import parse_window, read_header, read_pixels, windowed
from fedsec.errors import ConfigError, DataError
from tests.data.trees import write_csv

pydicom = pytest.importorskip("pydicom", reason="the extra `dicom` is not installed")

NAME, NUMBER, BIRTH, HOSPITAL = "Mustermann^Erika", "MRN-4711", "19640812", "Klinikum Musterstadt"
SECRETS = ("Mustermann", "Erika", NUMBER, BIRTH, HOSPITAL)
PIXELS = (np.arange(20 * 24, dtype=np.int32).reshape(20, 24) * 7) % 4096


def write(path: Path, pixels: Any = PIXELS, **tags: Any) -> Path:
    """A DICOM file with a patient in its header."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    found = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    array = np.asarray(pixels).astype(np.uint16)
    base = {
        "PatientName": NAME,
        "PatientID": NUMBER,
        "PatientBirthDate": BIRTH,
        "InstitutionName": HOSPITAL,
        "PatientSex": "F",
        "PatientAge": "057Y",
        "ViewPosition": "PA",
        "Modality": "CR",
        "Rows": array.shape[0],
        "Columns": array.shape[1],
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": array.tobytes(),
    }
    for name, value in {**base, **tags}.items():
        if value is not None:
            setattr(found, name, value)
    if meta.TransferSyntaxUID.is_compressed:
        found.PixelData = pydicom.encaps.encapsulate([b"no such stream"])
        found["PixelData"].is_undefined_length = True
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.save_as(path, enforce_file_format=False)
    return path


def grey(path: Path, window: str = "file") -> np.ndarray:
    return read_pixels(path.read_bytes(), window) / 255


def test_whole_range_and_inversion(tmp_path: Path) -> None:
    plain = grey(write(tmp_path / "a.dcm"))
    np.testing.assert_allclose(plain, PIXELS / PIXELS.max(), atol=1e-6)
    inverted = grey(write(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(inverted, 1 - plain, atol=1e-6)


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescaling_and_window_are_those_of_pydicom(tmp_path: Path, function: str | None) -> None:
    path = write(
        tmp_path / "a.dcm",
        RescaleSlope=2,
        RescaleIntercept=-1000,
        WindowCenter=[500, 9],
        WindowWidth=[1500, 9],
        VOILUTFunction=function,
    )
    reference = pydicom.dcmread(path)
    values = pydicom.pixels.apply_modality_lut(reference.pixel_array, reference)
    expected = pydicom.pixels.apply_windowing(values, reference, index=0)
    low, high = -1000, 4095 * 2 - 1000  # what pydicom maps the window to: the range of the stored bits
    np.testing.assert_allclose(grey(path), (expected - low) / (high - low), atol=1e-5)


def test_chosen_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RescaleSlope=1, RescaleIntercept=-1024)
    values = PIXELS.astype(np.float32) - 1024
    np.testing.assert_allclose(grey(path, "40/80"), np.clip((values - 39.5) / 79 + 0.5, 0, 1), atol=1e-5)
    low, high = np.percentile(values, (0.5, 99.5))
    np.testing.assert_allclose(grey(path, "percentile"), np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    assert parse_window("40/80") == (40, 80)
    for text in ("", "40", "40/0", "wide"):
        with pytest.raises(ConfigError, match="choose file, minmax, percentile or CENTRE/WIDTH"):
            parse_window(text)
    assert windowed(np.full((4, 4), 3, dtype=np.float32), "minmax").max() == 0


def test_faults(tmp_path: Path) -> None:
    cases = [
        (write(tmp_path / "frames.dcm", np.zeros((40, 24)), NumberOfFrames=2, Rows=20), "D09", "2 frames"),
        (write(tmp_path / "small.dcm", np.zeros((8, 24))), "D09", "24 x 8 pixels"),
        (write(tmp_path / "short.dcm", PixelData=b"\0" * 10), "D08", "cannot be decoded"),
        (write(tmp_path / "packed.dcm", syntax=pydicom.uid.JPEGLSLossless), "D18", "JPEG-LS"),
        (write(tmp_path / "rle.dcm", syntax=pydicom.uid.RLELossless), "D08", "cannot be decoded"),
        (write(tmp_path / "slope.dcm", RescaleSlope="1", RescaleIntercept=None), None, ""),
    ]
    for path, code, words in cases:
        if code is None:
            read_pixels(path.read_bytes())
            continue
        with pytest.raises(ImageFault) as caught:
            read_pixels(path.read_bytes())
        assert caught.value.code == code and words in str(caught.value)
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_decoded_as_any_other_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    pixels = decode(path.read_bytes(), Look(16, 3))
    assert pixels.shape == (16, 16, 3) and np.ptp(pixels.astype(int), axis=2).max() == 0


def tree(root: Path, n: int = 20) -> Path:
    for i in range(n):
        rng = np.random.default_rng(i)
        write(
            root / ("healthy", "sick")[i // 2 % 2] / f"{i}.dcm",
            rng.integers(0, 4096, (24, 24)),
            PatientID=f"{NUMBER}-{i // 2}",
            InstitutionName=f"{HOSPITAL} {i // 2 % 2}",
            PatientSex="M" if i // 2 % 2 else "F",
            BurnedInAnnotation="YES" if i == 3 else "NO",
        )
    return root


def test_a_tree_of_class_folders(tmp_path: Path) -> None:
    d = data.load(tree(tmp_path), size=16)
    assert d.name == "dicom" and len(d) == 20 and d.image_shape == (1, 16, 16)
    assert d.class_names == ("healthy", "sick") and d.report.patient_known
    assert len(set(d.meta["patient"])) == 10 and set(d.meta["site"]) == {"site 1", "site 2"}
    assert set(d.meta["sex"]) == {"F", "M"} and d.meta["age"][0] == 57 and d.meta["view"][0] == "PA"
    assert any("1 files say that text is burned into their pixels" in text for text in d.report.notes)


def test_no_patient_in_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tree(tmp_path / "files")
    # A malformed value of every identifying kind, which pydicom quotes in its own warnings and errors.
    write(root / "sick" / "bad.dcm", PixelData=b"\0" * 10, PatientAge=f"{NUMBER}{NUMBER}{NUMBER}", WindowWidth=None)
    broken = root / "sick" / "cut.dcm"
    broken.write_bytes((root / "sick" / "2.dcm").read_bytes()[:700])
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(DataError) as caught:
            data.load(root, size=16)
        d = data.load(root, size=16, on_bad="skip", max_bad=0.5)
    assert len(d) == 20 and d.report.n_bad == 2
    from fedsec.data.check import of_dataset
    from fedsec.data.check_fix import fix

    checkup = of_dataset(d)
    fix(checkup, tmp_path / "fixed", root)
    outputs = [str(caught.value), d.describe(), str(d.report.to_json()), "\n".join(checkup.lines())]
    outputs += [
        str(checkup.to_json()),
        caplog.text,
        "".join(capfd.readouterr()),
        str({k: v.tolist() for k, v in d.meta.items()}),
    ]
    outputs += [str(w.message) for w in warned]
    files = [p for folder in ("cache", "fixed") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert len(files) >= 3
    outputs += [p.read_bytes().decode("latin-1") for p in files]
    for text in outputs:
        for secret in SECRETS:
            assert secret not in text


def test_files_without_labels_say_what_to_add(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.dcm")
    with pytest.raises(DataError, match="DICOM files without labels; sort them into one folder a class") as caught:
        data.load(tmp_path)
    assert caught.value.code == "D02"
    write(tmp_path / "a" / "2.dcm", PIXELS.T.copy())
    write_csv(tmp_path / "labels.csv", ["file", "label"], [["a/1.dcm", "yes"], ["a/2.dcm", "no"]])
    d = data.load(tmp_path, size=16)
    assert len(d) == 2 and d.image_shape[0] == 1


def test_rsna_breast_reads_dicom(tmp_path: Path) -> None:
    rows = []
    for i in range(8):
        write(tmp_path / "train_images" / str(i // 2) / f"{i}.dcm", PIXELS + i)
        rows.append([1 + i % 2, i // 2, i, i // 2 % 2])
    write_csv(tmp_path / "train.csv", ["site_id", "patient_id", "image_id", "cancer"], rows)
    d = data.load(tmp_path, size=16)
    assert d.name == "rsna_breast" and len(d) == 8 and set(d.meta["site"]) == {"site 1", "site 2"}
    assert data.load(f"{tmp_path}:window=percentile", size=16).fingerprint != d.fingerprint
    with pytest.raises(ConfigError, match="window=wide"):
        data.load(f"{tmp_path}:window=wide", size=16)


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    tree(tmp_path, 8)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install fedsec\[dicom\]") as caught:
        data.load(tmp_path, size=16)
    assert caught.value.code == "D17"


def test_headers(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "a.dcm"))
    assert (header.patient, header.institution, header.sex, header.age) == (NUMBER, HOSPITAL, "F", "057Y")
    (tmp_path / "b.dcm").write_text("no DICOM file")
    with pytest.raises(ImageFault, match="is no readable DICOM file"):
        read_header(tmp_path / "b.dcm")
