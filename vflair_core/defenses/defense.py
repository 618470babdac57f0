"""The places where a defense can stand in a round, and what it is told there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from attrs import field, frozen
from torch import Tensor, nn

from vflair_core.communication.message import Phase, Role
from vflair_core.defenses.account import Account
from vflair_core.defenses.guarantee import EMPIRICAL, Guarantee
from vflair_core.defenses.mechanism import Mechanism, Replacement
from vflair_core.tasks.collation import digests_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vflair_core.communication.channel import Channel
    from vflair_core.partition.partition import Partition


COVERABLE = ("prompt", "response", "labels", "gradients")


@frozen(eq=False)
class Exchange:
    """What a defense may know about the exchange it is called in.

    `axes` names the dimensions of the tensor at hand (``"BTD"``: batch, position, width). `mask` is the
    (B, T) mask of real tokens, None when all are. `batch` is the local batch and never crosses. `examples` says which
    example each of its rows is of, the same in every epoch and before any defense changed it (`Example.identity`).
    `generator` is the defense's own random stream. `memo` is empty at the start of each exchange and is
    the only place to remember something from one call to the next. `account` is the core's.
    """

    number: int
    step: int
    phase: Phase
    name: str = ""
    role: Role = "smashed"
    axes: str = "BTD"
    mask: Tensor | None = None
    batch: Mapping[str, Any] = field(factory=dict)
    generator: torch.Generator | None = None
    memo: dict[str, Any] = field(factory=dict)
    examples: tuple[bytes, ...] = field()
    account: Account = field(factory=lambda: Account("the model"))

    @examples.default
    def _by_their_tokens(self) -> tuple[bytes, ...]:
        return digests_of(self.batch)


class Streams(Protocol):
    """The defenses of a party as one of them sees them: who they are, and the random stream of each."""

    each: tuple[Defense, ...]

    @property
    def randomness(self) -> str:
        """Where the noise comes from, in a form that does not tell it."""

    def generator_of(self, defense: Defense) -> torch.Generator:
        """The random stream of one defense."""

    def begin_anew(self, defense: Defense) -> None:
        """Give a defense a stream that it has not drawn from."""

    def check(self, phase: Phase) -> None:
        """See that every defense supports the cell at hand."""

    def bypassing(self) -> AbstractContextManager[None]:
        """While this lasts, no defense acts."""


class Party(Protocol):
    """The data party as its defenses see it, when they are prepared and when they measure themselves."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    partition: Partition
    channel: Channel

    @property
    def task_kind(self) -> str:
        """The kind of the task at hand."""

    @property
    def defenses(self) -> Streams:
        """All of its defenses."""

    def smashed(self, **inputs: Any) -> Tensor:
        """Run the head alone; nothing crosses."""

    def complete(self, returned: Tensor, **inputs: Any) -> Any:
        """Run the local tail alone; nothing crosses."""

    def answering(self) -> AbstractContextManager[None]:
        """While this lasts, the model may be given tokens."""

    def public_text(self) -> AbstractContextManager[None]:
        """While this lasts, what crosses is public text: nothing is counted, and gradients may be of any loss."""

    def open(self) -> Mapping[str, Any]:
        """Open the session anew, with the modules that defenses put behind the channel."""

    def remember(
        self,
        defense: Defense,
        public_texts: Sequence[str],
        make: Callable[[], dict[str, Tensor]],
        **facts: str,
    ) -> dict[str, Tensor]:
        """Return what `make` makes, or what an earlier call of it left in the cache."""

    def tell(self, defense: Defense, done: int, total: int) -> None:
        """Say how far a defense is with its preparation."""


class Defense:
    """A defense overrides the methods of the places where it stands; all others pass things through.

    It keeps no per-call state on itself (`Exchange.memo` is for that) and says what it `covers`, a subset
    of prompt, response, labels, gradients, and what it `supports`: a set of (partition, task kind,
    phase) with ``"*"`` for any, and the `axes` of tensors it can defend. What is not supported raises;
    what is not covered is attacked as it is.
    """

    covers: frozenset[str] = frozenset()
    supports: frozenset[tuple[str, str, str]] = frozenset({("*", "*", "*")})
    axes: frozenset[str] = frozenset({"BTD"})

    def prepare(self, public_texts: Sequence[str], data_party: Party) -> None:
        """Calibrate or train on public text, before anything private is touched."""

    def on_text(self, fields: dict[str, str]) -> dict[str, str]:
        """Change the texts of one example, ``text`` and perhaps ``pair``, before its prompt; never its targets."""
        return fields

    def on_tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change token ids at equal length."""
        return batch

    def on_labels(self, labels: Tensor, exchange: Exchange) -> Tensor:
        """Change labels before the loss, in training only."""
        return labels

    def expand(self, batch: dict[str, Tensor], exchange: Exchange) -> dict[str, Tensor]:
        """Add rows to all tensors of a batch together (decoys). `exchange.memo` is the call's, for `contract`."""
        return batch

    def contract(self, outputs: Any, exchange: Exchange) -> Any:
        """Drop from the model's outputs the rows that `expand` added."""
        return outputs

    def on_embeddings(self, embeddings: Tensor, exchange: Exchange) -> Tensor:
        """Change the token embeddings (B, T, D)."""
        return embeddings

    def on_smashed(self, smashed: Tensor, exchange: Exchange) -> Tensor:
        """Change what leaves the head. Runs on every exchange, inside the data party's graph."""
        return smashed

    def on_returned(self, returned: Tensor, exchange: Exchange) -> Tensor:
        """Change what came back, inside the data party's graph."""
        return returned

    def on_gradient(self, gradient: Tensor, exchange: Exchange) -> Tensor:
        """Change the gradient that the data party is about to send."""
        return gradient

    def on_smashed_grad(self, gradient: Tensor, exchange: Exchange) -> Tensor:
        """Change the gradient that came back for the smashed data."""
        return gradient

    def penalty(self, exchange: Exchange) -> Tensor | None:
        """Return a term to add to the training loss, or None; asked once for each exchange of a forward.

        ``exchange.memo["loss"]`` is the loss so far.
        """
        return None

    def after_step(self) -> None:
        """Run after each optimizer step (alternating training of adversaries)."""

    def on_answer(self, prompt: str, answer: str) -> str:
        """Change the text of an answer, on the data party."""
        return answer

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return what the data party's optimizer should train with the model."""
        return ()

    def counterpart(self) -> nn.Module | None:
        """Return a module for the model party to apply to the smashed data (`nn.Linear` or `nn.LayerNorm`)."""
        return None

    def mechanism(self) -> Mechanism | None:
        """Return what an adaptive attacker may know; None when nothing could help one."""
        return None

    def gradient_mechanism(self) -> Mechanism | None:
        """Return what an adaptive attacker may know of what it does to the gradient that is sent, or to labels.

        It is asked for the gradients (K, T, D) that K guesses about one example would give: what binds the rows of an
        example together, a clip, binds the last two dimensions.
        """
        return None

    def replacement(
        self, tokenizer: Any, embeddings: Tensor, public_texts: Sequence[str]
    ) -> Replacement | None:
        """Return how it replaces words, of what anyone has: the tokenizer, the embeddings (V, D) and the public text."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return calibrated or learned values, so that `load_state` on an equal defense restores them."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the values that `state` of an equally built defense returned."""

    def private_state(self) -> dict[str, Tensor]:
        """Return what else an equal defense needs to go on after a resume: drawn answers, optimizers.

        It goes into the data party's own checkpoint and nowhere else: no attacker is told.
        """
        return {}

    def load_private_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the values that `private_state` of an equally built defense returned, after `load_state`."""

    def findings(self, public_texts: Sequence[str], data_party: Party) -> Mapping[str, float]:
        """Measure on public text, after training, what the defense can say of itself; a result shows it."""
        return {}

    def guarantee(
        self, releases: int, messages: int = 0, gradients: int | None = None
    ) -> Guarantee:
        """State what is promised of one example; `DataParty.guarantees` does so of what has crossed.

        What is not known is taken for the most that it can be, so that no promise is better than what crossed allows.

        Args:
            releases: Its rows of smashed data that have crossed.
            messages: The messages that they came in; 0 if that is not known: as many as rows, then.
            gradients: The messages of its gradient; None if that is not known: as many as rows, then.
        """
        return EMPIRICAL
