"""Makes certificates and keys for a test of this app: a certificate authority, the server's certificate, nodes' keys.

    python certificates.py HOST NODE...

For anything but a test, use your own authority, and let every hospital make its own key and hand over `NAME.pub` alone.
Needs the package `cryptography`. Existing keys are kept, so that the line can be typed again.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=30)
KEY_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def write_secret(path: Path, content: bytes) -> None:
    """A file that nobody but its owner can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def name(text: str) -> x509.Name:
    """A certificate's name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def key_usage(*allowed: str) -> x509.KeyUsage:
    """What a key may be used for."""
    return x509.KeyUsage(**{use: use in allowed for use in KEY_USES})


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in this file, made where there is none."""
    if path.exists():
        loaded = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        return loaded
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def builder(subject: str, issuer: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    """What every certificate here has."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def certificates(folder: Path, host: str) -> None:
    """`ca.pem`, `server.pem` and their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, server = private_key(folder / "ca.key"), private_key(folder / "server.key")
    root = (
        builder("fedsec test authority", "fedsec test authority", authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage("key_cert_sign", "crl_sign"), critical=True)
        .sign(authority, hashes.SHA384())
    )
    places: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        places.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        places.append(x509.DNSName(host))
    own = (
        builder(host, "fedsec test authority", server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(list(dict.fromkeys(places))), critical=False)
        .add_extension(key_usage("digital_signature", "key_agreement"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(authority, hashes.SHA384())
    )
    (folder / "ca.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(own.public_bytes(Encoding.PEM))


def node_key(folder: Path, node: str) -> None:
    """`NODE` and `NODE.pub`, in OpenSSH form."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / node).exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(folder / node, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (folder / f"{node}.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


def main(words: list[str]) -> int:
    """Write everything beside this file."""
    if not words or words[0].startswith("-"):
        print(__doc__)
        return 2
    here = Path(__file__).resolve().parent
    certificates(here / "certificates", words[0])
    for node in words[1:]:
        node_key(here / "keys", node)
    print(f"{here / 'certificates'}: ca.pem, server.pem; {here / 'keys'}: {', '.join(words[1:]) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
