"""Certificates and keys of a test's own, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["make_certificates", "make_key_pair"]


def make_certificates(folder: Path) -> dict[str, Path]:
    """Make an authority and, signed by it, a server's and a client's certificate for `triton.test`, by openssl."""
    folder.mkdir(parents=True, exist_ok=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    (folder / "extensions").write_text("subjectAltName=DNS:triton.test\n")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return {path.name: path for path in folder.iterdir()}


def make_key_pair(folder: Path) -> tuple[Path, Path]:
    """Make a key to sign versions with. Return the private file and the public one."""
    private, public = folder / "key.pem", folder / "key.pub"
    for words in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)],
        ["ec", "-in", str(private), "-pubout", "-out", str(public)],
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    return private, public
