"""A model's file over HTTP: resumed, bounded, and from nobody else."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from repo_manager.errors import InputError, RepoManagerError, UsageError
from repo_manager.repository.stores.objects.retry import RetryOptions
from repo_manager.sources import open_source, web

_BODY = bytes(range(256)) * 4096


@dataclasses.dataclass
class _Site:
    """What the server does.

    Attributes:
        url: of the server.
        e_tag: of the one file.
        breaks_after: bytes of a body after which a connection is broken, one for each of the next answers.
        requests: path and range of each request.
        secret: what `Authorization` has to be; empty: nothing.
    """

    url: str = ""
    e_tag: str = '"1"'
    breaks_after: list[int] = dataclasses.field(default_factory=list)
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    secret: str = ""
    status: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture
def site() -> Iterator[_Site]:
    site = _Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests.append((self.path, self.headers.get("Range", "")))
            if site.status:
                self.send_error(site.status.pop(0))
                return
            if site.secret and self.headers.get("Authorization") != site.secret:
                self.send_error(401)
                return
            if self.path.startswith("/away"):
                self.send_response(302)
                self.send_header("Location", f"{site.url}/model.plan")
                self.end_headers()
                return
            if not self.path.startswith("/model.plan"):
                self.send_error(404)
                return
            start = 0
            match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match is not None and self.headers.get("If-Range") == site.e_tag:
                start = int(match[1])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(_BODY) - 1}/{len(_BODY)}")
            else:
                self.send_response(200)
            if site.e_tag:
                self.send_header("ETag", site.e_tag)
            self.send_header("Content-Length", str(len(_BODY) - start))
            self.end_headers()
            end = start + site.breaks_after.pop(0) if site.breaks_after else len(_BODY)
            with contextlib.suppress(OSError):
                self.wfile.write(_BODY[start:end])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(web, "_RETRY", RetryOptions(deadline_s=60.0, first_s=0.001))


def test_a_file_is_fetched_with_its_facts(site: _Site) -> None:
    with open_source(f"{site.url}/model.plan?sig=not-to-be-kept") as source:
        assert source.path.read_bytes() == _BODY
        assert source.path.name == "model.plan"
        assert source.origin["url"] == f"{site.url}/model.plan"
        assert source.origin["digest"] == f"sha256:{hashlib.sha256(_BODY).hexdigest()}"
        assert source.origin["e_tag"] == '"1"'
        assert "not-to-be-kept" not in str(source.origin)
    assert site.requests == [("/model.plan?sig=not-to-be-kept", "")]


def test_a_connection_that_breaks_is_gone_on_with(site: _Site) -> None:
    site.breaks_after = [100_000, 300_000]
    with open_source(f"{site.url}/model.plan") as source:
        assert source.path.read_bytes() == _BODY
    ranges = [asked for _, asked in site.requests]
    assert ranges[0] == ""
    assert len(ranges) == 3
    assert all(int(asked[6:-1]) > 0 for asked in ranges[1:])


def test_the_next_command_goes_on_unless_the_file_has_changed(site: _Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(answer: object) -> Iterator[bytes]:
        yield _BODY[:200_000]
        raise KeyboardInterrupt

    for e_tag, resumed in (('"1"', True), ('"2"', False)):
        site.e_tag = '"1"'
        with monkeypatch.context() as patched:
            patched.setattr(web, "_pieces", interrupted)
            with pytest.raises(KeyboardInterrupt), open_source(f"{site.url}/model.plan"):
                pass
        site.e_tag = e_tag
        site.requests.clear()
        with open_source(f"{site.url}/model.plan") as source:
            assert source.path.read_bytes() == _BODY
        assert ("bytes=200000-" in [asked for _, asked in site.requests]) is resumed


def test_a_file_that_changes_while_it_is_fetched_is_refused(site: _Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.breaks_after = [100_000]
    pieces = web._pieces

    def changing(answer: object) -> Iterator[bytes]:
        site.e_tag = '"2"'
        yield from pieces(answer)

    monkeypatch.setattr(web, "_pieces", changing)
    with pytest.raises(InputError, match="was changed during the download"), open_source(f"{site.url}/model.plan"):
        pass


def test_a_digest_is_compared(site: _Site) -> None:
    right, wrong = hashlib.sha256(_BODY).hexdigest(), f"{site.url}/model.plan#sha256={'0' * 64}"
    with open_source(f"{site.url}/model.plan#sha256={right}") as source:
        assert source.path.read_bytes() == _BODY
    with pytest.raises(InputError, match="is not what its digest says"), open_source(wrong):
        pass


def test_credentials_come_from_netrc_and_a_redirect_to_another_host_does_not_get_them(
    site: _Site, tmp_path: Path
) -> None:
    site.secret = "Basic dXNlcjpwYXNzd29yZA=="
    with pytest.raises(InputError, match="HTTP 401"), open_source(f"{site.url}/model.plan"):
        pass
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password password\n")
    (tmp_path / "netrc").chmod(0o600)
    with open_source(f"{site.url}/model.plan") as source:
        assert source.path.read_bytes() == _BODY
    made = web._NoDowngrade().redirect_request(
        web.urllib.request.Request("https://a/x", headers={"Authorization": "secret"}), None, 302, "", {}, "https://b/x"
    )
    assert "Authorization" not in made.headers


def test_a_passing_refusal_is_tried_again_and_a_lasting_one_is_not(site: _Site) -> None:
    site.status = [503, 429]
    with open_source(f"{site.url}/away/model.plan") as source:
        assert source.path.read_bytes() == _BODY
    site.requests.clear()
    with pytest.raises(InputError, match="is not there: HTTP 404"), open_source(f"{site.url}/nothing.plan"):
        pass
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://example.invalid/model.onnx", UsageError, "is not encrypted"),
        ("https://user:password@example.invalid/model.onnx", UsageError, "holds a user or a password"),
        ("https://example.invalid/", InputError, "no file's name"),
        ("https://example.invalid/..", InputError, "no file's name"),
        ("https://example.invalid/model.tar.gz", InputError, "is an archive"),
    ],
)
def test_what_is_refused_before_anybody_is_asked(url: str, error: type[RepoManagerError], message: str) -> None:
    with pytest.raises(error, match=message) as caught, open_source(url):
        pass
    assert "password" not in str(caught.value).replace("a user or a password", "")


def test_a_redirect_without_encryption_is_refused() -> None:
    request = web.urllib.request.Request("https://host/model.onnx")
    with pytest.raises(InputError, match="without encryption"):
        web._NoDowngrade().redirect_request(request, None, 302, "", {}, "http://host/model.onnx")
