"""Decoding and the mapped cache: modes, fits, kills, changes of files, and memory."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsec.data import blocks, pixels
from fedsec.data.cache import cache_dir
from fedsec.data.decode import ImageFault, Look, decode, shades_of_gray
from fedsec.data.digest import image_digests
from fedsec.data.images import ArrayImages, SelectedImages
from fedsec.data.pixels import decode_all
from fedsec.errors import DataError
from fedsec.progress import Progress, watching
from tests.data.trees import picture


def files(root: Path, n: int = 10) -> list[Path]:
    return [picture(root / f"{i}.png", i, mode="RGB") for i in range(n)]


def content(image: Image.Image, tmp_path: Path, name: str = "x.png", **options: object) -> bytes:
    image.save(tmp_path / name, **options)  # type: ignore[arg-type]
    return (tmp_path / name).read_bytes()


def test_lazy_and_in_memory_are_equal(tmp_path: Path) -> None:
    paths = files(tmp_path)
    done = decode_all(paths, Look(16, 3), tmp_path)
    memory = ArrayImages(np.stack([decode(path.read_bytes(), Look(16, 3)) for path in paths]))
    rows = np.array([3, 3, 0, 9])
    assert np.array_equal(done.images.read(rows), memory.read(rows))
    chosen = SelectedImages(done.images, rows)
    assert np.array_equal(image_digests(chosen), image_digests(done.images)[rows])
    again = pickle.loads(pickle.dumps(done.images))
    assert np.array_equal(again.read(rows), memory.read(rows))


@pytest.mark.parametrize("weights", [None, 0])
def test_digests_are_equal_where_and_only_where_pixels_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: int | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if weights is not None:  # the worst fast key: the same for all; equal pixels are still told from others
        monkeypatch.setattr(pixels, "_weights", lambda count: np.zeros(count, dtype=np.uint64))
    paths = [picture(tmp_path / f"{i}.png", i % 7, mode="RGB") for i in range(12)]
    done = decode_all(paths, Look(17, 3), tmp_path)
    digests = image_digests(done.images)
    same = digests[:, None] == digests[None, :]
    assert np.array_equal(same, np.arange(12)[:, None] % 7 == np.arange(12)[None, :] % 7)


def test_a_second_call_decodes_nothing_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = files(tmp_path)
    first = decode_all(paths, Look(16, 1), tmp_path)
    assert first.made and not decode_all(paths, Look(16, 1), tmp_path).made
    assert decode_all(paths, Look(16, 3), tmp_path).made and decode_all(paths, Look(20, 1), tmp_path).made
    assert decode_all(paths, Look(16, 1, "crop"), tmp_path).made
    # Another picture under the same name and of the same length: only its time of change tells.
    old = paths[2].read_bytes()
    time = paths[2].stat().st_mtime_ns
    picture(paths[2], 77, mode="RGB")
    paths[2].write_bytes(paths[2].read_bytes()[: len(old)].ljust(len(old), b"\0"))
    os.utime(paths[2], ns=(time + 1, time + 1))
    assert paths[2].stat().st_size == len(old)
    changed = decode_all(paths, Look(16, 1), tmp_path)
    assert changed.made and not np.array_equal(changed.images.read(np.array([2])), first.images.read(np.array([2])))
    assert changed.contents[2] != first.contents[2] and changed.contents[1] == first.contents[1]


def test_a_killed_run_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = files(tmp_path / "set")
    real, calls = decode, []

    def interrupted(data: bytes, look: Look) -> np.ndarray:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(data, look)

    monkeypatch.setattr(pixels, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_all(paths, Look(16, 1), tmp_path / "set", workers=1)
    assert list((cache_dir() / "images").iterdir()) == []
    monkeypatch.setattr(pixels, "decode", real)
    done = decode_all(paths, Look(16, 1), tmp_path / "set")
    assert done.made and not any(code for code, _ in done.problems)
    # Without its facts, or cut short, the file does not count.
    (facts,) = (cache_dir() / "images").glob("*.facts.npz")
    facts.unlink()
    assert decode_all(paths, Look(16, 1), tmp_path / "set").made
    (file,) = (cache_dir() / "images").glob("*.npy")
    file.write_bytes(file.read_bytes()[:500])
    assert decode_all(paths, Look(16, 1), tmp_path / "set").made


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[object] = []

    class Watcher(Progress):
        def stage(self, title: str, total: int) -> None:
            seen.append((title, total))

        def advance(self, done: int, note: str = "") -> None:
            seen.append(done)

    with watching(Watcher()):
        decode_all(files(tmp_path, 3), Look(16, 1), tmp_path)
    assert seen == [("decoding images", 3), 3]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: os.statvfs_result and type("U", (), {"free": 10})())
    with pytest.raises(DataError, match=r"need 0.0 GB.*XDG_CACHE_HOME") as caught:
        decode_all(files(tmp_path), Look(24, 1), tmp_path)
    assert caught.value.code == "D08"


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_file(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = files(tmp_path / "set", 23)
    done = decode_all(paths, Look(16, 3), tmp_path / "set", workers=workers)
    for i, path in enumerate(paths):
        assert np.array_equal(done.images.read(np.array([i]))[0], decode(path.read_bytes(), Look(16, 3)))


def test_reading_copies_and_keeps_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "HELD", 5_000)
    done = decode_all(files(tmp_path), Look(32, 3), tmp_path)
    first = done.images.read(np.array([1]))
    tracemalloc.start()
    for i in list(range(10)) * 20:
        done.images.read(np.array([i]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    first[:] = 0
    assert done.images.read(np.array([1])).any()


def test_sixteen_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 4095, 256, dtype=np.uint16).reshape(16, 16)
    found = content(Image.fromarray(ramp), tmp_path)
    twelve = decode(found, Look(16, 1, bits=12))[:, :, 0]
    np.testing.assert_array_equal(twelve, np.rint(ramp / 4095 * 255))
    assert decode(found, Look(16, 1)).max() == round(4095 / 65535 * 255)
    with pytest.raises(ImageFault, match="bits=10 is too small") as caught:
        decode(found, Look(16, 1, bits=10))
    assert caught.value.code == "D09"
    broken = content(Image.fromarray(np.full((20, 20), np.nan, dtype=np.float32)), tmp_path, "x.tif")
    with pytest.raises(ImageFault, match="NaN or Inf") as caught:
        decode(broken, Look(16, 1))
    assert caught.value.code == "D21"


def test_alpha_lies_on_black_and_palettes_go_through_rgb(tmp_path: Path) -> None:
    image = Image.new("RGBA", (20, 20), (200, 100, 40, 0))
    image.paste((200, 100, 40, 255), (0, 0, 10, 20))
    found = decode(content(image, tmp_path), Look(20, 3))
    assert found[0, 0].tolist() == [200, 100, 40] and found[0, 19].tolist() == [0, 0, 0]
    grey = decode(content(Image.new("RGB", (20, 20), (255, 0, 0)), tmp_path), Look(20, 1))
    assert grey[0, 0, 0] == round(0.299 * 255)
    assert decode(content(Image.new("1", (20, 20), 1), tmp_path), Look(20, 1)).min() == 255
    palette = Image.new("RGB", (20, 20), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_allclose(decode(content(palette, tmp_path), Look(20, 3))[0, 0], [10, 200, 30], atol=2)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("look", [Look(16, 1), Look(24, 3), Look(20, 3, "crop"), Look(40, 1, "pad")])
def test_both_jpeg_decoders_agree(tmp_path: Path, mode: str, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:50, :70]
    image = Image.fromarray(np.stack([3 * x, 5 * y, x + y], axis=2).astype(np.uint8)).convert(mode)
    found = content(image, tmp_path, "x.jpg", quality=90)
    fast = decode(found, look)
    monkeypatch.setattr("fedsec.data.decode._jpeg", lambda *_: None)
    np.testing.assert_allclose(fast.astype(int), decode(found, look), atol=2)


def test_jpegs_that_only_pillow_reads_right(tmp_path: Path) -> None:
    white_left = Image.new("RGB", (40, 20))
    white_left.paste((255, 255, 255), (0, 0, 20, 20))
    exif = white_left.getexif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: left becomes top
    upright = decode(content(white_left, tmp_path, "x.jpg", exif=exif), Look(16, 3)).astype(int)
    assert upright[:4].mean() > 245 and upright[-4:].mean() < 10
    assert decode(content(Image.new("CMYK", (20, 20)), tmp_path, "x.jpg"), Look(16, 3)).shape == (16, 16, 3)
    cut = content(white_left, tmp_path, "x.jpg")[:-200]
    with pytest.raises(OSError, match=r"(?i)truncated"):
        decode(cut, Look(16, 3))


def test_fits(tmp_path: Path) -> None:
    image = Image.new("L", (60, 20), 0)
    image.paste(255, (20, 0, 40, 20))  # the centre square is white
    found = content(image, tmp_path)
    assert decode(found, Look(20, 1, "crop")).min() == 255
    padded = decode(found, Look(30, 1, "pad"))[:, :, 0]
    assert padded[:10].max() == padded[20:].max() == 0 and padded[15, 15] == 255
    assert decode(found, Look(20, 1, "squash"))[10, [0, 10, 19], 0].tolist() == [0, 255, 0]


def test_trimmed_border(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 50))
    image.paste((90, 60, 30), (20, 10, 50, 40))
    found = decode(content(image, tmp_path), Look(30, 3, trim=True))
    assert (found == [90, 60, 30]).all()


def test_shades_of_gray() -> None:
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.random((8, 8, 1)), 3, axis=2)
    np.testing.assert_allclose(shades_of_gray(grey), grey, atol=1e-6)
    scene = rng.random((8, 8, 3)) * 0.4 + 0.05
    lit = shades_of_gray(scene * np.array([1.0, 0.8, 0.6]))
    plain = shades_of_gray(scene)
    ratio = (lit / plain).reshape(-1)
    inside = (lit < 1).reshape(-1) & (plain < 1).reshape(-1)
    np.testing.assert_allclose(ratio[inside], ratio[inside][0], rtol=1e-4)  # up to one common factor


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "I;16"]),
    st.integers(16, 70),
    st.integers(16, 70),
    st.sampled_from(["squash", "crop", "pad"]),
    st.sampled_from([1, 3]),
)
def test_every_mode_gives_the_right_shape(mode: str, width: int, height: int, fit: str, channels: int) -> None:
    import io

    stream = io.BytesIO()
    image = Image.new("I;16" if mode == "I;16" else mode, (width, height))
    image.save(stream, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    found = decode(stream.getvalue(), Look(24, channels, fit))  # type: ignore[arg-type]
    assert found.shape == (24, 24, channels) and found.dtype == np.uint8
