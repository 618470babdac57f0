"""Small parties with a tokenizer, and the calls in which a defense has to hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import frozen
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from vflair_core.parties.split import split
from vflair_core.partition.partition import Partition
from vflair_core.tasks.task import Example
from vflair_core.tasks.tokenization import InputFormat
from vflair_core.tasks.tokenizer_training import train_tokenizer
from vflair_core.testing.models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vflair_core.defenses.defense import Defense
    from vflair_core.parties.data_party.party import DataParty
    from vflair_core.parties.model_party.party import ModelParty

PUBLIC = (
    "Public text that anyone may read, long enough for a few rows.",
    "The river runs past the old mill and the winter garden.",
    "A copper engine stood under the lamp beside a stone wall.",
    "Nobody knows which paper came first, or why it was written.",
)
VOCABULARY = 300
TASK_KINDS = {"bert": "classification", "t5": "seq2seq"}  # of all others: causal-lm


@frozen
class Call:
    """One way to call a model that is cut: a training pass, or words to be written, greedily or by beams."""

    kind: Literal["train", "generate", "beams"]
    model: str  # gpt2, llama, bert (two classes) or t5
    head: int
    tail: int

    @property
    def cell(self) -> tuple[str, str, str]:
        """Partition, task kind and phase, as `Defense.supports` names them."""
        phase = "train" if self.kind == "train" else "prefill"
        return "HBT" if self.tail else "HT", TASK_KINDS.get(self.model, "causal-lm"), phase

    def __str__(self) -> str:
        return f"{self.kind} {self.model} {self.head}+{self.tail}"


CUTS = {
    "train": (("gpt2", 1, 1), ("llama", 2, 0), ("bert", 1, 1), ("bert", 1, 0), ("t5", 1, 1)),
    "generate": (("gpt2", 1, 1), ("llama", 2, 0), ("t5", 1, 1)),
    "beams": (("gpt2", 1, 1), ("t5", 1, 1)),
}
CALLS = tuple(Call(kind, *cut) for kind, cuts in CUTS.items() for cut in cuts)  # type: ignore[arg-type]


@frozen(eq=False)
class Parties:
    """Both parties, and the model before it was cut."""

    data_party: DataParty
    model_party: ModelParty
    whole: PreTrainedModel


def parties_of(
    model: str,
    head: int,
    tail: int,
    defenses: Sequence[Defense] = (),
    *,
    task_kind: str | None = None,
    prepare: bool = True,
    public: Sequence[str] = PUBLIC,
) -> Parties:
    """Cut a small model of 300 words with a tokenizer, and prepare the defenses on public text."""
    whole = copy.deepcopy(_model(model))
    party, model_party = split(
        copy.deepcopy(whole),
        Partition(head, tail),
        defenses=list(defenses),
        tokenizer=_tokenizer(),
        seed=0,
    )
    party.defenses.task_kind = task_kind or TASK_KINDS.get(model, "causal-lm")  # type: ignore[assignment]
    for defense in defenses if prepare else ():
        defense.prepare(list(public), party)
    return Parties(party, model_party, whole)


def act(party: DataParty, call: Call, seed: int = 7, *, texts: bool = False) -> list[Any]:
    """Call the model of a party; return loss and logits of a training pass, or the words it wrote.

    With `texts` it is given texts, as a party must be whose defenses change text or tokens, and else token ids.
    """
    if texts:
        return _act_on_texts(party, call, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout's
    ids = torch.randint(5, VOCABULARY - 10, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    model: Any = party.model
    if call.kind == "train":
        model.train()
        words = ids.masked_fill(mask == 0, -100)
        words[:, :2] = -100  # a prompt
        labels = torch.tensor([0, 1, 1, 0]) if call.model == "bert" else words
        options = {} if call.model == "bert" else {"use_cache": False}
        out = model(input_ids=ids, attention_mask=mask, labels=labels, **options)
        out.loss.backward()
        return [out.loss.detach(), out.logits.detach()]
    model.eval()
    beams = 3 if call.kind == "beams" else 1
    return [
        model.generate(
            ids,
            max_new_tokens=4,
            min_new_tokens=4,
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
        )
    ]


def _act_on_texts(party: DataParty, call: Call, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    if call.kind == "train":
        party.model.train()
        rows = [Example(t, label=n % 2, answer=t) for n, t in enumerate(PUBLIC)]
        if call.model not in TASK_KINDS:
            rows = [Example(text) for text in PUBLIC]
        party.take_up_format(
            InputFormat(kind=party.defenses.task_kind, two_stacks=call.model == "t5")  # type: ignore[arg-type]
        )
        out: Any = party.model(**party.encode(rows, max_length=24))
        out.loss.backward()
        return [out.loss.detach(), out.logits.detach()]
    party.model.eval()
    beams = 3 if call.kind == "beams" else 1
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    return party.ask(list(PUBLIC), **options)


@functools.cache
def _tokenizer() -> Any:
    return train_tokenizer(list(PUBLIC) * 4, VOCABULARY)


@functools.cache
def _model(kind: str) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if kind == "t5":
        options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
        options |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **options)).eval()
    if kind == "bert":
        return tiny_model("bert", "classification", num_labels=2, **sizes)
    return tiny_model(kind, **sizes)
