"""`vflair serve` in a process of its own, over real sockets: who is let in, what is written, and how it ends."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import signal
import subprocess
import threading
import time
import urllib.request

import pytest
import torch

pytest.importorskip("grpc")
pytest.importorskip("cryptography")
pytest.importorskip("prometheus_client")

import grpc

from support.served import EVERYTHING, Premises, served
from vflair_core import (
    ChannelError,
    Lora,
    Partition,
    ProtocolError,
    connect,
    load_data_party,
    split,
    tune,
)
from vflair_core.cli.main import main
from vflair_core.communication import codec
from vflair_core.communication.message import Crossing, Message
from vflair_core.communication.remote import frames, health
from vflair_core.communication.remote.certificates import init_authority
from vflair_core.communication.remote.clients import entry_for, new_token
from vflair_core.parties.model_party.caps import Caps
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train

pytestmark = pytest.mark.slow
CUT = Partition(1, 1)
CLIENTS = {"alice": EVERYTHING, "bob": ("infer",), "carol": EVERYTHING}


@pytest.fixture(scope="module")
def premises(tmp_path_factory):
    return Premises.made(tmp_path_factory.mktemp("premises"), CLIENTS)


@pytest.fixture(scope="module")
def running(premises):
    """One server for all tests that leave it as it was."""
    folder = premises.folder
    words = [
        *premises.words(),
        *("--metrics", "127.0.0.1:0", "--audit", str(folder / "audit.jsonl")),
        *("--checkpoints", str(folder / "runs")),
    ]
    with served(words) as server:
        yield server


def channel_of(premises, server, client="alice", **changes):
    return connect(server.url, **{**premises.options(client), **changes})


def data_party_of(premises, channel):
    return load_data_party(premises.folder / "model", CUT, channel=channel)


# -- what it does ----------------------------------------------------------------------------------------


def test_its_line_says_what_is_served(running):
    assert running.said.count("\n") == 1
    for word in ("TLS", "parameters", "model=LlamaForCausalLM", "head=1", "at most 256 sessions"):
        assert word in running.said


def test_tokens_and_losses_are_the_unsplit_models(premises, running):
    whole = tiny_model("llama")
    with channel_of(premises, running) as channel:
        data_party = data_party_of(premises, channel)
        ids = torch.randint(3, whole.config.vocab_size, (2, 7))
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            data_party.model.generate(ids, **options), whole.eval().generate(ids, **options)
        )
        batch = tiny_batch(whole, labels="tokens")
        assert torch.equal(data_party.model(**batch).loss, whole(**batch).loss)
        data_party.close()


def test_a_url_says_it_all(premises, running):
    (premises.folder / "token").write_text(premises.tokens["bob"] + "\n")
    options = "&".join(f"{name}={path}" for name, path in premises.files("bob").items())
    url = f"{running.url}?{options}&token_file={premises.folder / 'token'}&wire_dtype=bfloat16"
    data_party = load_data_party(premises.folder / "model", CUT, channel=url)
    assert data_party.channel.wire_dtype == "bfloat16"
    data_party.close()
    data_party.channel.close()


# -- who is let in ---------------------------------------------------------------------------------------


def refused(premises, server, words, client="alice", **changes):
    with pytest.raises(ChannelError, match=words):
        channel_of(premises, server, client, timeout=20, **changes)


def test_another_authority_is_not_trusted(premises, running, tmp_path):
    init_authority(tmp_path / "other", clients=["alice"])
    other = tmp_path / "other" / "clients" / "alice"
    refused(premises, running, "not issued by an authority", ca=other / "ca.pem")
    refused(
        *(premises, running, "certificate of the client|closed|handshake"),
        certificate=other / "client.pem",
        key=other / "client-key.pem",
    )


def test_without_a_certificate_or_a_token_nobody_is_let_in(premises, running):
    refused(premises, running, "certificate|closed|handshake", certificate=None, key=None)
    refused(premises, running, "asks for a token", token=None)


def test_a_token_that_is_unknown_or_another_clients_is_refused(premises, running):
    refused(premises, running, "token is not known here", token=new_token())
    refused(premises, running, "another client's", token=premises.tokens["bob"])


def test_who_may_only_infer_cannot_train_or_save(premises, running):
    with channel_of(premises, running, "bob") as channel:
        data_party = data_party_of(premises, channel)
        with pytest.raises(ProtocolError, match=r"may not train here.*it has infer"):
            FineTuning(data_party, Train(steps=2, learning_rate=0.1))
        with pytest.raises(ProtocolError, match="may not save here"):
            data_party.connection.request("save")
        ids = torch.randint(3, 30, (1, 5))
        assert data_party.model(input_ids=ids).logits.shape[:2] == (1, 5)
        data_party.close()


# -- what is written -------------------------------------------------------------------------------------


def test_the_audit_says_who_did_what_and_holds_nothing_that_crossed(premises, running):
    with channel_of(premises, running) as channel:
        data_party = data_party_of(premises, channel)
        data_party.model(input_ids=torch.randint(3, 30, (1, 5)))
        data_party.close()
    refused(premises, running, "not known", token=new_token())
    text = (premises.folder / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    keys = {"time", "what", "client", "session", "kind", "received", "sent", "seconds", "refused"}
    assert {key for line in lines for key in line} == keys
    assert all(
        isinstance(value, str | int | float | None) for line in lines for value in line.values()
    )
    assert max(len(line) for line in text.splitlines()) < 400
    forward = next(line for line in reversed(lines) if line.get("kind") == "forward")
    assert forward["client"] == "alice"
    assert forward["received"] > 0
    assert any(line["what"] == "not_admitted" and line["client"] == "alice" for line in lines)
    everything = text + json.dumps(running.log)
    assert not [token for token in premises.tokens.values() if token in everything]
    assert oct((premises.folder / "audit.jsonl").stat().st_mode)[-3:] == "600"


def test_metrics_count_what_was_asked_and_what_is_held(premises, running):
    address = running.logged("metrics_served")["address"]

    def scraped() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as page:
            lines = page.read().decode().splitlines()
        rows = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in rows}

    before = scraped()
    with channel_of(premises, running) as channel:
        data_party = data_party_of(premises, channel)
        waiting = data_party.model.train()(**tiny_batch(data_party.model, labels="tokens"))
        with pytest.raises(ProtocolError):
            data_party.connection.request("commit")
        during = scraped()
        del waiting
        data_party.close()
    answered = 'vflair_messages_total{kind="forward",outcome="answered"}'
    assert during[answered] == before[answered] + 1
    assert during['vflair_messages_total{kind="commit",outcome="refused"}'] >= 1
    assert during["vflair_sessions"] == before["vflair_sessions"] + 1
    assert during["vflair_streams"] == before["vflair_streams"] + 1
    assert during["vflair_live_graphs"] >= 1
    assert during['vflair_bytes_total{direction="received"}'] > 0
    assert during['vflair_seconds_count{kind="forward"}'] == during[answered]
    assert during['vflair_refused_total{reason="ProtocolError"}'] >= 1
    labels = {name for name in during if "{" in name}
    assert len(labels) < 500  # however much is asked


def test_health_is_told_to_who_asks(premises, running):
    with grpc.secure_channel(f"127.0.0.1:{running.port}", credentials(premises)) as channel:
        check = channel.unary_unary(f"/{health.SERVICE}/Check")
        for service in ("", "vflair.ModelParty"):
            assert check(health.request_for(service), timeout=20) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as failed:
            check(health.request_for("no.such.service"), timeout=20)
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as failed:
            check(b"\x0a\xff", timeout=20)
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def credentials(premises, client="alice"):
    files = {name: path.read_bytes() for name, path in premises.files(client).items()}
    return grpc.ssl_channel_credentials(files["ca"], files["key"], files["certificate"])


# -- what changes while it serves, and how it ends ---------------------------------------------------------


def test_a_client_that_is_taken_out_of_the_file_is_refused_at_its_next_message(tmp_path):
    premises = Premises.made(tmp_path, CLIENTS)
    with served([*premises.words(), "--audit", str(tmp_path / "audit")]) as server:
        with channel_of(premises, server) as channel:
            data_party = data_party_of(premises, channel)
            premises.write_clients(entry_for("alice", premises.tokens["alice"], ["infer"]))
            with pytest.raises(ProtocolError, match="may not train"):
                data_party.open(optimizer={"name": "SGD", "lr": 0.1})
            premises.write_clients(entry_for("bob", premises.tokens["bob"], ["infer"]))
            with pytest.raises(ProtocolError, match="'alice' is not known here any more"):
                data_party.model(input_ids=torch.randint(3, 30, (1, 5)))
        channel_of(premises, server, "bob").close()
        yesterday = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)
        premises.write_clients(entry_for("bob", premises.tokens["bob"], ["infer"], yesterday))
        refused(premises, server, "has expired", "bob")
        premises.write_clients(entry_for("bob", premises.tokens["bob"], ["infer"]))
        # A new certificate, and an audit that was moved away, from a hangup on.
        before = fingerprint_of(server, premises)
        (tmp_path / "tls").rename(tmp_path / "old")
        (tmp_path / "audit").rename(tmp_path / "audit.1")
        init_authority(tmp_path / "tls", clients=list(CLIENTS))
        server.process.send_signal(signal.SIGHUP)
        server.logged("read_again")
        assert fingerprint_of(server, premises) != before
        channel_of(premises, server, "bob").close()
        assert (tmp_path / "audit").exists()
        (tmp_path / "clients.toml").chmod(0o644)
        server.process.send_signal(signal.SIGHUP)
        assert "open to others" in server.logged("not_read_again")["why"]
        channel_of(premises, server, "bob").close()
        assert server.stop() == 0


def test_the_operator_says_what_is_trained(tmp_path):
    premises = Premises.made(tmp_path, CLIENTS)
    whole = ["--lora", "r=2", "--lora", "alpha=4", "--lora", 'target_modules=["q_proj"]']
    lora = Lora(r=2, alpha=4, target_modules=("q_proj",))
    batches = [tiny_batch(tiny_model("llama"), labels="tokens", seed=n) for n in range(2)]
    train = Train(steps=2, learning_rate=0.01)
    data_party, model_party = split(tiny_model("llama"), CUT)
    for party in (data_party, model_party):
        tune(party, adapters=lora)
    tuning = FineTuning(data_party, train)
    expected = [tuning.step(batch) for batch in batches]
    with served([*premises.words(), *whole]) as server, channel_of(premises, server) as channel:
        data_party = data_party_of(premises, channel)
        tune(data_party, adapters=lora)
        names = data_party.connection.facts()["trainable"]
        assert names
        assert all("q_proj.lora_" in name for name in names)
        tuning = FineTuning(data_party, train)
        assert [tuning.step(batch) for batch in batches] == expected
    with served([*premises.words(), "--trainable", "none"]) as server:
        with channel_of(premises, server) as channel:
            assert data_party_of(premises, channel).connection.facts()["trainable"] == []
        assert server.stop() == 0


def fingerprint_of(server, premises):
    from vflair_core.communication.remote.handshake import shake_hands

    files = premises.files("bob")
    files["authority"] = files.pop("ca")
    return shake_hands("127.0.0.1", server.port, **files).certificate.issuer


def test_it_ends_when_it_is_told_to_and_says_so_to_who_watches(premises):
    with (
        served(premises.words()) as server,
        grpc.secure_channel(f"127.0.0.1:{server.port}", credentials(premises)) as channel,
        channel_of(premises, server) as idle,
    ):
        watch = channel.unary_stream(f"/{health.SERVICE}/Watch")(b"", timeout=60)
        assert health.status_in(next(watch)) == health.SERVING
        assert server.stop(signal.SIGINT) == 0  # SIGTERM is sent by other tests
        assert health.status_in(next(watch)) == health.NOT_SERVING
        events = [line["event"] for line in server.log]
        assert events.index("draining") < events.index("server_stopped")
        assert idle.connections == 1


@contextlib.contextmanager
def half_a_message(premises, server):
    """A stream on which a message has begun that does not end."""
    channel = grpc.secure_channel(f"127.0.0.1:{server.port}", credentials(premises))
    token, over = premises.tokens["alice"], threading.Event()
    large = Message(
        *("release", "s", 0, 0, 1), tensors=(Crossing("x", "smashed", torch.zeros(2**20)),)
    )

    def requests():
        yield frames.Hello("test", "float32").frame()
        yield next(frames.pieces(codec.chunks(large)))
        over.wait(120)

    call = channel.stream_stream(frames.METHOD)(
        requests(), metadata=(("authorization", f"Bearer {token}"),)
    )
    next(call)
    time.sleep(0.5)  # the piece is there by then
    yield
    over.set()
    channel.close()


def test_a_second_signal_ends_it_at_once(premises):
    words = [*premises.words(), "--drain", "600", "--limit", "stall=600"]
    with served(words) as server, half_a_message(premises, server):
        server.process.send_signal(signal.SIGTERM)
        server.logged("draining")
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        assert server.stop() == 1
        server.logged("cut_off")


def test_what_stalls_does_not_hold_up_the_end_for_longer_than_it_may(premises):
    words = [*premises.words(), "--drain", "1", "--limit", "stall=600"]
    with served(words) as server, half_a_message(premises, server):
        assert server.stop() == 0
        assert server.logged("server_stopped")["cut_off"] == 1


def test_killed_it_leaves_nothing_behind_and_a_run_goes_on_at_the_next_one(tmp_path):
    premises = Premises.made(tmp_path, CLIENTS)
    runs = ["--checkpoints", str(tmp_path / "runs")]
    batches = [tiny_batch(tiny_model("llama"), labels="tokens", seed=n) for n in range(4)]
    train = Train(steps=4, learning_rate=0.01)
    with served([*premises.words(), *runs]) as server:
        port = server.port
        with channel_of(premises, server) as channel:
            tuning = FineTuning(data_party_of(premises, channel), train)
            losses = [tuning.step(batch) for batch in batches[:2]]
            tuning.save(tmp_path / "data party")
            losses += [tuning.step(batch) for batch in batches[2:]]
            server.process.kill()
            assert server.process.wait(60) == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {name[:4] for name in names} == {"run-", "sess"}
    assert not list((tmp_path / "runs").rglob("*.tmp"))
    with served([*premises.words(f"127.0.0.1:{port}"), *runs]) as server:
        with channel_of(premises, server, "carol") as channel:
            tuning = FineTuning(data_party_of(premises, channel), train)
            with pytest.raises(ProtocolError, match=r"cannot be resumed|did not issue"):
                tuning.load(tmp_path / "data party")
        with channel_of(premises, server) as channel:
            tuning = FineTuning(data_party_of(premises, channel), train)
            tuning.load(tmp_path / "data party")
            assert [tuning.step(batch) for batch in batches[2:]] == losses[2:]
        assert server.stop() == 0


# -- what is refused before it serves ------------------------------------------------------------------------


def said_by(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    return capsys.readouterr().err


def changed(words, **changes):
    """The words of a command with some options given otherwise, or left out (None)."""
    words = list(words)
    for name, value in changes.items():
        at = words.index(f"--{name.replace('_', '-')}")
        words[at : at + 2] = [] if value is None else [words[at], str(value)]
    return words


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"tls_cert": None}, [], "vflair tls init"),
        ({"client_ca": None, "tokens": None}, [], "Say who may use the model party"),
        ({"tokens": "no.toml"}, [], "No such file"),
        ({"tls_key": "no.pem"}, [], "No such file"),
        ({"partition": "2"}, [], "HEAD,TAIL"),
        ({"listen": "8443"}, [], "HOST:PORT"),
        ({"device": "tpu"}, [], "no device 'tpu'"),
        ({}, ["--limit", "sesions=3"], "Did you mean 'sessions'"),
        ({}, ["--limit", "sessions=none"], "name=value"),
        ({}, ["--limit", "sessions=0"], "at least 1|>= 1"),
        ({}, ["--lora", "rank=3"], "no option 'rank' of --lora"),
        ({}, ["--lora", "r=-3"], "'r' must be"),
        ({}, ["--expiry", "0"], "more than 0"),
        ({}, ["--insecure-loopback"], "Leave out one of both"),
        ({"model": None}, [], "Give --model and --listen"),
        ({}, ["--audit", "no/such/folder/audit"], "cannot be written"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(
    changes, more, words, premises, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    import re

    text = said_by([*changed(premises.words(), **changes), *more], capsys)
    assert re.search(words, text), text


def test_plaintext_is_for_this_machine_only(premises, capsys):
    words = ["serve", "--model", str(premises.folder / "model"), "--insecure-loopback"]
    for host in ("0.0.0.0:0", "192.0.2.1:0", "[::]:0"):
        assert "loopback" in said_by([*words, "--listen", host], capsys)


def test_every_limit_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--show-limits", "--device", "cpu", "--limit", "graph_bytes=3MiB"])
    assert ended.value.code == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1] for row in rows}
    assert {name for name, _, _ in Caps().table()} < set(shown)
    assert shown["graph_bytes"] == str(3 * 2**20)
    assert {"streams", "stall", "idle"} < set(shown)


def test_a_port_that_is_taken_is_named(premises, running, capsys):
    text = said_by(premises.words(f"127.0.0.1:{running.port}"), capsys)
    assert "It is taken" in text
    address = running.logged("metrics_served")["address"]
    assert "It is taken" in said_by([*premises.words(), "--metrics", address], capsys)


@pytest.mark.parametrize("tokens", [True, False], ids=["with tokens", "without"])
def test_on_one_machine_it_does_without_tls_when_it_is_told_to(tokens, premises):
    words = [
        *("serve", "--model", str(premises.folder / "model"), "--partition", "1,1"),
        *("--listen", "127.0.0.1:0", "--insecure-loopback", "--device", "cpu"),
    ]
    if tokens:
        words += ["--tokens", str(premises.folder / "clients.toml")]
    with served(words) as server:
        url = f"{server.url}?plaintext=true"
        if tokens:
            with pytest.raises(ChannelError, match="asks for a token"):
                connect(url)
        token = premises.tokens["alice"] if tokens else None
        with connect(url, token=token) as channel:
            data_party_of(premises, channel).close()
        assert server.stop() == 0
