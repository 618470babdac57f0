"""Certificates and tokens as an operator makes them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

pytest.importorskip("cryptography")

from vflair_core.cli.main import main
from vflair_core.communication.remote.clients import Clients
from vflair_core.communication.remote.tls import read_identity


def said(capsys, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_certificates_are_made_and_told(tmp_path, capsys):
    folder = tmp_path / "trial"
    text = said(capsys, "tls", "init", folder, "--host", "model.example.org", "--client", "alice")
    for path in folder.rglob("*.pem"):
        assert str(path) in text
    assert "Keep" in text
    assert str(folder / "authority") in text
    made = json.loads(said(capsys, "tls", "client", folder, "bob", "--json"))
    assert {path.name for path in (folder / "clients" / "bob").iterdir()} == {
        path.rpartition("/")[2] for path in made
    }
    home = folder / "clients" / "bob"
    read_identity(home / "client.pem", home / "client-key.pem", "client")
    assert "nothing is overwritten" in said(capsys, "tls", "init", folder, code=1)
    assert "vflair tls init" in said(capsys, "tls", "client", tmp_path, "bob", code=1)


def test_a_token_goes_to_its_client_and_its_digest_to_the_model_party(tmp_path, capsys):
    clients, out = tmp_path / "clients.toml", tmp_path / "token"
    text = said(
        *(capsys, "token", "new", "alice", "--rights", "infer, train"),
        *("--add-to", clients, "--out", out, "--expires", "2100-12-31"),
    )
    token = out.read_text().strip()
    assert token not in text
    assert token not in clients.read_text()
    assert Clients(clients).find(token).rights == {"infer", "train"}
    for path in (clients, out):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = json.loads(said(capsys, "token", "new", "bob", "--json"))
    text = said(capsys, "token", "new", "carol", "--add-to", clients)
    assert len(Clients(clients)) == 2
    assert shown["token"] not in shown["line"]
    assert "shown only now" in text
    assert {path.name for path in tmp_path.iterdir()} == {"clients.toml", "token"}


def test_what_cannot_be_a_client_leaves_nothing(tmp_path, capsys):
    clients, out = tmp_path / "clients.toml", tmp_path / "token"
    said(capsys, "token", "new", "alice", "--add-to", clients)
    before = clients.read_text()
    new = (capsys, "token", "new")
    assert "has a client 'alice' already" in said(
        *new, "alice", "--add-to", clients, "--out", out, code=1
    )
    assert not out.exists()
    assert "Did you mean 'train'" in said(*new, "bob", "--rights", "trian", code=1)
    assert "is no date" in said(*new, "bob", "--expires", "soon", code=1)
    assert "cannot be the name" in said(*new, "a/b", code=1)
    out.write_text("mine")
    assert "File exists" in said(*new, "bob", "--add-to", clients, "--out", out, code=1)
    assert clients.read_text() == before
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    "words", [["tls", "init", "t"], ["token", "new", "a"], ["tls"], ["--help"]]
)
def test_no_torch_is_loaded_for_it(words, tmp_path):
    code = (
        "import contextlib, io, sys\nfrom vflair_core.cli.main import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main({words!r})\n"
        "sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=False, env=os.environ.copy()
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("cryptography", ["tls", "init", "t"]),
        ("grpc", ["serve", "--model", "m", "--listen", "127.0.0.1:0", "--insecure-loopback"]),
        ("grpc", ["serve", "--show-limits"]),
        (
            "prometheus_client",
            [
                *("serve", "--model", "m", "--listen", "127.0.0.1:0", "--insecure-loopback"),
                *("--metrics", "127.0.0.1:0"),
            ],
        ),
    ],
)
def test_without_the_extra_it_is_named(missing, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.chdir(tmp_path)
    assert "vflair-core[grpc]" in said(capsys, *words, code=1)
    assert not list(tmp_path.iterdir())
