"""What an attack is granted of rows that cross, without an experiment around it.

model = tiny_model("llama")
batch = tiny_batch(model)
knowledge = crossed(model, Partition(1, 1), list(batch["input_ids"]), knowledge="K4")
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import attrs
import torch
import transformers
from torch import Tensor

from vflair_core.tasks.kinds import KINDS as TASK_KINDS
from vflair_core.testing.models import (
    FIRST_WORD,
    numbers_as_texts,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.attacks.evidence import Evidence
    from vflair_core.communication.transcript import Record
    from vflair_core.defenses.defense import Defense
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty
    from vflair_core.partition.partition import Partition


def crossed(
    model: PreTrainedModel,
    partition: Partition,
    rows: Sequence[Tensor],
    *,
    labels: Sequence[Tensor] | None = None,
    defenses: Sequence[Defense] = (),
    knowledge: str | Iterable[str] = (),
    current: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    public_texts: Sequence[str] | None = None,
    known: int = 1,
    adversary_state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Send each row across alone, and return by name what an attack is granted of it.

    Without `knowledge`: observables, `head` and `tail` of the undefended model, `body`, `partition`, and a `generator`.
    With it everything of the vocabulary that it grants, made as the process of an attack makes it: defenses are built
    again from their class, which must be importable, and their fields. `launch(attack, knowledge)` takes either as it is.

    Args:
        model: Stays as it is; a copy is cut. Its weights are the published ones.
        partition: The cut.
        rows: Token ids (T,) of each example.
        labels: Of each example, shaped as the model takes them for a batch of one; with them every crossing is a
            training round without dropout, so that there are gradients, and `updates`.
        defenses: Of the data party, with a seed of their own. Where one changes texts or tokens, the texts of `rows` go
            through it, and what is learnt is the text.
        knowledge: A preset K0 … K4, a name of the vocabulary, or a list of them.
        current: The model as it is when the messages cross, after private training; left out, as published.
        tokenizer: Left out, `tiny_tokenizer`.
        public_texts: For `public_texts` and `queries`, and for defenses to prepare on; left out, random ones. Random ones
            are `in_domain`, too, `few_labelled`, and the half of the `candidates` who are no victims.
        known: First victims whose classes are told as `known_labels`.
        adversary_state: What an active adversary of the attack's own would have kept.

    Raises:
        AttackError: A name is not in the vocabulary, or a defense cannot be told.
    """
    if knowledge:
        from vflair_core.attacks.grants import knowledge_of

        evidence = evidence_of(
            model, partition, rows, labels=labels, defenses=defenses, current=current, tokenizer=tokenizer,
            public_texts=public_texts, known=known, adversary_state=adversary_state,
        )  # fmt: skip
        return knowledge_of(evidence, knowledge)
    from vflair_core.attacks.halves import halves
    from vflair_core.attacks.observables import Observables

    party, model_party = _parties(current or model, partition, defenses, tokenizer)
    seen, _ = _sent(party, rows, labels)
    head, tail = halves(model, partition)
    told: dict[str, Any] = {
        **Observables(seen, is_ht=partition.kind == "HT", victims=len(rows)),
        "partition": partition,
        "body": model_party.model,
        "head": head,
        "generator": torch.Generator().manual_seed(0),
    }
    return told if tail is None else {**told, "tail": tail}


def everything(
    model: PreTrainedModel | None = None,
    partition: Partition | None = None,
    rows: Sequence[Tensor] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Every name of the vocabulary, as an attack would be granted it of rows that cross in training, and the ``"rows"``.

    Args:
        model: Left out, a llama of four blocks and 64 words.
        partition: Left out, one block in front and one behind.
        rows: Left out, three rows of seven words.
        options: Of `crossed`; without `adversary_state` there is none, and `knowledge` grants less.
    """
    from vflair_core.attacks.knowledge import VOCABULARY

    model, partition, rows, labels = of_training(model, partition, rows)
    options = {"labels": labels, **options}
    names = set(VOCABULARY) - (set() if options.get("adversary_state") else {"adversary_state"})
    return {**crossed(model, partition, rows, **{"knowledge": names, **options}), "rows": rows}


def of_training(
    model: PreTrainedModel | None = None,
    partition: Partition | None = None,
    rows: Sequence[Tensor] | None = None,
) -> tuple[PreTrainedModel, Partition, list[Tensor], list[Tensor]]:
    """A model, a cut, rows and their labels; small ones for what is left out."""
    from vflair_core.partition.partition import Partition as Cut

    model = model if model is not None else tiny_model("llama")
    if model.config.is_encoder_decoder or kind_of(model) not in (
        "causal-lm",
        "classification",
        "regression",
    ):
        raise ValueError(
            f"Rows of tokens cross models of one stack that write or classify, not {type(model).__name__}."
        )
    classes = kind_of(model) == "classification"
    batch = tiny_batch(model, labels="classes" if classes else "tokens")
    each = list(rows) if rows is not None else list(batch["input_ids"])
    if rows is None or classes:
        labels = [batch["labels"][n % len(batch["labels"])] for n in range(len(each))]
    else:
        labels = [row.clone() for row in each]
    return model, partition or Cut(1, 1), each, labels


def evidence_of(
    model: PreTrainedModel,
    partition: Partition,
    rows: Sequence[Tensor],
    *,
    labels: Sequence[Tensor] | None = None,
    defenses: Sequence[Defense] = (),
    current: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    public_texts: Sequence[str] | None = None,
    known: int = 1,
    adversary_state: Mapping[str, Tensor] | None = None,
) -> Evidence:
    """All that an attacker could hold of rows that cross; arguments as `crossed` takes them."""
    from vflair_core.attacks.evidence import Evidence
    from vflair_core.attacks.observables import Capture
    from vflair_core.communication.transcript import Transcript

    tokenizer = tokenizer or tiny_tokenizer(model.config.get_text_config().vocab_size)
    party, model_party = _parties(current or model, partition, defenses, tokenizer)
    texts = [_decoded(tokenizer, row) for row in rows]
    others = numbers_as_texts(_words(model, 2 * len(rows) + 16, max(map(len, rows))))
    public = list(public_texts) if public_texts is not None else others[-16:]
    party.prepare(public)
    auxiliary = _auxiliary(party.model, texts, others[:-16], public, labels, known)
    with party.public_text():
        queried, _ = _sent(party, _encoded(tokenizer, public), None)
    seen, updates = _sent(party, rows, labels)
    return Evidence(
        party=party,
        model_party=model_party,
        pretrained={name: value.clone() for name, value in model.state_dict().items()},
        main=Capture(Transcript(seen), [], [], updates),
        bypassed=None,
        releases=1,
        victims={"main": len(rows)},
        task_kind=kind_of(model),
        auxiliary=auxiliary,
        queries={"main": Capture(Transcript(queried), [], [])},
        adversary=adversary_state,
    )


def _parties(
    model: PreTrainedModel,
    partition: Partition,
    defenses: Sequence[Defense],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[DataParty, ModelParty]:
    from vflair_core.parties.split import split

    if tokenizer is None and defenses:
        tokenizer = tiny_tokenizer(model.config.get_text_config().vocab_size)
    party, model_party = split(
        copy.deepcopy(model), partition, defenses=defenses, seed=0, tokenizer=tokenizer
    )
    party.model.eval()
    return party, model_party


def _sent(
    party: DataParty, rows: Sequence[Tensor], labels: Sequence[Tensor] | None
) -> tuple[list[Record], list[dict[str, Tensor]]]:
    """Send each row alone; return the messages, and the gradients of the data party's weights for each."""
    from vflair_core.communication.transcript import Transcript
    from vflair_core.defenses.defense import Defense
    from vflair_core.tasks.task import Example

    places = ("on_text", "on_tokens")
    reads = any(
        getattr(type(d), p) is not getattr(Defense, p) for d in party.defenses.each for p in places
    )
    updates: list[dict[str, Tensor]] = []
    with party.channel.tap(Transcript()) as transcript, torch.set_grad_enabled(labels is not None):
        for number, row in enumerate(rows):
            party.model.zero_grad(set_to_none=True)
            inputs: dict[str, Any] = {"input_ids": row[None]}
            if reads:  # a batch that went round them is refused
                inputs = party.encode(
                    [Example(_decoded(party.tokenizer, row))], max_length=len(row)
                )
            elif labels is not None:
                inputs["labels"] = labels[number][None]
            outputs = party.model(**inputs, use_cache=False)
            if labels is not None:
                outputs.loss.backward()
                weights = party.model.named_parameters()
                updates.append({n: w.grad.clone() for n, w in weights if w.grad is not None})
    return transcript.messages, updates


def _auxiliary(
    model: Any,
    texts: Sequence[str],
    others: Sequence[str],
    public: Sequence[str],
    labels: Sequence[Tensor] | None,
    known: int,
) -> dict[str, Any]:
    """What an attacker has beside messages and weights, as plain values."""
    from vflair_core.tasks.task import Example

    half = len(texts)
    classes = labels is not None and all(label.numel() == 1 for label in labels)
    count = int(model.config.num_labels or 1) if classes else 0
    few = [
        Example(text, label=n % count if count else None) for n, text in enumerate(others[half:])
    ]
    mixed = [text for pair in zip(texts, others[:half], strict=True) for text in pair]
    auxiliary = {
        "public_texts": list(public),
        "in_domain": list(others[half:]),
        "few_labelled": [attrs.asdict(example) for example in few],
        "queries": list(public),
        "candidates": mixed,
    }
    if labels is not None and classes:
        auxiliary["known_labels"] = [[n, int(label)] for n, label in enumerate(labels[:known])]
    return auxiliary


def kind_of(model: Any) -> str:
    """The kind of task that a model is for."""
    for kind, facts in TASK_KINDS.items():
        if type(model) in getattr(transformers, facts.auto)._model_mapping.values():  # noqa: SLF001 - no public way
            return kind
    return "causal-lm"


def _words(model: Any, count: int, length: int) -> Tensor:
    """Rows of random words (count, length)."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_WORD, vocabulary, (count, length), generator=generator)


def _decoded(tokenizer: Any, row: Tensor) -> str:
    return str(tokenizer.decode(row))


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
