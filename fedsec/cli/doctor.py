"""`fedsec doctor`: is this installation able to do its job, and what does it have to work with?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from fedsec.errors import RunError


@click.command("doctor")
def command() -> None:
    """Check this installation and machine. Exit code 3 if something that a run needs is broken."""
    broken = 0
    for title, check in CHECKS.items():
        try:
            click.echo(f"ok      {title}: {check()}")
        except Exception as error:
            broken += 1
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            click.echo(f"BROKEN  {title}: {text}")
    if broken:
        raise RunError(f"{broken} of {len(CHECKS)} checks failed; reinstall with pip install --force-reinstall fedsec")


def _python() -> str:
    return f"{sys.version.split()[0]} at {sys.executable}"


def _packages() -> str:
    from fedsec.store import environment

    return ", ".join(f"{name} {version}" for name, version in environment("")["packages"].items())


def _torch() -> str:
    import torch

    weights = torch.zeros(1, requires_grad=True)
    (weights * 2).sum().backward()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch and torchvision match; CUDA: {', '.join(devices) or 'none, runs use the CPU'}"


def _cores() -> str:
    from fedsec.machine import usable_cores

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{usable_cores()} usable{load}"


def _plugins() -> str:
    from fedsec import plugins

    count = 0
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            plugins.load(kind, name)
            count += 1
    return f"{count} load"


def _data() -> str:
    from fedsec.data.registry import search_path

    found = [f"{p} ({sum(1 for _ in p.glob('*.npz'))} npz)" for p in search_path() if p.is_dir()]
    return ", ".join(found) or "no folder yet; set FEDSEC_DATA, or fedsec data get pneumoniamnist"


def _write() -> str:
    if not os.access(Path.cwd(), os.W_OK):
        raise RuntimeError(f"{Path.cwd()} cannot be written; runs need --out")
    return f"{Path.cwd()} can be written"


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "cores": _cores,
    "plugins": _plugins,
    "data folders": _data,
    "output": _write,
}
