"""What is wrong with the way to a model party is said in plain words, each fault in its own."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import socket
import ssl
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc")
pytest.importorskip("cryptography")

from vflair_core import ChannelError, ProtocolError, serve
from vflair_core.cli.main import main
from vflair_core.communication.remote import certificates, handshake
from vflair_core.communication.remote.admission import Admission
from vflair_core.communication.remote.certificates import init_authority
from vflair_core.communication.remote.clients import Clients, entry_for, new_token
from vflair_core.communication.remote.doctor import examine
from vflair_core.communication.remote.handshake import connect, resolve, shake_hands
from vflair_core.communication.remote.tls import Renewed
from vflair_core.errors import VflairError

STEPS = ("address", "resolve", "connect", "credentials", "tls", "greeting", "round trip")
WAYS = ("as float32", "as bfloat16", "as int8")


def refusing(message):
    raise ProtocolError(f"no {message.kind} here")


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial") / "t"
    init_authority(folder, clients=["alice"])
    return folder


@pytest.fixture(scope="module")
def token():
    return new_token()


@pytest.fixture
def server(trial, token, tmp_path):
    """A server that lets alice in and answers nothing."""
    file = tmp_path / "clients.toml"
    file.touch(0o600)
    file.write_text(entry_for("alice", token, ["infer"]))
    with served(trial, Clients(file)) as running:
        yield running


def served(folder, clients=None):
    home = folder / "model-party"
    renewed = Renewed(home / "server.pem", home / "server-key.pem", home / "ca.pem")
    return serve(
        refusing,
        "127.0.0.1:0",
        credentials=renewed.credentials(),
        authenticate=Admission(clients, certificates=True),
    )


def files_of(folder, client="alice"):
    home = folder / "clients" / client
    return {
        "ca": home / "ca.pem",
        "certificate": home / "client.pem",
        "key": home / "client-key.pem",
    }


def last(server_or_port, **options):
    port = getattr(server_or_port, "port", server_or_port)
    return list(examine(f"grpc://127.0.0.1:{port}", rounds=2, **options))[-1]


def failure(server_or_port, step, **options):
    found = last(server_or_port, **options)
    assert (found.name, found.well) == (step, False), found
    return found.text


# -- all is well -----------------------------------------------------------------------------------------


def test_every_step_is_told_where_all_is_well(server, trial, token):
    asked = []

    def model(channel):
        asked.append(channel)
        return "fits"

    url = f"grpc://127.0.0.1:{server.port}"
    steps = list(examine(url, **files_of(trial), token=token, rounds=3, model=model))
    assert [step.name for step in steps] == [*STEPS, *WAYS, "model"]
    assert all(step.well for step in steps)
    told = {step.name: step.text for step in steps}
    assert "TLSv1.3" in told["tls"]
    assert "localhost, 127.0.0.1, ::1" in told["tls"]
    assert "'alice'" in told["credentials"]
    assert "364 days left" in told["credentials"]
    assert "protocol 1, vflair" in told["greeting"]
    assert "MiB/s" in told["as int8"]
    assert token not in json.dumps(told)
    assert len(asked) == 1


def test_what_the_model_says_is_the_last_word(server, trial, token):
    def model(channel):
        raise ProtocolError("head=1 against head=2")

    options = {**files_of(trial), "token": token, "model": model}
    assert failure(server, "model", **options) == "head=1 against head=2"


def test_without_tls_on_one_machine():
    with serve(refusing, "127.0.0.1:0", plaintext=True) as running:
        steps = list(examine(f"grpc://127.0.0.1:{running.port}?plaintext=true", rounds=2))
        assert [step.name for step in steps] == [*STEPS, *WAYS]
        assert all(step.well for step in steps), steps


def test_a_url_with_all_options_is_taken(server, trial, token, tmp_path):
    (tmp_path / "token").write_text(token)
    files = "&".join(f"{name}={path}" for name, path in files_of(trial).items())
    more = f"token_file={tmp_path / 'token'}&wire_dtype=int8&timeout=9"
    steps = list(examine(f"grpc://localhost:{server.port}?{files}&{more}", rounds=1))
    assert [step.name for step in steps if step.well] == [*STEPS, *WAYS], steps


def test_a_proxy_in_the_way_is_told(monkeypatch):
    @contextlib.contextmanager
    def reached(host, port):
        yield SimpleNamespace(getpeername=lambda: (host, port))

    monkeypatch.setattr(handshake, "connect", reached)
    monkeypatch.setenv("https_proxy", "http://192.0.2.1:3128")
    *_, step = itertools.islice(examine("grpc://192.0.2.7:1"), 3)
    assert step.name == "connect"
    assert "through the proxy that https_proxy names" in step.text


def test_a_certificate_that_ends_soon_is_told(tmp_path):
    init_authority(tmp_path / "t", clients=["alice"], days=10)
    with served(tmp_path / "t") as running:
        url = f"grpc://127.0.0.1:{running.port}"
        steps = {step.name: step for step in examine(url, **files_of(tmp_path / "t"), rounds=1)}
        assert steps["as int8"].well
        assert "9 days left: renew it" in steps["tls"].text
        assert "9 days left: renew it" in steps["credentials"].text


def test_the_command_prints_a_line_for_each_step_and_ends_with_1_on_failure(
    server, trial, token, capsys, monkeypatch, tmp_path
):
    words = ["doctor", f"grpc://127.0.0.1:{server.port}", "--rounds", "2"]
    words += [word for name, path in files_of(trial).items() for word in (f"--{name}", str(path))]
    monkeypatch.setenv("VFLAIR_TOKEN", token)
    assert ended(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(STEPS + WAYS)
    (tmp_path / "token").write_text("wrong\n")
    assert ended([*words, "--token-file", str(tmp_path / "token"), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1]["step"] == "greeting"
    assert not rows[-1]["ok"]


def ended(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


# -- one fault each ----------------------------------------------------------------------------------------


def test_an_address_that_is_none():
    assert "grpc://HOST:PORT" in failure("", "address")


def test_a_host_without_an_address():
    steps = list(examine("grpc://no.such.host.invalid:8443"))
    assert (steps[-1].name, steps[-1].well) == ("resolve", False)
    assert "has no address" in steps[-1].text
    with pytest.raises(ChannelError, match="has no address"):
        resolve("x" * 300, 1)


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        assert "Nobody listens" in failure(taken.getsockname()[1], "connect")


def test_packets_are_dropped(monkeypatch):
    def late(*_):
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", late)
    with pytest.raises(ChannelError, match=r"firewall.*TCP port 9"):
        connect("127.0.0.1", 9)


def test_no_token_an_unknown_one_and_no_certificate(server, trial):
    files = files_of(trial)
    assert "asks for a token" in failure(server, "greeting", **files)
    assert "not known here" in failure(server, "greeting", **files, token="x")
    assert "asks for a client's certificate" in failure(server, "tls", ca=files["ca"])


def test_an_authority_that_is_not_theirs(server, trial, tmp_path):
    init_authority(tmp_path / "other", clients=["alice"])
    ours, other = files_of(trial), files_of(tmp_path / "other")
    text = failure(server, "tls", **{**ours, "ca": other["ca"]})
    assert "was not signed by the authority in" in text
    assert "vflair model party" in text
    text = failure(server, "tls", **{name: path for name, path in ours.items() if name != "ca"})
    assert "not signed by an authority that this system trusts" in text
    text = failure(server, "tls", **{**other, "ca": ours["ca"]})
    assert "did not take our certificate" in text


def test_files_that_do_not_fit(server, trial):
    files = files_of(trial)
    cases = [
        ({"certificate": files["ca"]}, "does not belong"),
        ({"key": trial / "none.pem"}, "No such file"),
        ({"key": None}, "given together"),
        ({"ca": files["certificate"]}, "holds no authority"),
    ]
    for change, words in cases:
        assert words in failure(server, "credentials", **{**files, **change})


def test_a_certificate_for_another_host(tmp_path):
    init_authority(tmp_path / "t", hosts=["model.example.org"], clients=["alice"])
    with served(tmp_path / "t") as running:
        text = failure(running, "tls", **files_of(tmp_path / "t"))
        assert "is for model.example.org, not for '127.0.0.1'" in text
        assert "--host 127.0.0.1" in text


@pytest.mark.parametrize(
    ("shift", "words"), [(-40, "has ended on"), (40, "does not hold yet")], ids=["ended", "not yet"]
)
def test_a_certificate_of_another_time(shift, words, tmp_path, monkeypatch):
    folder = tmp_path / "t"
    init_authority(folder, clients=["alice"])
    monkeypatch.setattr(
        certificates, "_now", lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=shift)
    )
    home = folder / "model-party"
    for path in home.iterdir():
        path.unlink()
    home.rmdir()
    certificates._server(folder, ["127.0.0.1"], 30)
    with pytest.raises(VflairError, match=r"ended on|begins on"):
        served(folder)  # an operator would be told when it starts
    with tls_server(home) as port:
        assert words in failure(port, "tls", **files_of(folder))


def test_what_speaks_no_tls_or_nothing_or_hangs_up(server, trial):
    files = files_of(trial)
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "does not speak TLS" in failure(port, "tls", **files)
    with answering(b"") as port:
        assert "ended the handshake" in failure(port, "tls", ca=files["ca"])
    with answering(None) as port, pytest.raises(ChannelError, match="then said nothing"):
        shake_hands("127.0.0.1", port, authority=files["ca"], seconds=0.2)
    text = failure(server, "tls", plaintext=True)
    assert "does not speak without TLS" in text


def test_tls_without_http_2_is_no_model_party(trial):
    with tls_server(trial / "model-party") as port:
        assert "speaks TLS but not HTTP/2" in failure(port, "tls", **files_of(trial))


@contextlib.contextmanager
def listening(serve_one):
    """A socket on which `serve_one` deals with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        serve_one(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), 1).close()
            thread.join(20)


def answering(data: bytes | None):
    """Says `data` once something was said to it; None says nothing."""

    def serve_one(connection: socket.socket) -> None:
        connection.settimeout(1)
        connection.recv(4096)
        if data is None:
            connection.recv(1)  # until the other side gives up
        else:
            connection.sendall(data)

    return listening(serve_one)


def tls_server(home):
    """TLS, and nothing over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.pem", home / "server-key.pem")

    def serve_one(connection: socket.socket) -> None:
        connection.settimeout(5)
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)

    return listening(serve_one)
