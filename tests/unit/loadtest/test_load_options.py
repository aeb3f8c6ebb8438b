from __future__ import annotations

from pathlib import Path

import pytest

from repo_manager.errors import UsageError
from repo_manager.loadtest.inputs.samples import make_samples
from repo_manager.loadtest.level import default_metrics_url
from repo_manager.loadtest.options import LoadTestOptions, parse_levels, parse_rates
from repo_manager.loadtest.served_model import ServedModelFacts
from repo_manager.loadtest.wire.payload import build_endpoint
from repo_manager.request_data.tensors import InputFacts
from repo_manager.server.transport import ClientOptions
from repo_manager.tls import TlsFiles


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("8", (8,)),
        ("1,4,16", (1, 4, 16)),
        ("1:16", (1, 2, 4, 8, 16)),
        ("1:12", (1, 2, 4, 8, 12)),
        ("2:10:4", (2, 6, 10)),
        ("4:4", (4,)),
    ],
)
def test_levels(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize("text", ["", "0", "a", "4:1", "1:8:0", "1:2:3:4", "1.5", "-1:3"])
def test_levels_that_are_none(text):
    with pytest.raises(UsageError):
        parse_levels(text)


def test_rates():
    assert parse_rates("200") == (200.0,)
    assert parse_rates("100:500:200,50.5") == (100.0, 300.0, 500.0, 50.5)
    for text in ("", "x", "1:2", "5:1:1", "1:5:0"):
        with pytest.raises(UsageError):
            parse_rates(text)


@pytest.mark.parametrize(
    ("url", "protocol", "wire", "address"),
    [
        ("grpc://a:1", None, "grpc", ("a", 1)),
        ("http://a:2/", None, "http", ("a", 2)),
        ("a:3", "http", "http", ("a", 3)),
        ("a:4", None, "grpc", ("a", 4)),
        ("http://a", None, "http", ("a", 8000)),
        ("grpc://[::1]:5", None, "grpc", ("::1", 5)),
        ("grpc://[::1]", None, "grpc", ("::1", 8001)),
        ("grpcs://a", None, "grpc", ("a", 8001)),
        ("https://a", None, "http", ("a", 443)),
        ("http://[::1]:7/triton", None, "http", ("::1", 7)),
    ],
)
def test_addresses(url, protocol, wire, address):
    options = LoadTestOptions(url, "m", protocol=protocol, concurrency=(1,))
    assert (options.wire, options.address) == (wire, address)


def test_the_path_of_a_gateway_is_kept():
    options = LoadTestOptions("http://gateway:80/triton/", "m n", concurrency=(1,))
    assert options.server_url == "http://gateway:80/triton"
    facts = ServedModelFacts(
        options.url, "http", "t", "1", "m n", "1", "b", 0, (InputFacts("x", "FP32", (1,)),), ("y",),
        False, False, False, False,
    )  # fmt: skip
    endpoint = build_endpoint(facts, make_samples(facts, options), options)
    assert (endpoint.path, endpoint.authority) == ("/triton/v2/models/m%20n/infer", "gateway:80")
    assert default_metrics_url(options) is None
    assert default_metrics_url(LoadTestOptions("http://gateway:80", "m", concurrency=(1,)))


def test_only_encrypted_urls_use_the_tls_files():
    access = ClientOptions(root_certificates=Path("ca.pem"), server_name="triton.test")
    plain, encrypted = (LoadTestOptions(url, "m", concurrency=(1,), access=access) for url in ("grpc://a", "grpcs://a"))
    assert plain.tls is None
    assert encrypted.tls == TlsFiles(Path("ca.pem"), None, None, "triton.test")


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": ()},
        {"concurrency": (0,)},
        {"rate": (0.0,)},
        {"batch_size": 0},
        {"url": "ftp://a:1"},
        {"url": "grpc://a:x"},
        {"url": "grpc://a:1/triton"},
        {"url": "http://a:1/triton?x=1"},
        {"url": "grpc://a:1", "protocol": "http"},
        {"client": "other"},
        {"shared_memory": "gpu"},
        {"arrival": "replay"},
        {"duration_s": 1.0, "request_count": 5},
        {"duration_s": 0.0},
        {"workers": 0},
        {"max_windows": 2},
        {"warmup_s": -1.0},
    ],
)
def test_options_that_make_no_sense(change):
    with pytest.raises(UsageError):
        LoadTestOptions(**{"url": "a:1", "model": "m", "concurrency": (1,), **change})
