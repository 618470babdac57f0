"""The file of clients: tokens are known by their digests, and a change counts from the next message on."""

from __future__ import annotations

import logging
import os

import pytest

from vflair_core.communication.remote.clients import Clients, entry_for, new_token
from vflair_core.communication.remote.rights import RIGHTS, Client
from vflair_core.errors import VflairError


def written(folder, *lines):
    """A file of clients with these lines, closed to others."""
    file = folder / "clients.toml"
    aside = folder / "aside"
    aside.touch(0o600)
    aside.write_text("\n".join(lines))
    aside.replace(file)
    return file


def test_a_token_finds_its_client_and_no_other(tmp_path):
    tokens = {name: new_token() for name in ("alice", "bob.smith")}
    file = written(
        tmp_path,
        entry_for("alice", tokens["alice"], ["infer", "train"]),
        entry_for("bob.smith", tokens["bob.smith"], ["infer"]),
    )
    clients = Clients(file)
    assert clients.find(tokens["alice"]) == Client("alice", frozenset({"infer", "train"}))
    assert clients.find(tokens["bob.smith"]) == Client("bob.smith", frozenset({"infer"}))
    for wrong in ("", tokens["alice"][:-1], tokens["alice"] + "x", "ä"):
        assert clients.find(wrong) is None
    assert clients.named("alice").rights == {"infer", "train"}
    assert clients.named("carol") is None


def test_the_file_never_holds_a_token(tmp_path):
    token = new_token()
    line = entry_for("alice", token, RIGHTS)
    assert token not in line
    assert token.removeprefix("vflair_") not in line
    assert len({new_token() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("expires", "holds"),
    [
        ("2020-01-01", False),
        ("2100-01-01", True),
        ("2020-01-01T00:00:00Z", False),
        ("2100-01-01T00:00:00", True),
    ],
)
def test_a_token_expires(expires, holds, tmp_path):
    token = new_token()
    line = entry_for("alice", token, ["infer"]).replace("}", f", expires = {expires}}}")
    clients = Clients(written(tmp_path, line))
    assert (clients.find(token) is not None) is holds
    assert (clients.named("alice") is not None) is holds


def test_a_token_holds_through_its_last_day(tmp_path):
    import datetime as dt

    token, today = new_token(), dt.datetime.now(dt.UTC).date()
    clients = Clients(written(tmp_path, entry_for("alice", token, ["infer"], today)))
    assert clients.find(token) is not None


def test_a_change_of_the_file_counts_at_once(tmp_path):
    first, second = new_token(), new_token()
    clients = Clients(written(tmp_path, entry_for("alice", first, ["infer"])))
    assert clients.find(first).name == "alice"
    written(tmp_path, entry_for("bob", second, ["infer"]))
    assert clients.find(first) is None
    assert clients.named("alice") is None
    assert clients.find(second).name == "bob"


def test_a_file_that_breaks_later_is_reported_once_and_the_clients_stay(tmp_path, caplog):
    token = new_token()
    line = entry_for("alice", token, ["infer"])
    file = written(tmp_path, line)
    clients = Clients(file)
    with caplog.at_level(logging.WARNING, "vflair_core"):
        written(tmp_path, "alice = {")
        assert clients.find(token).name == "alice"
        assert clients.find(token).name == "alice"
        assert [record.event for record in caplog.records] == ["clients_not_read"]
        file.unlink()
        assert clients.find(token).name == "alice"
        assert clients.find(token).name == "alice"
    assert [record.event for record in caplog.records] == ["clients_not_read"] * 2
    written(tmp_path, line.replace("alice", "carol"))
    assert clients.find(token).name == "carol"
    file.chmod(0o644)
    with pytest.raises(VflairError, match="open to others"):
        clients.reload()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused(mode, tmp_path):
    file = written(tmp_path, entry_for("alice", new_token(), ["infer"]))
    file.chmod(mode)
    with pytest.raises(VflairError, match=rf"mode {mode:04o}.*chmod 600"):
        Clients(file)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice = {", "cannot be read"),
        ("alice = 3", "write alice ="),
        (f'alice = {{sha256 = "{DIGEST}"}}', "rights must be a list"),
        (f'alice = {{sha256 = "{DIGEST}", rights = []}}', "rights must be a list"),
        (f'alice = {{sha256 = "{DIGEST}", rights = ["trian"]}}', "Did you mean 'train'"),
        (f'alice = {{sha256 = "{DIGEST}", right = ["train"]}}', "Did you mean 'rights'"),
        ('alice = {sha256 = "vflair_abc", rights = ["train"]}', "never the token itself"),
        (
            f'alice = {{sha256 = "{DIGEST}", rights = ["infer"], expires = "2027"}}',
            "must be a date",
        ),
        (f'"a b" = {{sha256 = "{DIGEST}", rights = ["infer"]}}', "cannot be the name"),
        (
            f'a = {{sha256 = "{DIGEST}", rights = ["infer"]}}\nb = {{sha256 = "{DIGEST}", rights = ["infer"]}}',
            "have the same token",
        ),
    ],
)
def test_an_entry_that_is_none_is_refused(line, words, tmp_path):
    with pytest.raises(VflairError, match=words):
        Clients(written(tmp_path, line))


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(VflairError, match="No such file"):
        Clients(tmp_path / "none.toml")
    with pytest.raises(VflairError, match="is no file"):
        Clients(tmp_path)


def test_what_belongs_to_root_may_be_read_by_a_group(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root makes files of root")
    file = written(tmp_path, entry_for("alice", new_token(), ["infer"]))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    file.chmod(0o440)
    assert len(Clients(file)) == 1
    file.chmod(0o444)
    with pytest.raises(VflairError, match="open to others"):
        Clients(file)
