"""What an operator sees: the audit, figures, health."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest

pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")

from hypothesis import given
from hypothesis import strategies as st

from vflair_core import VflairError
from vflair_core.communication.remote import health
from vflair_core.communication.remote.audit import Audit
from vflair_core.communication.remote.metrics import Metrics
from vflair_core.communication.remote.served_stream import Served

FORWARD = Served("alice", "5" * 64, "forward", 100, 50, 0.25, None)
REFUSED = Served("alice", "5" * 64, "commit", 0, 0, 0.0, "ProtocolError")


def test_a_line_of_the_audit_is_one_object_in_the_order_of_time(tmp_path):
    audit = Audit(tmp_path / "audit")
    audit(FORWARD)
    audit(REFUSED)
    audit.not_admitted(None, "The token is not known here.")
    (tmp_path / "audit").rename(tmp_path / "audit.1")
    audit(FORWARD)
    audit.reopen()
    audit(FORWARD)
    audit.close()
    old = [json.loads(line) for line in (tmp_path / "audit.1").read_text().splitlines()]
    assert [line["refused"] for line in old] == [
        *(None, "ProtocolError", "The token is not known here.", None)
    ]
    assert old[0]["session"] == "5" * 16
    assert [line["time"] for line in old] == sorted(line["time"] for line in old)
    assert len((tmp_path / "audit").read_text().splitlines()) == 1


def test_what_a_client_calls_its_session_itself_is_not_in_the_audit(tmp_path):
    audit = Audit(tmp_path / "audit")
    audit(Served("alice", "my pin is 4096", "open", 0, 0, 0.0, "ProtocolError"))
    audit.close()
    assert json.loads((tmp_path / "audit").read_text())["session"] is None


def test_a_full_disk_loses_lines_of_the_audit_and_says_so(caplog):
    audit = Audit("/dev/full")
    with caplog.at_level(logging.WARNING, "vflair_core"):
        audit(FORWARD)
    audit.close()
    assert audit.lost == 1
    assert caplog.records[-1].event == "audit_line_lost"
    assert "No space left" in caplog.records[-1].fields["why"]


def test_an_audit_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(VflairError, match="cannot be written"):
        Audit(tmp_path / "no" / "audit")


def test_figures_have_few_labels_whatever_peers_do():
    metrics = Metrics({"sessions": lambda: 3.0})
    before = series(metrics)
    for number in range(100):
        metrics(Served(f"client {number}", f"session {number}", "forward", 1, 2, 0.1, None))
        metrics(Served("a", "s", "commit", 1, 2, 0.1, f"Reason{number}"))
    after = series(metrics)
    assert set(after) - set(before) == {'vflair_refused_total{reason="other"}'}
    assert after["vflair_sessions"] == 3
    assert after['vflair_bytes_total{direction="sent"}'] == 400
    assert after['vflair_messages_total{kind="commit",outcome="refused"}'] == 100


def series(metrics):
    from prometheus_client import generate_latest

    lines = generate_latest(metrics.registry).decode().splitlines()
    rows = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in rows if "_created" not in name}


def test_figures_on_a_port_that_is_taken_are_an_error():
    metrics = Metrics({})
    port, stop = metrics.listen("127.0.0.1", 0)
    with pytest.raises(VflairError, match="Choose another port"):
        metrics.listen("127.0.0.1", port)
    stop()


# A message of Protocol Buffers by hand: tag, length, content.
def test_health_is_spoken_as_protocol_buffers_have_it():
    assert health.request_for("") == b""
    assert health.request_for("abc") == b"\x0a\x03abc"
    assert health.status_in(b"\x08\x02") == health.NOT_SERVING
    assert health.status_in(b"") == 0
    assert health.status_in(b"\x12\x01x\x08\x01") == health.SERVING  # an unknown field before it


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_an_error(data):
    with contextlib.suppress(ValueError):
        assert all(number >= 0 for number, _ in health._fields(data))
