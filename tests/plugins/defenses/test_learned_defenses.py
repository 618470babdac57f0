"""Bottleneck, adversary and distance correlation: formulas by other means, and gradients that arrive."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vflair_core import DefenseError, Partition, Transcript, split, train_tokenizer
from vflair_core.testing import tiny_batch, tiny_model
from vflair_core.training.fine_tuning import FineTuning, Train
from vflair_defenses.adversarial_training import AdversarialTraining
from vflair_defenses.mid import (
    Bottleneck,
    Mid,
    MidMechanism,
    divergence,
    measured_divergence,
    token_error_bound,
)
from vflair_defenses.nopeek import NoPeek, distance_correlation
from vflair_defenses.text_obfuscator import TextObfuscator, k_means


def test_the_divergence_equals_torchs_summed_over_the_code():
    mean, sigma = torch.randn(3, 5), torch.rand(3, 5) + 0.1
    expected = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(divergence(mean, sigma), expected, atol=1e-5)


@pytest.mark.parametrize(("decoder", "code"), [("residual", 6), ("linear", 3)])
def test_an_attacker_undoes_the_decoder_and_scores_by_the_gaussian(decoder, code):
    part = Bottleneck(6, code, decoder, 0.2)
    for weight in part.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    hidden, z = torch.randn(4, 6), torch.randn(4, code)
    sent = part.decoded(z).detach()
    assert torch.allclose(part.encoded(sent), z, atol=1e-3)
    mean, sigma = part.code(hidden)
    expected = Normal(mean, 0.5 * sigma).log_prob(z).sum(-1)
    gap = MidMechanism(part, 0.5).log_likelihood(sent, hidden) - expected
    assert torch.allclose(gap, gap[:1].expand(4), atol=1e-2)  # up to a constant


def test_the_noise_of_a_bottleneck_is_fresh_in_every_message_of_evaluation_too(defended, exchange):
    """Standard deviation of 40,000 draws within 2 % (6 standard errors)."""
    defense = Mid(start=0.3)
    defended([defense])
    hidden, there = torch.zeros(1, 2500, 16), exchange(phase="decode")
    first, second = (defense.on_smashed(hidden, there) for _ in range(2))
    assert not torch.equal(first, second)
    assert float((first - second).detach().std()) == pytest.approx(0.3 * math.sqrt(2), rel=0.02)


def test_the_loss_pays_lambda_times_nats_per_real_token(defended):
    weight = 0.25
    parties = defended([Mid(weight, start=0.5)])
    batch = tiny_batch(parties.whole, padding="right", labels="tokens")
    party = parties.data_party
    rows = party.smashed(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False)
    nats = (
        kl_divergence(Normal(rows, 0.5), Normal(0.0, 1.0))
        .sum(-1)[batch["attention_mask"] == 1]
        .mean()
    )
    party.model.train()
    for module in party.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parts = []
    penalty = Mid.penalty

    def spy(defense, exchange):
        parts.append(penalty(defense, exchange))
        return parts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mid, "penalty", spy)
        party.model(**batch, use_cache=False).loss.backward()
    assert float(parts[0].detach()) == pytest.approx(weight * float(nats.detach()), rel=1e-4)
    assert all(p.grad is not None for p in party.defenses.each[0].parameters())


def test_paying_for_nats_buys_fewer_of_them(defended, public):
    def nats(weight):
        defense = Mid(weight, start=0.5)
        parties = defended([defense])
        rounds = FineTuning(parties.data_party, Train(steps=30, learning_rate=0.05))
        batch = tiny_batch(parties.whole, labels="tokens")
        for _ in range(30):
            rounds.step(batch)
        return measured_divergence(defense, parties.data_party, public)

    (dear, width), (free, _) = nats(0.1), nats(0.0)
    assert dear < 0.5 * free
    assert 0 < width < math.inf


def test_the_error_bound_equals_fano_by_hand():
    assert token_error_bound(5.0, 1.0, 1001) == pytest.approx(
        (5 - 1 - math.log(2)) / math.log(1000)
    )
    assert token_error_bound(5.0, 5.0, 1001) == 0.0


@pytest.mark.parametrize("error", [0.0, 0.1, 0.3, 0.5])
def test_the_error_bound_of_two_tokens_is_the_error_of_that_entropy(error):
    entropy = 0.0 if not error else -error * math.log(error) - (1 - error) * math.log(1 - error)
    assert token_error_bound(entropy + 0.2, 0.2, 2) == pytest.approx(error, abs=1e-6)
    with pytest.raises(ValueError, match="two tokens or more"):
        token_error_bound(1.0, 0.0, 1)


@pytest.mark.parametrize("place", ["head", "tail"])
def test_what_a_defense_measures_of_itself_is_measured_without_dropout(public, place):
    model = tiny_model("gpt2", vocab_size=300, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    defense = Mid(place=place, start=0.5)
    party, _ = split(
        model, Partition(1, 1), defenses=[defense], tokenizer=train_tokenizer(public, 300), seed=0
    )
    party.prepare(public)
    found = []
    for training in (True, False, True):
        party.model.train(training)
        found.append(dict(defense.findings(public, party)))
        assert party.model.training == training
    assert found[0] == found[1] == found[2]


def test_a_residual_code_of_another_width_is_refused():
    with pytest.raises(DefenseError, match="set code = 0"):
        Mid(code=8)


def test_the_tail_of_ht_holds_no_bottleneck(defended):
    parties = defended([Mid(place="tail")], tail=0)
    with pytest.raises(DefenseError, match="Mid does not support HT"):
        parties.data_party.model(**tiny_batch(parties.whole), use_cache=False)


def test_the_adversary_learns_by_turns_and_is_in_no_other_optimizer(defended):
    defense = AdversarialTraining(rate=0.05, turns=5)
    parties = defended([defense])
    adversary = defense._parts["adversary"]
    assert not {id(p) for p in adversary.parameters()} & {id(p) for p in defense.parameters()}
    before = [p.detach().clone() for p in adversary.parameters()]
    rounds = FineTuning(parties.data_party, Train(steps=1, learning_rate=1e-3))
    rounds.step(tiny_batch(parties.whole, labels="tokens"))
    assert not any(torch.equal(a, b) for a, b in zip(before, adversary.parameters(), strict=True))
    assert all(p.grad is None or not p.grad.any() for p in defense.parameters())


def test_a_trained_mapping_holds_the_adversary_nearer_to_chance(defended):
    """The adversary's own cross-entropy, in nats, after equal training of it."""

    def adversary_loss(weight):
        defense = AdversarialTraining(weight, distortion=1e-3, rate=0.02, turns=3, hidden=32)
        parties = defended([defense])
        party = parties.data_party
        batch = tiny_batch(parties.whole, rows=4, labels="tokens")
        rounds = FineTuning(party, Train(learning_rate=0.02))
        for _ in range(60):
            rounds.step(batch)
        with torch.no_grad():
            rows = party.smashed(input_ids=batch["input_ids"], use_cache=False)
            sent = rows + defense._parts["mapping"](rows)
            scores = defense._parts["adversary"](sent).flatten(0, 1)
            return float(torch.nn.functional.cross_entropy(scores, batch["input_ids"].flatten()))

    assert adversary_loss(2.0) > adversary_loss(0.0) + 0.5


def test_the_tail_is_trained_through_the_gradient_that_it_sends(defended):
    """With eager attention the mapping gets a gradient of the gradient; its last layer starts at zero."""
    sizes = {"num_labels": 2, "vocab_size": 300, "attn_implementation": "eager"}
    model = tiny_model("bert", "classification", **sizes)
    defense = AdversarialTraining(place="tail", distortion=0.0)
    party, _ = split(model, Partition(1, 1), defenses=[defense], seed=0)
    defense.prepare([], party)
    party.defenses.task_kind = "classification"
    batch = tiny_batch(party.model, labels="classes")
    party.model.train()
    torch.manual_seed(0)
    loss = party.model(**batch).loss
    loss.backward()
    with_adversary = defense.parameters()[-1].grad.clone()
    defense.weight, defense.distortion = 0.0, 1e-30
    party.model.zero_grad()
    defense.parameters()[-1].grad = None
    torch.manual_seed(0)
    party.model(**batch).loss.backward()
    assert not torch.allclose(with_adversary, defense.parameters()[-1].grad, rtol=1e-2)


def test_attention_that_may_not_be_differentiated_twice_is_refused(defended):
    with pytest.raises(DefenseError, match='attn_implementation="eager"'):
        defended([AdversarialTraining(place="tail")], "bert")


def test_distance_correlation_equals_the_definition_and_its_laws():
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()

    def centred(rows):
        n = len(rows)
        d = [[math.dist(rows[i].tolist(), rows[j].tolist()) for j in range(n)] for i in range(n)]
        d = torch.tensor(d, dtype=torch.float64)
        return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()

    a, b = centred(x), centred(y)
    expected = ((a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()).sqrt()
    assert float(distance_correlation(x, y)) == pytest.approx(float(expected))
    assert float(distance_correlation(x, 3 * x - 1)) == pytest.approx(
        1.0
    )  # Székely et al., Theorem 3
    many = torch.randn(400, 1), torch.randn(400, 1)
    assert float(distance_correlation(*many)) < 0.2


def test_nopeek_lowers_the_distance_correlation_it_charges_for(defended):
    def correlation(weight):
        parties = defended([NoPeek(weight)])
        party = parties.data_party
        rounds = FineTuning(party, Train(learning_rate=0.02))
        batch = tiny_batch(parties.whole, rows=4, labels="tokens")
        for _ in range(40):
            rounds.step(batch)
        rows = party.smashed(input_ids=batch["input_ids"], use_cache=False).flatten(0, 1)
        embedded = party.model.get_input_embeddings()(batch["input_ids"]).detach().flatten(0, 1)
        return float(distance_correlation(embedded, rows.detach()))

    assert correlation(20.0) < correlation(0.0) - 0.1


def test_k_means_finds_clusters_that_are_there_and_no_step_would_improve():
    rows = torch.cat([torch.randn(30, 3) * 0.1 + centre for centre in (0.0, 5.0, 10.0)])
    centres, own = k_means(rows, 3, seed=2)
    for cluster in range(3):
        assert torch.allclose(centres[cluster], rows[own == cluster].mean(0), atol=1e-5)
    assert torch.equal(own, torch.cdist(rows, centres).argmin(1))
    assert [len(own[n * 30 : n * 30 + 30].unique()) for n in range(3)] == [1, 1, 1]


def test_rows_move_to_their_clusters_and_a_frozen_head_is_refused(defended):
    def distance(close):
        defense = TextObfuscator(close=close, away=0.0, clusters=4, epsilon=1e3)
        parties = defended([defense])
        party = parties.data_party
        batch = tiny_batch(parties.whole, rows=4, labels="tokens")
        rounds = FineTuning(party, Train(learning_rate=0.02))
        for _ in range(30):
            rounds.step(batch)
        with torch.no_grad():
            rows = party.smashed(input_ids=batch["input_ids"], use_cache=False)
        own = defense._centres[defense._cluster_of[batch["input_ids"]]]
        return float((rows - own).square().sum(-1).mean())

    assert distance(1.0) < 0.5 * distance(1e-9)
    parties = defended([TextObfuscator(clusters=4)])
    for weight in parties.data_party.parameters():
        weight.requires_grad_(False)
    parties.data_party.model.train()
    with pytest.raises(DefenseError, match="nothing in it is trainable"):
        parties.data_party.model(**tiny_batch(parties.whole, labels="tokens"), use_cache=False)


def test_a_fresh_adversary_reads_what_the_old_one_does_not(defended, public):
    """The mapping is the identity and token embeddings cross, so every token that both halves share can be read."""
    defense = AdversarialTraining()
    parties = defended([defense], kind="llama", head=0)
    texts = public * 2  # equal halves: even and odd ones hold the same four texts twice over
    found = defense.findings([t for text in texts for t in (text, text)], parties.data_party)
    assert found["fresh adversary"] > 0.99
    assert found["adversary"] < 0.1  # its first weights, never trained
    ids = [parties.data_party.tokenizer(text)["input_ids"] for text in public]
    counts = torch.cat([torch.tensor(row) for row in ids]).bincount()
    assert found["most frequent token"] == pytest.approx(float(counts.max() / counts.sum()))


def test_findings_need_public_text_and_a_head(defended, public):
    for defense in (AdversarialTraining(place="head"), Mid(), Mid(noise=0.0)):
        parties = defended([defense])
        assert defense.findings([], parties.data_party) == {}
    assert Mid(noise=0.0).findings(public, parties.data_party) == {}
    told = Mid(start=0.5)
    parties = defended([told])
    nats, half_width = measured_divergence(told, parties.data_party, public)
    assert told.findings(public, parties.data_party) == {
        "nats per token": nats,
        "half-width": half_width,
    }


def with_eager_tail(defense, defended, public):
    party = defended([defense], "bert", prepare=False).data_party
    party.model.set_attn_implementation("eager")
    party.model.eval()
    defense.prepare(public, party)
    return party


def test_at_the_tail_a_fresh_adversary_reads_the_label_of_a_gradient_that_nothing_hides(
    defended, public
):
    """One head without a hidden layer: the gradient of one label is minus that of the other, up to a positive factor."""
    defense = AdversarialTraining(place="tail")
    party = with_eager_tail(defense, defended, public)
    with party.channel.tap(Transcript()) as transcript:
        found = defense.findings(public * 4, party)
    assert found["fresh adversary"] > 0.9
    assert found["chance"] == 0.5
    assert set(found) == {"adversary", "fresh adversary", "chance"}
    assert not {r.role for r in transcript.messages} & {"hidden_grad", "smashed_grad"}


def test_at_the_tail_a_mapping_that_lets_nothing_through_leaves_chance(defended, public):
    class Undo(torch.nn.Module):
        def forward(self, hidden):
            return -hidden

    defense = AdversarialTraining(place="tail")
    party = with_eager_tail(defense, defended, public)
    defense._parts["mapping"] = Undo()
    found = defense.findings(public, party)
    assert found["fresh adversary"] == found["chance"] == 0.5


def test_the_gradients_that_findings_look_at_are_those_that_would_be_sent(defended, public):
    defense = AdversarialTraining(place="tail")
    party = with_eager_tail(defense, defended, public)
    with torch.no_grad():
        defense.parameters()[-1].fill_(0.1)
    (views, labels), *_ = defense._labels_seen(public, party)
    ids = party.tokenizer(public[0], return_tensors="pt")["input_ids"]
    sent = []
    for label in labels:
        with party.channel.tap(Transcript()) as transcript:
            party.model(input_ids=ids, labels=label[None]).loss.backward()
        (gradient,) = [r.tensor for r in transcript.messages if r.role == "hidden_grad"]
        sent.append(gradient[0].sum(0))
    ratio = torch.stack(sent).norm() / views.norm()
    assert torch.allclose(torch.stack(sent), views * ratio, atol=1e-4 * float(ratio))


def test_findings_of_a_bottleneck_at_the_tail_are_of_what_was_returned(defended, public):
    """The expected divergence is torch's, on the rows that an unsplit body gives."""
    defense = Mid(place="both", start=0.5)
    parties = defended([defense], "llama")
    party = parties.data_party
    with torch.no_grad():  # no noise at the head, so that what is returned is known
        defense.part("head").spread.bias.fill_(-60.0)
    found = defense.findings(public, party)
    last, nats = [], []
    parties.whole.model.layers[-1].register_forward_pre_hook(lambda _, args: last.append(args[0]))
    for text in public:
        ids = party.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            parties.whole(ids)
        nats.append(kl_divergence(Normal(last[-1], 0.5), Normal(0.0, 1.0)).sum(-1).mean())
    assert found["nats per token at the tail"] == pytest.approx(float(sum(nats)) / 4, rel=1e-4)
    spread = float(torch.stack(nats).std()) * 1.96 / 2
    assert found["half-width at the tail"] == pytest.approx(spread, rel=1e-3)
    assert {"nats per token", "half-width"} < found.keys()
