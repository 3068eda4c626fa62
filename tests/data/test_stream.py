"""Training from the disk: the same numbers as from memory, and no more memory than a batch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsec
from fedsec import data
from fedsec.data import stream
from fedsec.data.decode import Look
from fedsec.data.pixels import decode_all
from fedsec.data.stream import StreamedImages, client_images
from tests.data.trees import kvasir, own_csv, picture

CPU = torch.device("cpu")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[torch.Tensor, StreamedImages]:
    """The same twelve images in memory and on the disk."""
    paths = [picture(tmp_path / f"{i}.png", i, mode="RGB") for i in range(15)]
    images = decode_all(paths, Look(16, 3), tmp_path).images
    rows = np.array([14, 2, 3, 5, 7, 11, 1, 0, 4, 6, 8, 9])
    whole = torch.from_numpy(images.read(rows)).permute(0, 3, 1, 2).float() / 255
    return whole, StreamedImages(images, rows, CPU)


OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "rows": lambda x: x[torch.tensor([3, 3, 0, 11])],
    "none": lambda x: x[torch.zeros(0, dtype=torch.int64)],
    "mask": lambda x: x[torch.arange(12) % 2 == 0],
    "slice": lambda x: x[2:9:3],
    "one": lambda x: x[-2],
    "split": lambda x: torch.cat(x.split(5)),
    "sizes": lambda x: torch.cat(x.split([1, 0, 11])),
    "columns": lambda x: x[:, :1, 2:5],
    "arithmetic": lambda x: (x * 2 - x.mean()).clamp(0, 1),
    "compare": lambda x: (x[:4] != x[4:8]).reshape(4, -1).any(1),
    "flatten": lambda x: x.flatten(1).sum(1),
    "clone": lambda x: x.clone().mul_(0.5),
    "network": lambda x: torch.nn.functional.conv2d(x.split(4)[1], torch.ones(2, 3, 3, 3)),
    "device": lambda x: x.to("cpu", torch.float64),
    "set": lambda x: x.detach()[torch.tensor([1])],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_a_plain_tensor_gives(name: str, pair: tuple[torch.Tensor, StreamedImages]) -> None:
    whole, streamed = pair
    assert streamed.shape == whole.shape and len(streamed) == 12 and streamed.dtype == torch.float32
    found = OPERATIONS[name](streamed)
    torch.testing.assert_close(torch.as_tensor(found) * 1, OPERATIONS[name](whole) * 1, rtol=0, atol=1e-6)


def test_nothing_is_read_before_it_is_asked_for(
    pair: tuple[torch.Tensor, StreamedImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = pair
    read: list[int] = []
    real = StreamedImages.read

    def counted(self: StreamedImages, positions: Any = None) -> torch.Tensor:
        found = real(self, positions)
        read.append(len(found))
        return found

    monkeypatch.setattr(StreamedImages, "read", counted)
    parts = torch.cat([streamed[:6], streamed[6:]]).split(4)
    again = pickle.loads(pickle.dumps(streamed)).share_memory_()
    assert not read and len(parts) == 3 and repr(again).startswith("StreamedImages")
    batch = again[torch.tensor([2, 5])]
    assert read == [2] and type(batch) is torch.Tensor


def test_small_sets_and_sets_without_files_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d = data.load(own_csv(tmp_path), size=16)
    rows = np.arange(5)
    assert type(client_images(d, rows, CPU)) is torch.Tensor
    monkeypatch.setattr(stream, "STREAM_ABOVE", 0)
    assert isinstance(client_images(d.select(np.arange(20)), rows, CPU), StreamedImages)
    built_in = data.load("synthetic-cxr:images=60")
    assert type(client_images(built_in, rows, CPU)) is torch.Tensor


@pytest.mark.parametrize("engine", ["serial", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_federation_trains_to_the_same_numbers(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kvasir(tmp_path / "set")

    def trained(out: str) -> dict[str, Any]:
        result = fedsec.run(
            {"data": {"name": str(root), "size": 16, "min_images": 2}, "baseline": False},
            out=tmp_path / out,
            clients=2,
            rounds=2,
            local_steps=2,
            batch_size=4,
            engine=engine,
        )
        cell: dict[str, Any] = result["cells"][0]
        return cell

    memory = trained("memory")
    monkeypatch.setattr(stream, "STREAM_ABOVE", 0)
    streamed = trained("streamed")
    assert memory["utility"] == streamed["utility"] and memory["data_fingerprint"] == streamed["data_fingerprint"]


TRAIN = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from fedsec.data import stream
from fedsec.data.digest import image_digests
from fedsec.data.blocks import BlockFile
from fedsec.data.pixels import MappedImages

shape = (1200, 224, 224, 3)  # 181 MB as bytes, 722 MB as float32
path = Path(sys.argv[1])
BlockFile(path, shape).close()
images = MappedImages(path, np.zeros(shape[0], dtype="S32"), np.zeros(shape[0], dtype=bool))
x = stream.StreamedImages(images, np.arange(shape[0]), torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = 0.0
for rows in torch.randperm(shape[0]).split(32):
    total += float(x[rows].sum())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_an_epoch_over_722_mb_takes_a_fraction_of_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "x.npy")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 300  # MB: what stays mapped, and a few batches
