"""What a client is told when something is wrong, and answers that are compressed or not."""

from __future__ import annotations

import gzip
import json
import zlib

import msgspec
import pytest

from domlora.errors import BundleError, ConfigError, DataError, SchemaError, UnknownDomainError
from domlora.serving.http.answers import (
    Answer,
    NotFoundError,
    UnavailableError,
    compressed,
    json_object,
    reason_of,
    refusal,
)
from domlora.serving.http.limits import BusyError, TooLargeError, TooSlowError


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (DataError("x"), 400, "invalid"),
        (SchemaError("x"), 400, "invalid"),
        (ConfigError("x"), 400, "invalid"),
        (BundleError("x"), 400, "bundle"),
        (UnknownDomainError("x"), 404, "unknown_domain"),
        (NotFoundError("x"), 404, "not_found"),
        (TooSlowError("x"), 408, "too_slow"),
        (TooLargeError("x"), 413, "too_large"),
        (BusyError("x"), 503, "busy"),
        (UnavailableError("x"), 503, "unavailable"),
        (OSError("x"), 500, "failed"),
        (ValueError("x"), 500, "failed"),
    ],
)
def test_each_error_has_its_status(error, status, reason):
    answer = refusal(error)
    assert (answer.status, reason_of(error)) == (status, reason)
    assert json.loads(answer.body)["error"]
    assert ((b"retry-after", b"1") in answer.headers) == (status == 503)


def test_rule_value_and_next_step_are_told_apart():
    told = json.loads(refusal(DataError("ids must be INT64", received="FP32", next_step="Cast them")).body)
    assert told == {"error": "ids must be INT64. Received: 'FP32'.", "next_step": "Cast them.", "reason": "invalid"}


@pytest.mark.parametrize("path", ["/srv/models/live/tables.bin", "/home/somebody/secret/", "/a/b"])
def test_no_path_is_told(path):
    body = refusal(BundleError(f"a file is damaged ({path})", received=path)).body.decode()
    assert path not in body
    assert "a file is damaged" in body


def test_a_bug_tells_nothing_of_itself():
    answer = refusal(RuntimeError("password=1 at /srv/x.py"))
    assert answer.status == 500
    assert b"password" not in answer.body


def test_what_was_received_is_cut_and_always_can_be_sent():
    answer = refusal(DataError("too long", received="\ud800" + "x" * 100_000))
    assert len(answer.body) < 1_200
    json.loads(answer.body)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": [{"b": 1}, {"b": 1, "b" :2}]}',
    ],
)
def test_a_field_that_comes_twice_is_refused(raw):
    with pytest.raises(DataError, match="come once"):
        json_object(raw, msgspec.json.Decoder(dict), len)


@pytest.mark.parametrize("raw", [b'{"a": "b:c:d"}', b'{"a": {"b": {"c": 1}}}', b'{"a:b": [{"c": 1}, {"c": 1}]}'])
def test_colons_elsewhere_do_no_harm(raw):
    assert json_object(raw, msgspec.json.Decoder(dict), len) == json.loads(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"a": "\xff"}', b"[" * 20_000, b'{"a": NaN}', b"[]"])
def test_what_is_no_object_is_refused(raw):
    with pytest.raises(DataError, match="must be JSON"):
        json_object(raw, msgspec.json.Decoder(dict), len)


@pytest.mark.parametrize(("accepted", "unpack"), [(b"gzip", gzip.decompress), (b"br, deflate", zlib.decompress)])
def test_a_long_answer_is_compressed_as_the_client_asks(accepted, unpack):
    answer = compressed(Answer(200, b"0.125," * 2_000), accepted)
    assert unpack(answer.body) == b"0.125," * 2_000
    assert dict(answer.headers)[b"content-encoding"] in accepted


@pytest.mark.parametrize(("size", "accepted"), [(100, b"gzip"), (9_000, None), (9_000, b"br"), (9_000, b"identity")])
def test_other_answers_stay_as_they_are(size, accepted):
    answer = Answer(200, b"x" * size)
    assert compressed(answer, accepted) == answer
