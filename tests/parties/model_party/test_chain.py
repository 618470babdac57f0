"""Several model parties in a row: the data party talks to the first, and all equals the unsplit model."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from vflair_core import (
    Partition,
    Transcript,
    divide,
    join,
    load_data_party,
    load_model_party,
    merge,
    split,
)
from vflair_core.communication.channel import LocalChannel
from vflair_core.communication.program import Program
from vflair_core.errors import CheckpointError, PartitionError, ProtocolError
from vflair_core.parties.model_party.relay import divide_program
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train, train_unsplit
from vflair_core.training.tuning import Lora, tune

DEEP = {"num_hidden_layers": 6}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 6, "num_heads": 2, "dropout_rate": 0.0}
CUTS = pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])


def chain_of_three(model, tail, *, wire=True):
    """Data party, and model parties with two blocks, one, and the rest."""
    data_party, first = split(copy.deepcopy(model), Partition(1, tail), wire=wire)
    second = divide(first, 2, wire=wire)
    third = divide(second, 1)
    return data_party, [first, second, third]


def deep(kind="llama"):
    if kind != "t5":
        return tiny_model(kind, **DEEP)
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **T5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config).eval()


def weights(owners):
    return {name: p for owner in owners for name, p in owner.named_parameters()}


@CUTS
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_loss_and_gradients_through_three_model_parties_equal_the_unsplit_models(kind, tail):
    whole = deep(kind)
    data_party, chain = chain_of_three(whole, tail)
    batch = tiny_batch(whole, labels="tokens")
    if data_party.untied:  # the output layer is a copy, so the witness gets one too
        whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    ours, theirs = data_party.model(**batch).loss, whole(**batch).loss
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    found, expected = weights([data_party, *chain]), dict(whole.named_parameters())
    assert set(found) == set(expected)
    assert sum(len(weights([party])) for party in (data_party, *chain)) == len(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].grad, weight.grad, rtol=0, atol=1e-6)


@CUTS
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_a_chain_generates_what_the_unsplit_model_does(tail, options):
    whole = deep().eval()
    data_party, chain = chain_of_three(whole, tail)
    prompt = tiny_batch(whole)["input_ids"][:1]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(
        data_party.model.generate(prompt, **options), whole.generate(prompt, **options)
    )
    gc.collect()
    data_party.model(**tiny_batch(whole), use_cache=False)  # brings news of caches that are gone
    held = [len(s.caches) for party in chain for s in party.sessions.values()]
    assert max(held) <= 1


@CUTS
@pytest.mark.parametrize("adapters", [None, Lora(r=2)], ids=["full", "LoRA"])
def test_clipped_steps_of_a_chain_equal_the_unsplit_steps_bit_for_bit(tail, adapters):
    whole = deep()
    data_party, chain = chain_of_three(whole, tail)
    for owner in (data_party, *chain):
        tune(owner, adapters=adapters)
    tune(whole, adapters=adapters, slices=data_party.slices)
    train = Train(steps=4, learning_rate=0.05, clip=0.5)
    batches = [tiny_batch(whole, labels="tokens", seed=seed) for seed in range(4)]
    tuning = FineTuning(data_party, train)
    assert [tuning.step(batch) for batch in batches] == train_unsplit(whole, batches, train)


def test_a_forward_without_gradients_leaves_nothing_at_any_party():
    data_party, chain = chain_of_three(deep(), 1)
    with torch.no_grad():
        data_party.model(**tiny_batch(data_party.model))
    assert [len(s.graphs) for party in chain for s in party.sessions.values()] == [0, 0, 0]


def test_graphs_that_are_let_go_of_are_forgotten_along_the_chain():
    data_party, chain = chain_of_three(deep(), 1)
    batch = tiny_batch(data_party.model, labels="tokens")
    for _ in range(5):
        data_party.model(**batch)
    data_party.model(**batch).loss.backward()
    data_party.model(**batch)
    data_party.model(**batch)
    held = [len(s.graphs) for party in chain for s in party.sessions.values()]
    assert max(held) <= 3


def test_what_one_model_party_tells_the_next_is_counted_and_can_be_watched():
    data_party, (first, _, _) = chain_of_three(deep(), 1)
    with first.onward.tap(Transcript()) as transcript:
        data_party.model(**tiny_batch(data_party.model, labels="tokens")).loss.backward()
    assert {(r.direction, r.role) for r in transcript.messages} >= {
        ("sent", "smashed"),
        ("received", "returned"),
        ("sent", "hidden_grad"),
        ("received", "smashed_grad"),
    }
    assert sum(t.bytes for t in first.onward.traffic.values()) > 0


def test_autograd_grad_leaves_no_gradient_anywhere_in_the_chain():
    data_party, chain = chain_of_three(deep(), 1)
    loss = data_party.model(**tiny_batch(data_party.model, labels="tokens")).loss
    table = data_party.model.get_input_embeddings().weight
    (found,) = torch.autograd.grad(loss, [table])
    assert found.abs().sum() > 0
    assert all(p.grad is None for party in chain for p in party.parameters())


@CUTS
def test_a_chain_that_was_stopped_goes_on_to_the_same_losses_and_merges(tail, tmp_path):
    whole = deep()
    train = Train(steps=4, learning_rate=0.05)
    batches = [tiny_batch(whole, labels="tokens", seed=seed) for seed in range(4)]
    expected = train_unsplit(copy.deepcopy(whole), batches, train)

    def start():
        data_party, chain = chain_of_three(whole, tail)
        for number, party in enumerate(chain):
            party.checkpoints = tmp_path / f"model party {number}"
        return FineTuning(data_party, train)

    tuning = start()
    first = [tuning.step(batch) for batch in batches[:2]]
    tuning.save(tmp_path / "data party")
    tuning.step(batches[2])  # is lost
    tuning = start()
    assert tuning.load(tmp_path / "data party") == 2
    assert first + [tuning.step(batch) for batch in batches[2:]] == expected
    tuning.save(tmp_path / "data party")
    folders = [tmp_path / f"model party {number}" for number in range(3)]
    out = merge(tmp_path / "data party", folders, tmp_path / "joined")
    trained = copy.deepcopy(whole)
    train_unsplit(trained, batches, train)
    found = type(whole).from_pretrained(out).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in trained.state_dict().items())
    with pytest.raises(CheckpointError, match=r"weights are missing"):
        merge(tmp_path / "data party", folders[:2], tmp_path / "half")


def test_two_data_parties_share_a_chain_by_the_mean_of_their_gradients():
    whole = deep()
    one, first = split(copy.deepcopy(whole), Partition(1, 1))
    two = join(copy.deepcopy(whole), first, Partition(1, 1))
    second = divide(first, 2)
    first.sharing = "mean"
    train = Train(steps=1, learning_rate=0.05, optimizer="sgd")
    tunings = [FineTuning(party, train) for party in (one, two)]
    batches = [tiny_batch(whole, labels="tokens", seed=seed) for seed in range(2)]
    tunings[0].party.model(**batches[0]).loss.backward()
    with pytest.raises(ProtocolError, match="set the same `sharing` at all model parties"):
        one.connection.commit(scale=None, rate=0.05, skip=False)
    second.sharing = "mean"
    one.connection.commit(scale=None, rate=0.05, skip=False)
    two.model(**batches[1]).loss.backward()
    two.connection.commit(scale=None, rate=0.05, skip=False)
    gradients = []
    for batch in batches:
        twin = copy.deepcopy(whole)
        twin(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters()})
    for party in (first, second):
        for name, weight in party.named_parameters():
            mean = (gradients[0][name] + gradients[1][name]) / 2
            before = whole.get_parameter(name)
            torch.testing.assert_close(weight, before - 0.05 * mean, rtol=0, atol=1e-7)


def test_if_the_next_party_refuses_a_step_none_takes_it():
    data_party, (first, second, third) = chain_of_three(deep(), 1)
    tuning = FineTuning(data_party, Train(steps=1, learning_rate=0.05))
    before = [p.clone() for party in (first, second, third) for p in party.parameters()]
    data_party.model(**tiny_batch(data_party.model, labels="tokens")).loss.backward()
    (session,) = third.sessions.values()
    session.graphs[99] = None  # a graph that still lives
    with pytest.raises(ProtocolError, match="still waits for its backward"):
        data_party.connection.commit(scale=None, rate=0.05, skip=False)
    after = [p for party in (first, second, third) for p in party.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert tuning.party.step == 0
    assert {s.step for party in (first, second) for s in party.sessions.values()} == {0}


def test_a_party_with_other_weights_cannot_be_the_next():
    data_party, first = split(deep(), Partition(1, 1))
    other_data_party, other = split(tiny_model("llama", seed=1, **DEEP), Partition(1, 1))
    stage = first.held[0].stage
    with pytest.raises(ProtocolError, match="do not hold two halves of the same model"):
        first.pass_on([stage], LocalChannel(other.handle))
    assert data_party.step == other_data_party.step == 0


@pytest.mark.parametrize(("blocks", "words"), [(0, "Possible: 1 to 3"), (4, "Possible: 1 to 3")])
def test_a_division_that_leaves_a_party_without_blocks_is_refused(blocks, words):
    _, model_party = split(deep(), Partition(1, 1))
    with pytest.raises(PartitionError, match=words):
        divide(model_party, blocks)


def test_a_party_that_trains_or_passes_on_already_is_not_divided():
    data_party, model_party = split(deep(), Partition(1, 1))
    FineTuning(data_party, Train(steps=1))
    with pytest.raises(ProtocolError, match="trains already"):
        divide(model_party, 1)
    _, model_party = split(deep(), Partition(1, 1))
    divide(model_party, 2)
    with pytest.raises(PartitionError, match="divide the last one"):
        divide(model_party, 1)


def test_blocks_that_share_weights_cannot_be_divided():
    _, model_party = split(tiny_model("albert", "classification", **DEEP), Partition(1, 1))
    with pytest.raises(PartitionError, match="no weight has two owners"):
        divide(model_party, 1)


@pytest.mark.parametrize("tail", [1, 0], ids=["HBT", "HT"])
def test_each_party_of_a_chain_loads_its_own_share_of_a_checkpoint(tail, tmp_path):
    whole = deep("gpt2")  # its output layer is tied to the embeddings
    whole.save_pretrained(tmp_path)
    partition, middle = Partition(1, tail), 5 - tail
    second = load_model_party(tmp_path, partition, share=(2, None))
    first = load_model_party(tmp_path, partition, share=(0, 2), onward=second.handle)
    data_party = load_data_party(tmp_path, partition, channel=first.handle)
    batch = tiny_batch(whole, labels="tokens")
    assert torch.equal(data_party.model(**batch).loss, whole(**batch).loss)
    blocks = [
        {name.split(".")[2] for name in weights([p]) if ".h." in name} for p in (first, second)
    ]
    assert blocks == [{"1", "2"}, {str(n) for n in range(3, 1 + middle)}]
    assert ("lm_head.weight" in weights([second])) == (tail == 0)
    assert not any("wte" in name for name in weights([first, second]))


@pytest.mark.parametrize("share", [(0, 9), (4, None), (-1, 2), (2, 2)])
def test_a_share_that_is_none_is_refused(share, tmp_path):
    deep().save_pretrained(tmp_path)
    onward = None if share[1] is None else LocalChannel(lambda message: message)
    if share == (0, 9):
        onward = None  # the last must take all that follows
    with pytest.raises(PartitionError, match=r"is no share of 4 blocks.*share=\(0, 2\)"):
        load_model_party(tmp_path, Partition(1, 1), share=share, onward=onward)


def block(name, hidden, **more):
    return ("module", name, (), (("hidden_states", hidden), *more.items()))


def test_a_program_is_divided_before_the_first_module_that_is_not_held():
    mask = ("leaf", 1)
    program = Program(
        (
            block("a", ("leaf", 0), attention_mask=mask),
            ("op", "getitem", (("out", 0), ("value", 0)), ()),
            block("b", ("out", 1), attention_mask=mask, states=("dict", ("x", ("leaf", 2)))),
            block("c", ("out", 2), first=("out", 0, 1)),
        ),
        (("hidden_states", "float32", 3), ("attention_mask", "bool", 4), ("x", "float32", 2)),
    )
    here, rest = divide_program(program, "a".__eq__)
    assert here.steps == program.steps[:2]
    assert rest.sources == (("out", 1), mask, ("leaf", 2), ("out", 0, 1))
    assert rest.steps == (
        block("b", ("leaf", 0), attention_mask=("leaf", 1), states=("dict", ("x", ("leaf", 2)))),
        block("c", ("out", 0), first=("leaf", 3)),
    )
    assert divide_program(program, {"a", "b", "c"}.__contains__) == (program, None)
    assert divide_program(program, "z".__eq__)[0] is None


def test_states_that_blocks_share_cannot_lie_with_two_model_parties():
    program = Program(
        (block("a", ("leaf", 0), states=("shared",)), block("b", ("out", 0), states=("shared",))),
        (("hidden_states", "float32", 3),),
    )
    with pytest.raises(ProtocolError, match="cannot be in two places"):
        divide_program(program, "a".__eq__)


def test_a_damaged_part_of_one_party_takes_none_of_a_chain_back(tmp_path):
    whole = deep()
    data_party, chain = chain_of_three(whole, 1)
    for number, party in enumerate(chain):
        party.checkpoints = tmp_path / f"model party {number}"
    tuning = FineTuning(data_party, Train(steps=4, learning_rate=0.05))
    batch = tiny_batch(whole, labels="tokens")
    tuning.step(batch)
    tuning.save(tmp_path / "data party")
    tuning.step(batch)
    (part,) = (tmp_path / "model party 0").rglob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    before = [[weight.clone() for weight in party.parameters()] for party in chain]
    with pytest.raises(CheckpointError):
        tuning.load(tmp_path / "data party")
    for party, weights in zip(chain, before, strict=True):
        assert all(map(torch.equal, party.parameters(), weights))
    tuning.step(batch)
