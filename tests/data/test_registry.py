from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsec import data
from fedsec.data.cache import cache_dir, cached, write_npz
from fedsec.errors import ConfigError, DataError
from tests.data.conftest import npz_arrays

pytestmark = pytest.mark.usefixtures("no_data")


def save(path: Path, size: int = 28) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **npz_arrays(size=size))
    return path


def test_lookup_order_is_data_dir_then_environment_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FEDSEC_DATA", str(tmp_path / "environment"))
    save(cache_dir() / "kermany_16.npz", 16)
    assert data.load("kermany").image_shape[1] == 16
    save(tmp_path / "environment" / "kermany_20.npz", 20)
    assert data.load("kermany").image_shape[1] == 20
    save(tmp_path / "given" / "kermany_24.npz", 24)
    assert data.load("kermany", data_dir=tmp_path / "given").image_shape[1] == 24


def test_the_file_of_the_size_asked_for_is_preferred(tmp_path: Path) -> None:
    for size in (28, 64, 128):
        save(tmp_path / ("pneumoniamnist.npz" if size == 28 else f"pneumoniamnist_{size}.npz"), size)

    def stored(size: int | None) -> object:
        d = data.load("pneumoniamnist", data_dir=tmp_path, size=size)
        assert size is None or d.image_shape == (1, size, size)
        return d.report.policy.get("resized_from", "as stored")

    assert stored(None) == stored(28) == stored(64) == stored(128) == "as stored"
    assert stored(48) == [64, 64] and stored(100) == [128, 128] and stored(200) == [128, 128]
    assert data.load("pneumoniamnist_64", data_dir=tmp_path).name == "pneumoniamnist"
    assert data.load("pneumoniamnist:size=64", data_dir=tmp_path).variant == "size=64"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "my_set_64.npz", 64)
    for given in (path, str(path)):
        assert data.load(given).name == "my_set_64"
    monkeypatch.chdir(tmp_path)
    assert data.load("my_set_64.npz").name == "my_set_64"
    assert data.load("./my_set_64.npz").image_shape == (1, 64, 64)
    assert data.load(save(tmp_path / "kermany_28.npz")).name == "kermany"
    assert data.load("my_set_64", data_dir=tmp_path).name == "my_set_64"  # any npz file in a lookup folder has a name


def test_options_in_the_name() -> None:
    d = data.load("synthetic-cxr:images=30,shift=0.5", seed=3)
    assert len(d) == 30 and d.report.policy["shift"] == 0.5 and d.report.policy["seed"] == 3


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("pneumonamnist", ConfigError, "unknown data set 'pneumonamnist': did you mean 'pneumoniamnist'"),
        ("synthetic-cx", ConfigError, "did you mean 'synthetic-cxr'"),
        ("npz", ConfigError, "unknown data set 'npz'"),
        ("bloodmnist", DataError, "bloodmnist not found: no bloodmnist.npz.*run `fedsec data get bloodmnist`"),
        ("bloodmnist_64", DataError, "run `fedsec data get bloodmnist`"),
        ("ham10000", DataError, "ham10000 not found.*publisher.*FEDSEC_DATA"),
        ("nih14", DataError, "nihcc.app.box.com"),
        ("/nowhere/x.npz", DataError, "no such file or folder"),
        ("synthetic-cxr:imgs=3", ConfigError, "unknown parameter 'imgs': did you mean 'images'"),
        ("bloodmnist:strict=perhaps", DataError, "not found"),
    ],
)
def test_missing_and_unknown(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        data.load(name)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, DataError) or caught.value.code == "D01"


def test_missing_names_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSEC_DATA", str(tmp_path / "b"))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError) as caught:
        data.load("chestmnist", data_dir=tmp_path / "a")
    for place in (tmp_path / "a", tmp_path / "b", cache_dir()):
        assert str(place) in str(caught.value)
    with pytest.raises(DataError, match=r"data folder .* does not exist"):
        data.load("chestmnist", data_dir=tmp_path / "c")


def test_a_misspelt_path_gets_its_neighbour(tmp_path: Path) -> None:
    save(tmp_path / "hospital.npz")
    with pytest.raises(DataError, match=r"did you mean 'hospital.npz'"):
        data.load(tmp_path / "hospitl.npz")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="neither an npz file nor a folder"):
        data.load(tmp_path / "notes.txt")


def test_unknown_option_and_split_of_a_loader(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="a: unknown parameter 'strikt': did you mean 'strict'"):
        data.load(path, strikt=True)
    with pytest.raises(ConfigError, match="splits=random: choose official, derived or safe"):
        data.load(path, splits="random")  # type: ignore[arg-type]


def test_derived_parts_on_request(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    official, derived = data.load(path), data.load(path, splits="derived")
    assert official.split_origin == "official" and derived.split_origin == "derived"
    assert official.fingerprint != derived.fingerprint


def test_catalogue_lists_loaders_and_files() -> None:
    listed = {entry.name: entry for entry in data.catalogue()}
    assert {"synthetic-cxr", "synthetic-skin", "ham10000", "kermany", "nih14", "chestmnist"} <= set(listed)
    assert "npz" not in listed
    assert listed["chestmnist"].downloadable and not listed["kermany"].downloadable
    assert "chest X-rays" in listed["synthetic-cxr"].summary


def test_third_party_loader(monkeypatch: pytest.MonkeyPatch, write_npz: Callable[..., Path]) -> None:
    from fedsec import plugins

    real = plugins.load

    def mine(path: Path | None = None, *, name: str, size: int | None = None, **options: object) -> data.Dataset:
        assert path is None and options == {"dose": 3}
        return data.load(write_npz())

    monkeypatch.setattr(plugins, "names", lambda kind: ["mine", "npz"])
    monkeypatch.setattr(plugins, "load", lambda kind, name: mine if name == "mine" else real(kind, name))
    assert len(data.load("mine", dose=3)) == 24


def test_cache_survives_damage_and_a_folder_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arrays = {"a": np.arange(3)}
    assert cached("x", lambda: arrays)["a"].tolist() == [0, 1, 2]
    assert cached("x", lambda: pytest.fail("made twice"))["a"].tolist() == [0, 1, 2]
    (cache_dir() / "x.npz").write_bytes(b"PK half")
    assert cached("x", lambda: arrays)["a"].tolist() == [0, 1, 2]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("y", lambda: arrays)["a"].tolist() == [0, 1, 2]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Bad:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise Stop

    with pytest.raises(Stop):
        write_npz(tmp_path / "x.npz", {"a": np.arange(9), "b": Bad()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
