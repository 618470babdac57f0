"""Who has no token of this run is not let in, nor who had one."""

from __future__ import annotations

import time
import warnings

import attrs
import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed: nox -s flower")

from flwr.app import RecordDict

from vflair_core import (
    ChannelError,
    ExperimentError,
    FineTuning,
    ProtocolError,
    Train,
    init_authority,
    load_data_party,
    tune,
)
from vflair_flower.handover import Handover
from vflair_flower.options import read_run_options
from vflair_flower.served_half import served


@pytest.fixture
def options(premises):
    return read_run_options(premises.run)


def ask(options, handover):
    """Connect and open a training session; return what takes steps."""
    with handover.channel(20) as channel:
        party = load_data_party(options.model, options.cut(), channel=channel)
        tune(party, adapters=options.lora())
        return FineTuning(party, Train(steps=1))


def test_a_node_has_a_token_of_its_own_and_one_that_is_wrong_is_refused(options):
    with served(options) as half:
        first, second = half.admit(1), half.admit(2)
        assert first.token != second.token
        ask(options, first)
        assert len(half.party.sessions) == 1
        with pytest.raises(ChannelError, match="The token is not known here"):
            ask(options, attrs.evolve(first, token=first.token[:-1]))


def test_a_token_of_one_run_does_not_count_in_another(options):
    with served(options) as before:
        old = before.admit(1)
    with pytest.raises(ChannelError, match="cannot be reached"):
        ask(options, old)
    with served(options) as half:
        new = half.admit(1)
        with pytest.raises(ChannelError, match="The token is not known here"):
            ask(options, attrs.evolve(new, token=old.token))
        # and the authority of one run is no authority in another
        with pytest.raises(ChannelError):
            ask(options, attrs.evolve(new, authority=old.authority))


def test_who_is_let_go_leaves_nothing_and_is_not_let_in_again(options):
    with served(options) as half:
        gone, stays = half.admit(1), half.admit(2)
        ask(options, gone)
        ask(options, stays)
        half.let_go(1)
        assert len(half.party.sessions) == 1
        with pytest.raises(ChannelError, match="The token is not known here"):
            ask(options, gone)
        half.let_go(1)  # and nothing more happens


def test_a_node_may_train_and_not_have_anything_saved(options, premises):
    with served(options) as half, half.admit(1).channel(20) as channel:
        party = load_data_party(options.model, options.cut(), channel=channel)
        tune(party, adapters=options.lora())
        tuning = FineTuning(party, Train(steps=1))
        with pytest.raises(ProtocolError, match="may not save"):
            tuning.save(premises.folder / "saved")


def test_the_operators_own_certificate_is_shown(options, tmp_path):
    init_authority(tmp_path / "tls", hosts=["127.0.0.1"])
    home = tmp_path / "tls" / "model-party"
    own = attrs.evolve(
        options,
        tls_certificate=str(home / "server.pem"),
        tls_key=str(home / "server-key.pem"),
        tls_ca=str(home / "ca.pem"),
    )
    with served(own) as half:
        handover = half.admit(1)
        assert handover.authority == (home / "ca.pem").read_bytes()
        ask(own, handover)
    with (
        pytest.raises(ExperimentError, match=r"none\.pem cannot be read"),
        served(attrs.evolve(own, tls_key=str(tmp_path / "none.pem"))),
    ):
        pass


def test_a_token_is_in_no_text_of_a_handover():
    handover = Handover("grpc://h:1", b"ca", "vflair_secret")
    assert "secret" not in repr(handover)
    assert handover.record()["token"] == b"vflair_secret"  # bytes: Flower's logs mask them


@pytest.mark.parametrize("options", ["?token_file=secrets", "?certificate=a&key=b", "/?ca=x", ""])
def test_a_handover_names_a_place_and_no_files_of_the_node(options):
    record = Handover("grpc://[::1]:8443" + options, b"ca", "token").record()
    content = RecordDict({"vflair-handover": record})
    if not options:
        assert Handover.of(content).url == "grpc://[::1]:8443"
        return
    with pytest.raises(ProtocolError, match="without options"):
        Handover.of(content)


def test_a_message_without_handover_is_refused():
    with pytest.raises(ProtocolError, match="does not say where the model party is"):
        Handover.of(RecordDict())


def test_who_is_silent_in_the_middle_of_its_work_is_told_from_who_left_it(options, premises):
    with served(options) as half:
        began = time.monotonic()
        handover = half.admit(1)
        assert half.silent(1, began) is None
        with handover.channel(20) as channel:
            party = load_data_party(options.model, options.cut(), channel=channel)
            tune(party, adapters=options.lora())
            tuning = FineTuning(party, Train(steps=1))
            time.sleep(0.05)
            assert half.silent(1, began) >= 0.05
            tuning.leave(premises.folder / "left")
        time.sleep(0.05)
        assert half.silent(1, began) == 0.0
        assert half.silent(1, time.monotonic()) is None  # in the next stage it has not begun


def test_who_dies_when_it_has_just_taken_its_run_up_has_not_left_it(options, premises):
    """Taking up closes the session that was opened to ask for the old one; that is no farewell."""
    with served(options) as half:
        handover = half.admit(1)
        for stage in ("left", "taken up"):
            with handover.channel(20) as channel:
                party = load_data_party(options.model, options.cut(), channel=channel)
                tune(party, adapters=options.lora())
                tuning = FineTuning(party, Train(steps=1))
                if stage == "left":
                    tuning.leave(premises.folder / "left")
                    began = time.monotonic()
                else:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        tuning.take_up(premises.folder / "left")
        time.sleep(0.05)
        assert half.silent(1, began) >= 0.05
