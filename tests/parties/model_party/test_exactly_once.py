"""Whatever is lost, repeated, refused or comes out of order: each message is carried out once, and a refused one not at all."""

from __future__ import annotations

import threading
import warnings

import attrs
import pytest
import torch

from vflair_core import Partition, split
from vflair_core.communication import codec
from vflair_core.communication.channel import Channel
from vflair_core.errors import BusyError, ChannelError, ProtocolError, SessionLostError
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train

SGD = Train(steps=4, optimizer="sgd", learning_rate=0.1)


class Wire(Channel):
    """Another process, as far as both can tell; `fault` is asked before and after each delivery."""

    lasting, patience = True, 20.0

    def __init__(self, handle, fault=lambda message, after: None):
        super().__init__()
        self.handle, self.fault = handle, fault

    def deliver(self, message):
        self.fault(message, after=False)
        reply = self.handle(codec.decode(codec.encode(message)))
        self.fault(message, after=True)
        return codec.decode(codec.encode(reply))


class Repeating(Wire):
    """Sends each message twice, as after a reply that was lost."""

    def deliver(self, message):
        first = super().deliver(message)
        second = super().deliver(message)
        assert codec.encode(first) == codec.encode(second)
        return second


def over(channel, kind="gpt2", cut=(1, 1), **overrides):
    """Two halves of a tiny model, with `channel` between them."""
    model = tiny_model(kind, **overrides)
    data_party, model_party = split(model, Partition(*cut))
    made = channel(model_party.handle)
    data_party.channel = data_party.connection.channel = made
    return data_party, model_party, tiny_batch(model, labels="tokens")


def losses(data_party, batch, count=4, step=None):
    torch.manual_seed(3)
    tuning = FineTuning(data_party, SGD)
    return [(step or tuning.step)(batch) for _ in range(count)]


@pytest.mark.parametrize("cut", [(1, 1), (2, 0)], ids=["HBT", "HT"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_message_sent_twice_trains_and_generates_as_if_it_came_once(kind, cut):
    once, _, batch = over(Wire, kind, cut)
    twice, _, _ = over(Repeating, kind, cut)
    assert losses(once, batch) == losses(twice, batch)
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    one, two = (p.model.eval().generate(**text, **options) for p in (once, twice))
    assert torch.equal(one, two)


def test_a_message_out_of_order_is_refused_and_nothing_is_lost_by_it():
    said = []
    data_party, model_party, batch = over(
        lambda handle: Wire(handle, lambda message, after: said.append(message) if after else None)
    )
    tuning = FineTuning(data_party, SGD)
    tuning.step(batch)
    expected = [weight.clone() for weight in model_party.parameters()]
    for old in said[:-1]:
        with pytest.raises(ProtocolError, match="Each is answered once, in their order"):
            model_party.handle(old)
    with pytest.raises(ProtocolError, match="came after message"):
        model_party.handle(attrs.evolve(said[-1], seq=said[-1].seq + 2))
    with pytest.raises(ProtocolError, match="came after message"):  # another one under its number
        model_party.handle(attrs.evolve(said[-1], kind="norms"))
    assert all(map(torch.equal, expected, model_party.parameters()))
    tuning.step(batch)


def test_a_lost_reply_to_a_commit_is_given_again_and_the_step_is_taken_once():
    class Broken(Wire):
        def deliver(self, message):
            if message.kind == "commit" and not self.broken:
                self.broken = True
                super().deliver(message)  # carried out; the reply is lost
            return super().deliver(message)

        broken = False

    sound, _, batch = over(Wire)
    broken, model_party, _ = over(Broken)
    assert losses(sound, batch) == losses(broken, batch)
    (session,) = model_party.sessions.values()
    assert session.step == 4


@pytest.mark.parametrize("kind", ["forward", "backward", "norms", "commit"])
@pytest.mark.parametrize("after", [False, True], ids=["on the way there", "on the way back"])
@pytest.mark.parametrize(
    ("model", "why"), [("gpt2", ChannelError), ("llama", ChannelError), ("gpt2", KeyboardInterrupt)]
)
def test_a_step_that_failed_is_taken_again_as_if_it_had_not(kind, after, model, why):
    """With dropout at both parties, so that all that is drawn must be drawn again."""
    overrides = {"resid_pdrop": 0.2} if model == "gpt2" else {"attention_dropout": 0.2}
    failed = []

    def fault(message, after):
        if message.kind == kind and message.step == 2 and after is when and not failed:
            failed.append(message)
            raise why("The line is dead.")

    when = after
    sound, _, batch = over(Wire, model, **overrides)
    expected = losses(sound, batch)
    data_party, _, _ = over(lambda handle: Wire(handle, fault), model, **overrides)
    torch.manual_seed(3)
    tuning = FineTuning(data_party, SGD)

    def step(batch):
        try:
            return tuning.step(batch)
        except (ChannelError, KeyboardInterrupt):
            return tuning.step(batch)

    if after and kind == "commit":  # one party took the step, the other did not
        with pytest.raises(SessionLostError, match="the parties may be at different points"):
            losses(data_party, batch, step=step)
        return
    assert [step(batch) for _ in range(4)] == expected
    assert failed


@pytest.mark.parametrize("kind", ["forward", "backward", "commit"])
def test_a_step_that_was_refused_is_taken_again_as_if_it_had_not(kind):
    refused = []

    def fault(message, after):
        if message.kind == kind and message.step == 1 and not after and not refused:
            refused.append(message)
            raise ProtocolError("No.")

    expected = losses(*(over(Wire)[::2]))
    data_party, _, batch = over(lambda handle: Wire(handle, fault))
    torch.manual_seed(3)
    tuning = FineTuning(data_party, SGD)
    taken = [tuning.step(batch)]
    with pytest.raises(ProtocolError, match=r"No\."):
        tuning.step(batch, batch)
    taken += [tuning.step(batch) for _ in range(3)]
    assert taken == expected


def test_dropout_beside_another_data_party_is_that_of_a_run_alone():
    def run(*, company):
        data_party, model_party, batch = over(Wire, resid_pdrop=0.3)
        other, _, _ = over(lambda _: Wire(model_party.handle), resid_pdrop=0.3)
        other.connection.fingerprint = data_party.connection.fingerprint
        other.open()
        torch.manual_seed(3)
        tuning = FineTuning(data_party, SGD)
        taken = []
        for _ in range(4):
            if company:
                with torch.random.fork_rng([]), torch.no_grad():
                    other.model.train()(**batch, use_cache=False)
            taken.append(tuning.step(batch))
        return taken

    assert run(company=False) == run(company=True)


def test_close_always_works_and_what_is_closed_may_be_closed_again():
    data_party, model_party, batch = over(Wire)
    data_party.open()
    data_party.connection.copies.append(("never", "was"))
    data_party.model(**batch)
    data_party.connection.copies.append(("never", "was"))
    data_party.close()
    data_party.close()
    assert not model_party.sessions
    with pytest.raises(SessionLostError, match="send 'open' first"):
        data_party.connection.request("norms")


def test_a_copy_of_a_cache_that_is_gone_wedges_nobody():
    data_party, _, batch = over(Wire)
    data_party.open()
    data_party.connection.copies.append(("never", "was"))
    expected = data_party.model(**batch).logits
    assert torch.equal(data_party.model(**batch).logits, expected)


@pytest.mark.parametrize("kind", ["t5", "mamba", "llama", "minimax"])
def test_a_cache_is_as_it_was_when_the_call_that_was_to_fill_it_is_refused(kind):
    """The model party breaks off after its first block has filled its layer; the same message is then sent again."""
    task = {"t5": "seq2seq"}.get(kind, "causal-lm")
    sizes = {"minimax": {"num_key_value_heads": 1}, "t5": {"num_decoder_layers": 4}}.get(kind, {})
    model, expected = tiny_model(kind, task, **sizes), tiny_model(kind, task, **sizes)
    data_party, model_party = split(model, Partition(1, 1))
    last = model_party.held[-1].stage.blocks[-1]
    block = model_party.model.get_submodule(last)
    calls = []

    def stumble(*_):
        calls.append(1)
        if len(calls) in (2, 4):
            raise RuntimeError("Out of memory, say.")

    class Stubborn(Wire):
        def deliver(self, message):
            try:
                return super().deliver(message)
            except ProtocolError:
                return super().deliver(message)

    data_party.channel = data_party.connection.channel = Stubborn(model_party.handle)
    block.register_forward_pre_hook(stumble)
    text = {"input_ids": tiny_batch(expected)["input_ids"]}
    options = {"max_new_tokens": 6, "do_sample": False}
    want = expected.generate(**text, **options)
    assert torch.equal(data_party.model.generate(**text, **options), want)
    assert len(calls) > 4


def test_a_refused_message_lets_go_of_nothing():
    said = []
    data_party, model_party, batch = over(
        lambda handle: Wire(handle, lambda message, after: said.append(message) if after else None)
    )
    data_party.open()
    out = data_party.model(**batch, use_cache=True)
    out.loss.backward(retain_graph=True)
    session = model_party.sessions[data_party.connection.session]
    ((number, _),) = session.graphs.items()
    (key,) = session.caches._caches
    program = next(iter(session.jobs))
    news = {"released_graphs": [number], "released_caches": [key], "released_programs": [program]}
    backward = said[-1]
    for kind, meta in (
        ("backward", {**backward.meta, "outputs": [7]}),
        ("commit", {"skip": False, "scale": None, "lr": 1.0}),
        ("forward", {"id": "none"}),
        ("save", {}),
    ):
        message = attrs.evolve(backward, kind=kind, meta=meta | news, seq=session.seq + 1)
        with pytest.raises(ProtocolError):
            model_party.handle(message)
        assert number in session.graphs
        assert key in session.caches._caches
        assert program in session.jobs
    model_party.handle(attrs.evolve(backward, kind="release", meta=news, seq=session.seq + 1))
    assert number not in session.graphs
    assert not len(session.caches)
    assert program not in session.jobs


def test_gradients_that_are_no_numbers_are_never_stepped_with():
    data_party, model_party, batch = over(Wire)
    tuning = FineTuning(data_party, SGD)
    data_party.model.train()
    (data_party.model(**batch, use_cache=False).loss * float("inf")).backward()
    before = [weight.clone() for weight in model_party.parameters()]
    with pytest.raises(ProtocolError, match="not a finite number"):
        data_party.connection.commit(scale=None, rate=0.1, skip=False)
    assert all(map(torch.equal, before, model_party.parameters()))
    data_party.connection.commit(scale=None, rate=0.1, skip=True)
    tuning.step(batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamw", "capturable": True}, "capturable says how torch computes"),
        ({"name": "adamw", "lr": float("nan")}, "option 'lr' cannot be nan"),
        ({"name": "adamw", "betas": [0.9, 1.0]}, "option 'betas'"),
        ({"name": "adamw", "eps": 0.0}, "option 'eps'"),
        ({"name": "sgd", "lr": -1.0}, "option 'lr'"),
        ({"name": "sgd", "momentum": True}, "option 'momentum'"),
        ({"name": "adamw", "foreach": True, "fused": True}, "cannot carry out"),
    ],
    ids=str,
)
def test_an_optimizer_that_would_fail_later_is_refused_when_it_is_asked_for(options, words):
    data_party, model_party, _ = over(Wire)
    with pytest.raises(ProtocolError, match=words):
        data_party.open(options)
    assert not any(session.trains for session in model_party.sessions.values())


def test_a_switch_of_the_optimizer_stays_as_it_is():
    data_party, model_party, batch = over(Wire)
    data_party.open({"name": "adamw", "lr": 0.1})
    data_party.model(**batch, use_cache=False).loss.backward()
    before = [weight.clone() for weight in model_party.parameters()]
    with pytest.raises(ProtocolError, match="amsgrad cannot be changed"):
        data_party.connection.commit(scale=0.5, rate=0.1, skip=False, groups=[{"amsgrad": True}])
    assert all(map(torch.equal, before, model_party.parameters()))
    data_party.connection.commit(scale=None, rate=0.1, skip=False, groups=[{"lr": 0.1}])
    assert not any(map(torch.equal, before, model_party.parameters()))


@pytest.mark.parametrize("sharing", ["turns", "mean"])
def test_data_parties_that_train_at_the_same_time_wait_for_each_other(sharing):
    """Two threads, each a data party of its own: every step of both is taken."""
    first, model_party, batch = over(Wire, "llama")
    second, _, _ = over(lambda _: Wire(model_party.handle), "llama")
    second.connection.fingerprint = first.connection.fingerprint
    model_party.sharing = sharing
    tunings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the weights have moved
        tunings += [FineTuning(party, SGD) for party in (first, second)]
    failed = []

    def train(tuning):
        try:
            for _ in range(8):
                tuning.step(batch)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=train, args=[tuning]) for tuning in tunings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert sorted(model_party.steps.values()) == [8, 8]


def test_who_keeps_a_forward_for_long_holds_up_nobody():
    first, model_party, batch = over(Wire, "llama")
    second, _, _ = over(lambda _: Wire(model_party.handle), "llama")
    second.connection.fingerprint = first.connection.fingerprint
    second.open()
    kept = second.model(**batch, use_cache=False).loss
    (graph,) = model_party.sessions[second.connection.session].graphs.values()
    first.connection.channel.patience = 0.0
    tuning = FineTuning(first, SGD)
    with pytest.raises(BusyError, match="Commit again when it is done"):
        tuning.step(batch)
    graph.made -= 61
    tuning.step(batch)
    with pytest.raises(ProtocolError, match="held up the steps of others"):
        kept.backward()


def test_closing_waits_for_nobody():
    first, model_party, batch = over(Wire, "llama")
    second, _, _ = over(lambda _: Wire(model_party.handle), "llama")
    third, _, _ = over(lambda _: Wire(model_party.handle), "llama")
    for other in (second, third):
        other.connection.fingerprint = first.connection.fingerprint
    model_party.sharing = "mean"
    first.open(SGD.optimizer_spec())
    second.open(SGD.optimizer_spec())
    third.open()
    first.model(**batch, use_cache=False).loss.backward()
    first.connection.commit(scale=None, rate=0.1, skip=False)
    kept = third.model(**batch, use_cache=False).loss
    second.close()
    assert model_party.steps == {first.connection.session: 1}
    with pytest.raises(ProtocolError):
        kept.backward()


@pytest.mark.parametrize("after", [False, True], ids=["on the way there", "on the way back"])
@pytest.mark.parametrize("dies", [False, True], ids=["is late", "dies"])
def test_a_run_goes_on_wherever_it_breaks_off(tmp_path, after, dies):
    """At each message of two steps in turn; a data party that dies comes back as a new one, at the same model party."""
    train = attrs.evolve(SGD, steps=4, optimizer="adamw")
    calm, _, batch = over(Wire)
    torch.manual_seed(3)
    expected = FineTuning(calm, train)
    for _ in range(4):
        expected.step(batch)
    for place in range(14):
        seen = []

        def fault(message, after, place=place, seen=seen, when=after):
            if after is when:
                seen.append(message)
                if len(seen) == place + 4:
                    raise KeyboardInterrupt if dies else ChannelError("The line is dead.")

        folder = tmp_path / f"{place}"
        data_party, model_party, _ = over(lambda handle, fault=fault: Wire(handle, fault))
        model_party.checkpoints = folder / "theirs"
        torch.manual_seed(3)
        tuning = FineTuning(data_party, train)
        try:
            tuning.run(lambda _: batch, folder / "ours", every=1, patience=5)
        except KeyboardInterrupt:
            data_party, _, _ = over(lambda _, handle=model_party.handle: Wire(handle))
            data_party.connection.fingerprint = calm.connection.fingerprint
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the weights have moved
                tuning = FineTuning(data_party, train)
            tuning.run(lambda _: batch, folder / "ours", every=1, patience=5)
        same = zip(data_party.parameters(), calm.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in same), (place, seen[-1].kind)
