"""What `fedsec export flower` writes; needs no Flower."""

from __future__ import annotations

import ipaddress
import json
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedsec.cli import run as fedsec
from fedsec.config import Cell
from fedsec.deployment.export import export_flower
from fedsec.errors import ConfigError, DataError
from fedsec.federation.assemble import assemble, take_seats
from fedsec.federation.clients import read_client, write_client
from fedsec.federation.facts import Facts

TABLES: dict[str, Any] = {
    "data": {"max_train": 60},
    "model": {"name": "lenet"},
    "federation": {"clients": 5, "rounds": 1, "local_steps": 1},
    "attack": ["poisoning:fraction=0.4"],
    "defense": ["dos"],
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "app"
    export_flower(TABLES, folder, nodes=2, superlink="fl.example.org:9000")
    return folder


def settings(app: Path) -> dict[str, Any]:
    return dict(tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


def test_the_app_is_whole(app: Path) -> None:
    found = {str(p.relative_to(app)) for p in app.rglob("*") if p.is_file()}
    assert found == {
        *("pyproject.toml", "README.md", ".gitignore", "certificates.py", "flower.toml"),
        *("fedsec_app/__init__.py", "fedsec_app/server_app.py", "fedsec_app/client_app.py"),
        *(f"nodes/node-1/client-{k}.safetensors" for k in (0, 1, 2)),
        *(f"nodes/node-2/client-{k}.safetensors" for k in (3, 4)),
    }
    for line in (".pem", "nodes/", "keys/"):
        assert line in (app / ".gitignore").read_text() or line == ".pem"


def test_the_cells_are_those_that_were_asked_for(app: Path) -> None:
    cells = [Cell.from_json(c) for c in json.loads(settings(app)["fedsec-cells"])]
    assert [c.label() for c in cells] == ["none", "dos"]
    assert {c.federation.engine for c in cells} == {"flower"} and {c.federation.device for c in cells} == {"cpu"}
    assert json.loads(settings(app)["fedsec-facts"]).keys() == {c.key() for c in cells}


def test_a_node_sits_down_with_its_own_folder_alone(app: Path) -> None:
    """Seats, plan and images that a node builds from the cell, the facts and its folder are those of one machine."""
    cell = Cell.from_json(json.loads(settings(app)["fedsec-cells"])[1])
    facts = Facts.from_json(json.loads(settings(app)["fedsec-facts"])[cell.key()])
    federation = assemble(cell)
    seats, plan, _ = take_seats(cell, facts)
    assert plan == federation.plan and seats.malicious == federation.seats.malicious
    assert seats.recipe == federation.seats.recipe and seats.sharing == federation.seats.sharing
    for (name, a), (other, b) in zip(
        seats.model.state_dict().items(), federation.seats.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    for client, node in enumerate(["node-1"] * 3 + ["node-2"] * 2):
        x, y = read_client(app / "nodes" / node, client, facts)
        assert torch.equal(x, federation.clients[client][0]) and torch.equal(y, federation.clients[client][1])


def test_the_readme_switches_everything_on(app: Path) -> None:
    text = (app / "README.md").read_text()
    assert "--insecure" not in text and "$" not in re.sub(r"\$PWD|\$FLWR_HOME", "", text)
    for word in ("--enable-supernode-auth", "--ssl-certfile", "--disable-runtime-dependency-installation"):
        assert word in text
    starts = re.findall(r"flower-supernode .*?```", text, re.DOTALL)
    assert len(starts) == 2
    for start in starts:
        assert "--root-certificates" in start and "--auth-supernode-private-key" in start
        assert "--superlink fl.example.org:9000" in start
        agreed = re.search(r'cells="([^"]*)"', start)
        assert agreed and agreed[1].split(",") == list(json.loads(settings(app)["fedsec-facts"]))
    assert len(set(re.findall(r"--port (\d+) \\\n  --node", text))) == 2, "two nodes on one machine need two ports"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": ["secagg"]}, "keys"),
        ({"defense": ["he"]}, "keys"),
        ({"federation": {"clients": 5, "local_steps": 1, "strategy": "partial"}}, "personal"),
        ({"federation": {"clients": [4, 5], "local_steps": 1}}, "one partition"),
        ({"federation": {"clients": 1, "local_steps": 1}, "attack": [], "defense": []}, "--nodes"),
    ],
)
def test_what_would_be_weaker_is_refused_and_nothing_is_written(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_flower({**TABLES, "attack": [], **change}, tmp_path / "app", nodes=2)
    assert not (tmp_path / "app").exists()


def test_weights_of_this_machine_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    first = assemble(Cell.from_json(json.loads(json.dumps(_cell().to_json()))))
    from fedsec import checkpoint

    checkpoint.save(weights, first.seats.model.state_dict(), {})
    with pytest.raises(ConfigError, match=re.escape("w.safetensors")):
        export_flower({**TABLES, "model": {"name": "lenet", "weights": str(weights)}}, tmp_path / "app", nodes=2)


def _cell() -> Cell:
    from fedsec.config import expand
    from fedsec.federation.assemble import resolve

    return resolve(expand({**TABLES, "attack": [], "defense": [], "federation": {"clients": 2, "engine": "serial"}})[0])


def test_hospitals_bring_images_that_the_server_never_had(tmp_path: Path) -> None:
    asked = {**TABLES, "attack": [], "defense": ["dp:epsilon=8"], "baseline": False}
    app = export_flower(asked, tmp_path / "app", nodes=2, sizes=[30, 20, 15, 40, 12])
    assert not list(app.folder.rglob("*.safetensors"))
    [cell] = app.cells
    facts = Facts.from_json(json.loads(settings(app.folder)["fedsec-facts"])[cell.key()])
    assert facts.client_sizes == (30, 20, 15, 40, 12) and facts.patient_ids is None
    assert take_seats(cell, facts)[1].client_sizes == facts.client_sizes


@pytest.mark.parametrize(
    ("sizes", "attack", "message"),
    [([30], [], "--sizes"), ([9] * 5, ["poisoning"], "judged"), ([0] * 5, [], "--sizes")],
)
def test_sizes_that_cannot_be(sizes: list[int], attack: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_flower({**TABLES, "attack": attack}, tmp_path / "app", nodes=2, sizes=sizes)
    assert not (tmp_path / "app").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        export_flower(TABLES, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clients", "3", "--rounds", "1", "--local-steps", "1", "--no-baseline", "--set", "data.max_train=60"]
    assert fedsec(["export", "flower", str(tmp_path / "a"), *words, "--defense", "median", "--no-deal"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert not list((tmp_path / "a").rglob("*.safetensors")) and (tmp_path / "a" / "nodes" / "node-3").is_dir()
    assert fedsec(["export", "flower", str(tmp_path / "b"), *words, "--defense", "secagg"]) == 2
    assert "error: secagg" in capsys.readouterr().err


def test_certificates_verify_and_keys_are_secret(app: Path) -> None:
    line = [sys.executable, str(app / "certificates.py"), "fl.example.org", "node-1", "node-2"]
    assert subprocess.run(line, capture_output=True, check=True).returncode == 0
    keys = (app / "keys" / "node-1").read_bytes()
    assert subprocess.run(line, capture_output=True, check=True).returncode == 0
    assert (app / "keys" / "node-1").read_bytes() == keys, "a key that is registered is not replaced"
    root, own = (
        x509.load_pem_x509_certificate((app / "certificates" / n).read_bytes()) for n in ("ca.pem", "server.pem")
    )
    own.verify_directly_issued_by(root)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "fl.example.org" in names.get_values_for_type(x509.DNSName)
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)
    for secret in ("keys/node-1", "certificates/server.key", "certificates/ca.key"):
        assert stat.S_IMODE((app / secret).stat().st_mode) == 0o600
    private = load_ssh_private_key(keys, None)
    public = load_ssh_public_key((app / "keys" / "node-1.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key().public_numbers() == public.public_numbers()
    assert subprocess.run([sys.executable, str(app / "certificates.py")], capture_output=True).returncode == 2


FACTS = Facts((1, 8, 8), 2, "binary", (3, 2))


def test_a_hospitals_own_images(tmp_path: Path) -> None:
    pixels = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    np.savez(tmp_path / "client-0.npz", images=pixels, labels=np.array([[0], [1], [1]]))
    x, y = read_client(tmp_path, 0, FACTS)
    assert torch.equal(x[:, 0], torch.from_numpy(pixels) / 255) and y.tolist() == [0, 1, 1]
    write_client(tmp_path, 0, x, y)
    again, labels = read_client(tmp_path, 0, FACTS)
    assert torch.equal(again, x) and torch.equal(labels, y)


@pytest.mark.parametrize(
    ("images", "labels", "code"),
    [
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), "D09"),
        (np.zeros((3, 9, 9), np.uint8), np.zeros(3, int), "D09"),
        (np.zeros((3, 8, 8)), np.zeros(3, int), "D09"),
        (np.zeros((3, 8, 8), np.uint8), np.zeros(2, int), "D10"),
        (np.zeros((3, 8, 8), np.uint8), np.full(3, 2), "D06"),
        (np.array([{}], dtype=object), np.zeros(3, int), "D02"),
    ],
)
def test_images_that_do_not_fit_the_plan(images: Any, labels: Any, code: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "client-0.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=code):
        read_client(tmp_path, 0, FACTS)


def test_no_images_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="D01"):
        read_client(tmp_path, 0, FACTS)


def test_facts_that_are_none() -> None:
    assert Facts.from_json(json.loads(json.dumps(FACTS.to_json()))) == FACTS
    with pytest.raises(ConfigError):
        Facts.from_json({"image_shape": [1, 8]})
