"""How fast image files become batches: fedsec's cache against decoding with torchvision on as many processes.

    python experiments/benchmarks/loading.py                    # 20,000 images at 224 pixels
    python experiments/benchmarks/loading.py --images 2000      # a tenth of it

Three questions, each answered in seconds, images a second and times the other's speed:

1. decoding once into the cache, against torchvision's decoder in a DataLoader with one worker a core;
2. an epoch from the cache (random batches of bytes), against decoding again in that DataLoader; and the same with the
   conversion to float32 that both sides need before they train, which costs more than reading the cache;
3. the memory of this process and its children while it does so.

The images are JPEGs of the size they are used at, so that neither side resizes. `data.load` does more than decode (it
hashes every file, looks for duplicates and builds the parts); its whole time is given beside that of decoding alone.
Wall time, since the question is one of parallel work: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

BATCH = 32


def make_folder(root: Path, images: int, size: int) -> list[Path]:
    """JPEGs of synthetic skin, in two class folders; 500 different pictures, each with noise of its own seed."""
    from PIL import Image

    from fedsec.data import load

    base = load("synthetic-skin:images=100", size=size)
    pixels = base.images.read(np.arange(100)).astype(np.int16)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(images):
        folder = root / ("benign", "malignant")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noisy = pixels[i % 100] + rng.integers(-6, 7, (size, size, 1), dtype=np.int16)
        path = folder / f"{i:06d}.jpg"
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


class Decoded:
    """What a plain PyTorch program does: decode the file whenever it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        from torchvision.io import ImageReadMode, decode_image, read_file

        return decode_image(read_file(self.paths[i]), ImageReadMode.RGB)


def torchvision_pass(paths: list[Path], workers: int, *, float_batches: bool) -> None:
    """Decode every file once in `workers` processes; as float32 batches where that is compared."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    loader = DataLoader(Decoded(paths), batch_size=BATCH, num_workers=workers, shuffle=float_batches)  # type: ignore[arg-type]
    total = 0
    for batch in loader:
        total += len(batch.float().div_(255) if float_batches else batch)
    assert total == len(paths)


class Memory:
    """Largest proportional memory of this process and its children (PSS: pages shared by n count 1/n), sampled.

    `private` leaves out pages of mapped files, which the system drops when it needs room.
    """

    def __init__(self) -> None:
        self.total = self.private = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            found = [pss(pid) for pid in family(os.getpid())]
            self.total = max(self.total, sum(t for t, _ in found))
            self.private = max(self.private, sum(p for _, p in found))


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in family(child))]


def pss(pid: int) -> tuple[float, float]:
    """Proportional memory in MB, and the part of it that is no file's."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0)


class Clock:
    """Wall time, and CPU time with that of finished children: what a busy machine leaves comparable."""

    cpu: ClassVar[dict[str, float]] = {}

    @classmethod
    def timed(cls, name: str, work: Callable[[], Any]) -> tuple[float, Any]:
        start, before = time.perf_counter(), sum(os.times()[:4])
        result = work()
        cls.cpu[name] = min(cls.cpu.get(name, float("inf")), sum(os.times()[:4]) - before)
        return time.perf_counter() - start, result


def measure(folder: Path, images: int, size: int, workers: int, repeats: int) -> dict[str, Any]:
    """All answers, as plain numbers; the best of a few turns where turns can be repeated."""
    import torch

    from fedsec import data
    from fedsec.data.decode import Look
    from fedsec.data.pixels import decode_all
    from fedsec.data.stream import StreamedImages
    from fedsec.machine import prepare_for_small_networks

    prepare_for_small_networks()  # as every run on a CPU does
    paths = make_folder(folder / "images", images, size)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    found: dict[str, Any] = {"images": images, "size": size, "workers": workers, "repeats": repeats}
    theirs, ours = [], []
    for turn in range(repeats):  # in turns, so that a busy machine hits both
        theirs.append(Clock.timed("torchvision", lambda: torchvision_pass(paths, workers, float_batches=False))[0])
        shutil.rmtree(folder / "cache", ignore_errors=True)
        seconds, done = Clock.timed("cache", lambda: decode_all(paths, Look(size, 3), folder / "images", workers))
        ours.append(seconds)
        assert done.made and not any(code for code, _ in done.problems), turn
    # Looking at memory stops what allocates it, so that it has a turn of its own.
    shutil.rmtree(folder / "cache", ignore_errors=True)
    with Memory() as memory:
        decode_all(paths, Look(size, 3), folder / "images", workers)
    found["decode"] = {"torchvision_s": min(theirs), "cache_s": min(ours), "rate": min(theirs) / min(ours)}
    found["decode_mb"] = {"all": memory.total, "without_files": memory.private}

    shutil.rmtree(folder / "cache", ignore_errors=True)
    first, dataset = Clock.timed("load", lambda: data.load(folder / "images", size=size))
    second, _ = Clock.timed("load again", lambda: data.load(folder / "images", size=size))
    found["load"] = {"first_s": first, "second_s": second}

    x = StreamedImages(dataset.images, np.arange(len(dataset)), torch.device("cpu"))

    def epoch() -> None:
        for rows in torch.randperm(len(x)).split(BATCH):
            assert x[rows].dtype == torch.float32

    def loading() -> None:
        for rows in np.array_split(np.random.default_rng(0).permutation(len(dataset)), -(-len(dataset) // BATCH)):
            assert dataset.images.read(rows).dtype == np.uint8

    from_bytes = min(Clock.timed("epoch of bytes", loading)[0] for _ in range(repeats))
    from_cache = min(Clock.timed("epoch", epoch)[0] for _ in range(repeats))
    with Memory() as memory:
        loading()
        epoch()
    again = min(
        Clock.timed("epoch by decoding", lambda: torchvision_pass(paths, workers, float_batches=True))[0]
        for _ in range(repeats)
    )
    serial = min(
        Clock.timed("epoch by decoding, one process", lambda: torchvision_pass(paths, 0, float_batches=True))[0]
        for _ in range(repeats)
    )
    found["epoch"] = {
        "bytes_s": from_bytes,
        "bytes_faster": min(theirs) / from_bytes,
        "cache_s": from_cache,
        "decoding_s": again,
        "decoding_one_process_s": serial,
        "faster": again / from_cache,
        "faster_than_one_process": serial / from_cache,
    }
    found["cpu_s"] = Clock.cpu
    found["epoch_mb"] = {"all": memory.total, "without_files": memory.private}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="loading-"))
    try:
        found = measure(folder, options.images, options.size, options.workers, options.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(found, indent=1, default=float)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    n, decode, epoch = found["images"], found["decode"], found["epoch"]
    print(f"decoding once: {n / decode['cache_s']:,.0f} images/s, {decode['rate']:.2f}x torchvision (goal 0.9)")
    print(f"later epochs: {n / epoch['bytes_s']:,.0f} images/s, {epoch['bytes_faster']:.1f}x decoding again (goal 10)")
    print(f"with float32: {n / epoch['cache_s']:,.0f} images/s, {epoch['faster']:.1f}x decoding and converting again")
    memory = max(found["decode_mb"]["all"], found["epoch_mb"]["all"])
    print(f"memory: {memory:,.0f} MB at most, mapped files included (goal 1,000)")
    sys.exit(0 if decode["rate"] >= 0.9 and epoch["bytes_faster"] >= 10 and memory < 1000 else 1)


if __name__ == "__main__":
    main()
