"""The ClientApp: it loads the data party's half, and trains it on its node's records against the model party of the run.

Flower starts a process for each message. What must last from one round to the next lies in the node's own folder, and the
model party keeps the session open meanwhile (`FineTuning.leave`, `take_up`).
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from vflair_core import (
    ChannelError,
    Defense,
    FineTuning,
    ProtocolError,
    VflairError,
    load_data_party,
    tune,
)
from vflair_flower.adapter_arrays import adapters_of, put_into
from vflair_flower.handover import Handover
from vflair_flower.node_records import Rows, batch_of, read_texts
from vflair_flower.options import NodeOptions, RunOptions, read_node_options, read_run_options

log = logging.getLogger(__name__)
# Seconds more than others wait for a silent node: so long a node waits for them. It is longer than Flower itself needs to
# notice that a node is gone, two heartbeats of 30 seconds.
GRACE = 90.0


@frozen
class Defended:
    """What a data party does to what crosses.

    Attributes:
        defenses: Makes its defenses, anew for each message.
        public_texts: Texts that anyone can have, on which defenses calibrate themselves once, when the node joins.
    """

    defenses: Callable[[], Sequence[Defense]] = tuple
    public_texts: Sequence[str] = ()


class NodeError(Exception):
    """What the model party's side is told of an error at a node: never a text of its records."""


@frozen(eq=False)
class Node:
    """A data party for one message: what the run and the node say, and what came."""

    run: RunOptions
    own: NodeOptions
    content: RecordDict
    folder: Path  # of this run
    defended: Defended

    @classmethod
    def of(cls, message: Message, context: Context, defended: Defended) -> Node:
        """Read what the run and the node say.

        Raises:
            VflairError: They do not fit, or the run asks for what the node does not allow.
        """
        run, own = read_run_options(context.run_config), read_node_options(context.node_config)
        if run.average and not own.share_adapters:
            raise ProtocolError(
                "This node does not let its adapters be averaged (share-adapters in its node config), and the run asks for it"
            )
        return cls(run, own, message.content, own.of_run(context.run_id), defended)

    @property
    def left(self) -> Path:
        """Where the data party's half waits for the next message."""
        return self.folder / "between-rounds"

    @contextmanager
    def tuning(self, *, take_up: bool) -> Iterator[FineTuning]:
        """The data party at the model party, in the session it left, or in a new one.

        What fails meanwhile ends the session, so that nobody waits for this party.
        """
        run = self.run
        with (
            Handover.of(self.content).channel(run.node_timeout + GRACE) as channel,
            warnings.catch_warnings(),
        ):
            # The weights have moved since they were loaded: this very run has moved them.
            warnings.filterwarnings("ignore", message="The model party's weights are not those")
            party = load_data_party(
                run.model,
                run.cut(),
                channel=channel,
                defenses=self.defended.defenses(),
                **run.loading(),
            )
            try:
                tune(party, adapters=run.lora(), seed=run.seed)
                tuning = FineTuning(party, run.train())
                if take_up:
                    tuning.take_up(self.left)
                elif self.defended.public_texts:
                    party.prepare(self.defended.public_texts)
                yield tuning
            except BaseException as error:
                if not isinstance(error, ChannelError):  # else nobody is there to be told
                    _end(party.close)
                shutil.rmtree(self.left, ignore_errors=True)  # nothing can take it up now
                raise

    def averaged(self) -> ArrayRecord | None:
        """The average that came, if one did."""
        arrays = self.content.get("arrays")
        return arrays if isinstance(arrays, ArrayRecord) and len(arrays) else None


def _end(close: Callable[[], None]) -> None:
    try:
        close()
    except VflairError as error:
        log.warning("The session could not be closed: %s", error)


def join(node: Node) -> RecordDict:
    """Load the half, open the session, and see that there are records: nothing is trained yet."""
    texts = read_texts(Path(node.own.data), node.own.text)
    node.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with node.tuning(take_up=False) as tuning:
        tuning.leave(node.left)
    return RecordDict({"node": ConfigRecord({"examples": len(texts)})})


def train(node: Node) -> RecordDict:
    """Take the steps of one round."""
    run, texts = node.run, read_texts(Path(node.own.data), node.own.text)
    rows = Rows(texts, run.batch_size, run.seed)
    with node.tuning(take_up=True) as tuning:
        party = tuning.party
        if (averaged := node.averaged()) is not None:
            put_into(party, averaged)
        losses = [
            tuning.step(batch_of(party, rows(step), run.max_length))
            for step in range(party.step, party.step + run.steps)
        ]
        tuning.leave(node.left)
        arrays = adapters_of(party) if run.average else ArrayRecord()
    metrics = MetricRecord()
    metrics["num-examples"], metrics["losses"] = len(texts), losses
    metrics["loss"] = sum(losses) / len(losses)
    return RecordDict({"arrays": arrays, "metrics": metrics})


def finish(node: Node) -> RecordDict:
    """Write the data party's half for good, and end the session."""
    with node.tuning(take_up=True) as tuning:
        if (averaged := node.averaged()) is not None:
            put_into(tuning.party, averaged)
        tuning.party.save(node.folder)
        tuning.party.close()
    shutil.rmtree(node.left)
    return RecordDict()


def data_party_app(
    defenses: Callable[[], Sequence[Defense]] = tuple, *, public_texts: Sequence[str] = ()
) -> ClientApp:
    """Make the ClientApp of a data party.

    Args:
        defenses: Makes the defenses of what crosses, anew for each message.
        public_texts: What they calibrate themselves on, once, when the node joins.
    """
    app, defended = ClientApp(), Defended(defenses, public_texts)

    def answering(work: Callable[[Node], RecordDict]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            try:
                content = work(Node.of(message, context, defended))
            except Exception as error:
                log.exception("The data party failed; only the kind of error is told to others.")
                raise NodeError(_told(error)) from None
            return Message(content, reply_to=message)

        return answer

    app.query("join")(answering(join))
    app.train()(answering(train))
    app.query("finish")(answering(finish))
    return app


def _told(error: Exception) -> str:
    """What may be said of an error elsewhere: words that name no text, or its kind."""
    words = type(error) in (ProtocolError, ChannelError)  # their words name neither text nor files
    return f"{type(error).__name__}: {error}" if words else type(error).__name__


app = data_party_app()
