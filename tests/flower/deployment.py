"""A SuperLink and its SuperNodes as processes here, TLS and node authentication on; all gone when it closes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch

from fedsec.deployment.certificates import certificates, node_key
from fedsec.deployment.export import App, export_flower

MARK = "FEDSEC_TEST_DEPLOYMENT"
MISCHIEF = """
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from fedsec.deployment.app import client_app

honest = client_app()
app = ClientApp()


@app.train("turns")
def turns(message, context):
    wish = Path(context.node_config["folder"]) / "mischief"
    what = wish.read_text() if wish.exists() else ""
    if what == "hang":
        time.sleep(3600)
    if what == "garbage":
        nonsense = {"values": ConfigRecord({"0/loss": "none"}), "arrays": ArrayRecord()}
        return Message(RecordDict(nonsense), reply_to=message)
    return honest(message, context)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Deployment:
    """The app in a folder, and its processes."""

    def __init__(self, folder: Path, tables: Mapping[str, Any], *, data_dir: Path | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        address = f"127.0.0.1:{self.port}"
        self.app: App = export_flower(tables, folder, nodes=3, superlink=address, data_dir=data_dir)
        (folder / "fedsec_app" / "client_app.py").write_text(MISCHIEF)
        certificates(folder / "certificates", "127.0.0.1")
        for name in (*self.app.nodes, "stranger"):
            node_key(folder / "keys", name)
        home = folder / ".flwr-home"
        home.mkdir()
        (home / "config.toml").write_text((folder / "flower.toml").read_text().replace("HERE", str(folder)))
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "OMP_NUM_THREADS": "1",
            MARK: str(folder),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.processes[name] = process
        return process

    def superlink(self) -> None:
        own = "certificates/server.pem", "--ssl-keyfile", "certificates/server.key"
        self.start(
            "superlink",
            *("flower-superlink", "--ssl-certfile", *own, "--ssl-ca-certfile", "certificates/ca.pem"),
            *("--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", "superlink.db", "--disable-runtime-dependency-installation"),
        )
        self.wait(lambda: _listens(self.port), 300, "the SuperLink listens")

    def supernode(self, name: str, key: str | None = None) -> subprocess.Popen[bytes]:
        cells = ",".join(cell.key() for cell in self.app.cells)
        return self.start(
            name,
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())),
            *("--root-certificates", "certificates/ca.pem", "--auth-supernode-private-key", f"keys/{key or name}"),
            *("--node-config", f'folder="{self.folder / "nodes" / name}" cells="{cells}"'),
        )

    def flwr(self, *words: str) -> str:
        done = subprocess.run(
            ["flwr", *words], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self) -> str:
        return str(json.loads(self.flwr("run", ".", "fedsec", "--format", "json"))["run-id"])

    def results(self) -> dict[str, dict[str, Any]]:
        cells = (self.folder / "run" / "cells").glob("*.json")
        return {path.stem: json.loads(path.read_text()) for path in cells}

    def last_round(self) -> int:
        """The last finished round of a training under way; 0 before the first."""
        for path in (self.folder / "run" / "artifacts").glob("*.last-round/last-round.pt"):
            with contextlib.suppress(Exception):
                return int(torch.load(path, weights_only=True)["number"])
        return 0

    def wait(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.logs()}"
            for name, process in self.processes.items():
                assert name != "superlink" or process.poll() is None, f"{name} ended\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        parts = [f"--- {p.name}\n" + p.read_text(errors="replace")[-3000:] for p in sorted(self.folder.glob("*.log"))]
        with contextlib.suppress(Exception):
            parts.append(self.flwr("ls", "fedsec"))
        return "\n".join(parts)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """As a crash would: the process alone, without a word to the others."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(30)

    def comeback(self, name: str) -> None:
        """As a service manager restarts a crashed node: Flower lets it in when its last heartbeat has lapsed."""
        before = self.log(name).count("SuperNode ID")
        process = self.supernode(name)
        deadline = time.monotonic() + 300
        while self.log(name).count("SuperNode ID") == before:
            assert time.monotonic() < deadline, self.logs()
            if process.poll() is not None:
                time.sleep(5)
                process = self.supernode(name)
            time.sleep(0.5)

    def left(self) -> list[int]:
        """Processes of this deployment, and of no other."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + 20
        while self.left() and time.monotonic() < deadline:
            for process in self.processes.values():
                process.poll()
            time.sleep(0.2)
        for pid in self.left():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in self.processes.values():
            process.wait(30)
        self.processes = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
