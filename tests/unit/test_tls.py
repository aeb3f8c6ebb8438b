"""TLS contexts and credentials come from one module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.certificates import make_certificates
from support.proxies import tls_terminating

import repo_manager
from repo_manager.errors import ServerUnreachableError, UsageError
from repo_manager.server.client import TritonClient
from repo_manager.server.transport import ClientOptions

PACKAGE = Path(repo_manager.__file__).parent
MAKERS = re.compile(
    r"create_default_context\(|SSLContext\(|load_cert_chain\(|\.read_bytes\(\).*certificat", re.IGNORECASE
)


def test_no_other_module_makes_a_context() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if MAKERS.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"tls.py"}


@pytest.mark.parametrize("url", ["grpcs://127.0.0.1:1", "https://127.0.0.1:1"])
def test_a_missing_certificate_is_told_alike_over_both_protocols(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^The TLS files cannot be used: .*No such file") as caught:
        TritonClient.connect(url, ClientOptions(root_certificates=tmp_path / "absent.pem"))
    assert "--tls-ca" in (caught.value.hint or "")


@pytest.mark.parametrize("mutual", [False, True], ids=["anyone", "mutual"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_port_that_wants_tls_is_named_when_it_is_not_asked_in_tls(
    protocol: str, mutual: bool, tmp_path: Path
) -> None:
    with tls_terminating(1, make_certificates(tmp_path), mutual=mutual) as proxy:
        address = f"127.0.0.1:{proxy.port}"
        with pytest.raises(ServerUnreachableError) as caught:
            TritonClient.connect(f"{protocol}://{address}").metadata()
    assert caught.value.hint == f"It answers in TLS. With TLS: {protocol}s://{address}"
