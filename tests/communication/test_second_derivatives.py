"""The model party's layers have their first derivative here: a second one is refused wherever it starts."""

from __future__ import annotations

import pytest
import torch

from vflair_core.errors import SecondDerivativeError
from vflair_core.testing import tiny_batch, tiny_model


def first_weight(model):
    return next(weight for name, weight in model.named_parameters() if "layers.0.mlp" in name)


def by_grad(model, loss):
    (slope,) = torch.autograd.grad(loss, [first_weight(model)], create_graph=True)
    torch.autograd.grad(slope.square().sum(), [first_weight(model)])


def by_another_weight(model, loss):
    (slope,) = torch.autograd.grad(loss, [first_weight(model)], create_graph=True)
    torch.autograd.grad(slope.square().sum(), [model.get_input_embeddings().weight])


def by_the_tail(model, loss):
    """The slope of the head depends on the weights of the tail, too."""
    (slope,) = torch.autograd.grad(loss, [first_weight(model)], create_graph=True)
    weights = [w for name, w in model.named_parameters() if "layers.3" in name or "lm_head" in name]
    torch.autograd.grad(slope.square().sum(), weights)


def by_backward(model, loss):
    loss.backward(create_graph=True)
    first_weight(model).grad.square().sum().backward()


def by_backward_into_one(model, loss):
    loss.backward(inputs=[first_weight(model)], create_graph=True)
    first_weight(model).grad.square().sum().backward(inputs=[first_weight(model)])


def by_hessian_vector_product(model, _loss):
    batch = tiny_batch(model, labels="tokens")
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()

    def of(given):
        return model(inputs_embeds=given, labels=batch["labels"]).loss

    torch.autograd.functional.hvp(of, embeddings, torch.ones_like(embeddings))


WAYS = [
    by_grad,
    by_another_weight,
    by_the_tail,
    by_backward,
    by_backward_into_one,
    by_hessian_vector_product,
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 0)], ids=["HBT", "HT"])
def test_a_second_derivative_through_the_cut_is_refused_wherever_it_starts(cut, head, tail, way):
    # Only eager attention can be differentiated twice at all.
    parties = cut(model=tiny_model("llama", attn_implementation="eager"), head=head, tail=tail)
    model = parties.data_party.model
    if way is by_the_tail and not tail:
        return  # the data party holds no weights behind the cut
    loss = model(**tiny_batch(model, labels="tokens")).loss
    with pytest.raises(SecondDerivativeError, match="second derivative through the cut"):
        way(model, loss)


def test_a_first_derivative_that_could_be_differentiated_is_exact(cut):
    parties = cut(model=tiny_model("llama", attn_implementation="eager"))
    batch = tiny_batch(parties.whole, labels="tokens")
    found = []
    for model in (parties.whole, parties.data_party.model):
        loss = model(**batch).loss
        (slope,) = torch.autograd.grad(loss, [first_weight(model)], create_graph=True)
        found.append(slope.detach())
    assert torch.allclose(*found, atol=1e-7)


def test_a_second_derivative_on_this_side_of_the_cut_is_exact(cut):
    """Of the tail alone; its first derivative lies before the cut, and goes back through it once."""
    parties = cut(model=tiny_model("llama", attn_implementation="eager"))
    batch = tiny_batch(parties.whole, labels="tokens")
    found = []
    for model in (parties.whole, parties.data_party.model):
        last = next(w for name, w in model.named_parameters() if "layers.3.mlp" in name)
        (slope,) = torch.autograd.grad(model(**batch).loss, [last], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [first_weight(model)])[0])
    ours, expected = found[1], found[0]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
