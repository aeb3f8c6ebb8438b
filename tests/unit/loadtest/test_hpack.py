"""Our HPACK decoder against the reference implementation (the hpack package) and RFC 7541's own examples."""

from __future__ import annotations

import contextlib

import hpack as reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_manager.loadtest.wire.hpack import Decoder, HpackError, encode_literal
from repo_manager.loadtest.wire.http2 import BlockReader

TEXT = st.text(st.characters(min_codepoint=1, max_codepoint=0x17F), max_size=40)
NAMES = st.one_of(
    st.sampled_from([":status", "grpc-status", "grpc-message", "date", "x-a"]), st.text("abc-", min_size=1, max_size=9)
)


@settings(max_examples=200)
@given(st.lists(st.lists(st.tuples(NAMES, TEXT), max_size=6), max_size=8), st.booleans())
def test_blocks_of_the_reference_encoder_decode_to_their_fields(blocks, huffman):
    encoder, decoder = reference.Encoder(), Decoder()
    for fields in blocks:
        assert decoder.decode(encoder.encode(fields, huffman=huffman)) == fields


@given(st.lists(st.tuples(NAMES, TEXT), max_size=6), st.booleans())
def test_the_reference_decoder_reads_our_literals(fields, indexed):
    block = b"".join(encode_literal(name, value, indexed=indexed) for name, value in fields)
    decoded = [(str(name), str(value)) for name, value in reference.Decoder().decode(block)]
    assert decoded == fields


def test_the_example_of_the_standard_with_eviction():
    """RFC 7541, C.6: responses with Huffman coding in a table of 256 bytes, the size set by `3fe101`."""
    decoder = Decoder()
    first = decoder.decode(
        bytes.fromhex(
            "3fe101488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
        )
    )
    assert first == [
        (":status", "302"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("location", "https://www.example.com"),
    ]
    assert decoder.decode(bytes.fromhex("4883640effc1c0bf"))[0] == (":status", "307")


def test_size_updates_empty_the_table():
    encoder, decoder = reference.Encoder(), Decoder()
    assert decoder.decode(encoder.encode([("x-a", "1")])) == [("x-a", "1")]
    encoder.header_table_size = 0
    assert decoder.decode(encoder.encode([("x-b", "2")])) == [("x-b", "2")]
    with pytest.raises(HpackError, match="index 62"):
        decoder.decode(b"\xbe")


@pytest.mark.parametrize(
    "block", ["ff", "80", "40", "400a61", "3fe2ff03", "ffffffffffffffff", "4001618466ffffff", "c0"]
)
def test_malformed_blocks_are_refused(block):
    with pytest.raises(HpackError):
        Decoder().decode(bytes.fromhex(block))


@given(st.binary(max_size=60))
def test_no_block_breaks_it_in_another_way(block):
    with contextlib.suppress(HpackError):
        Decoder().decode(block)


def test_remembered_blocks_are_forgotten_when_the_table_changes():
    encoder, reader = reference.Encoder(), BlockReader()
    good = [("grpc-status", "0")]
    assert reader.read(encoder.encode(good), 0x5) is None
    again = encoder.encode(good)
    assert len(again) == 1
    assert reader.read(again, 0x5) is None
    assert reader.is_ok == {again: True}
    assert reader.read(encoder.encode([("grpc-status", "5"), ("grpc-message", "no")]), 0x5) == "NOT_FOUND: no"
    assert reader.is_ok == {}


def test_padding_and_priority_are_skipped():
    block = reference.Encoder().encode([("grpc-status", "0")])
    assert BlockReader().read(b"\x03" + bytes(5) + block + bytes(3), 0x5 | 0x8 | 0x20) is None
