"""Small random models and batches for tests, ours and those of plugin authors: no download, no file.

model = tiny_model("llama")
batch = tiny_batch(model, padding="left", labels="tokens")
knowledge = crossed(model, Partition(1, 1), list(batch["input_ids"]), knowledge="K4")
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from vflair_core.errors import alternatives
from vflair_core.parties.config_fields import check_class, check_model_type
from vflair_core.tasks.kinds import KINDS as TASK_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.communication.transcript import Record
    from vflair_core.defenses.defense import Defense
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.partition.partition import Partition

AUTOS: dict[str, str] = {kind: facts.auto for kind, facts in TASK_KINDS.items()}
AUTOS["masked-lm"] = "AutoModelForMaskedLM"  # no task of vflair, and a common form of encoders
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 3
# The wide initialisation makes logits differ enough for greedy and beam search to have clear winners.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 32, "num_key_value_heads": 1},
    "bert": {"intermediate_size": 32},
    "roberta": {"intermediate_size": 32},
}


def tiny_model(
    kind: str, task: str = "causal-lm", *, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a random model of four blocks of width 16, in evaluation mode as `from_pretrained` returns it.

    Args:
        kind: gpt2, llama, qwen2, bert or roberta; any other model type of transformers may work too.
        task: A kind of task, or ``masked-lm``.
        seed: Seed of the weights; the global random state stays as it was.
        overrides: Options of the config, e.g. ``num_hidden_layers=2`` or ``num_labels=3``.
    """
    if task not in AUTOS:
        raise ValueError(f"There is no task {task!r}.{alternatives(task, AUTOS)}")
    if wrong := check_model_type(kind) or check_class(transformers.CONFIG_MAPPING[kind], overrides):
        raise ValueError(wrong)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **overrides})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, AUTOS[task]).from_config(config)
    return model.eval()


def tiny_batch(
    model: PreTrainedModel,
    *,
    rows: int = 3,
    length: int = 7,
    padding: Literal["left", "right"] | None = None,
    labels: Literal["tokens", "classes"] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Build a batch of random words, without special tokens, that fits `model`.

    Args:
        model: Gives the size of the vocabulary and the number of classes.
        rows: Number of examples.
        length: Number of positions.
        padding: Shorten the n-th row by n positions on this side, and say so in `attention_mask`.
        labels: The tokens themselves (-100 on padding), one class for each row, or none.
        seed: Seed of the words and classes; the global random state stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_WORD, vocabulary, (rows, length), generator=generator)  # (B, T)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(1, rows):
            gap = min(row, length - 1)
            mask[row, slice(gap) if padding == "left" else slice(-gap, None)] = 0
    batch = {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}
    if labels == "tokens":
        batch["labels"] = torch.where(mask == 1, ids, -100)
    elif labels == "classes":
        batch["labels"] = torch.randint(
            int(model.config.num_labels or 2), (rows,), generator=generator
        )
    return batch


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Build a tokenizer whose words are the numbers of its tokens, for texts as `numbers_as_texts` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD} | {str(number): number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # noqa: S106 - a word, not a password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")  # noqa: S106


def numbers_as_texts(rows: Sequence[Tensor] | Tensor) -> list[str]:
    """Write each row of token ids as a text that `tiny_tokenizer` reads back."""
    return [" ".join(map(str, row.tolist())) for row in rows]


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
    from vflair_core.attacks.evidence import Evidence
    from vflair_core.attacks.grants import knowledge_of
    from vflair_core.attacks.observables import Capture, Observables
    from vflair_core.communication.transcript import Transcript
    from vflair_core.parties.split import split

    if tokenizer is None and (knowledge or defenses):
        tokenizer = tiny_tokenizer(model.config.get_text_config().vocab_size)
    party, model_party = split(
        copy.deepcopy(current or model), partition, defenses=defenses, seed=0, tokenizer=tokenizer
    )
    party.model.eval()
    if not knowledge:
        from vflair_core.attacks.halves import halves

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

    texts = [_decoded(tokenizer, row) for row in rows]
    others = numbers_as_texts(_words(model, 2 * len(rows) + 16, max(map(len, rows))))
    public = list(public_texts) if public_texts is not None else others[-16:]
    party.prepare(public)
    auxiliary = _auxiliary(party.model, texts, others[:-16], public, labels, known)
    with party.public_text():
        queried, _ = _sent(party, _encoded(tokenizer, public), None)
    seen, updates = _sent(party, rows, labels)
    queries = {"main": Capture(Transcript(queried), [], [])}
    main = Capture(Transcript(seen), [], [], updates)
    evidence = Evidence(
        party=party,
        model_party=model_party,
        pretrained={name: value.clone() for name, value in model.state_dict().items()},
        main=main,
        bypassed=None,
        releases=1,
        victims={"main": len(rows)},
        task_kind=_kind_of(model),
        auxiliary=auxiliary,
        queries=queries,
        adversary=adversary_state,
    )
    return knowledge_of(evidence, knowledge)


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


def _kind_of(model: Any) -> str:
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
