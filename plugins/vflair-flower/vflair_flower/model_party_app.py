"""The ServerApp: it loads the model party's half, serves it to the nodes of one run, and leads the rounds by a strategy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attrs import asdict
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from vflair_core import ExperimentError
from vflair_flower.options import RunOptions, read_run_options
from vflair_flower.party_grid import PAUSE, PartyGrid
from vflair_flower.served_half import served

REPORT = "run.json"
Tell = Callable[[str], None]


def fed_avg() -> Strategy:
    """The mean of what all nodes send, each weighted by its number of records; a node that is lost is left out."""
    return FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,
    )


def say(sentence: str) -> None:
    """Write a line to the ServerApp's output, which Flower keeps as the log of the run."""
    print(sentence, flush=True)  # noqa: T201 - Flower uploads what a ServerApp prints


def gathered(grid: Grid, options: RunOptions) -> dict[int, str]:
    """Wait for as many nodes as the run wants, and return them with their names.

    Raises:
        ExperimentError: They did not come.
    """
    until = time.monotonic() + options.round_timeout
    while True:
        nodes = {node.node_id: node.name or str(node.node_id) for node in grid.get_nodes()}
        if len(nodes) >= options.min_nodes:
            return nodes
        if time.monotonic() > until:
            raise ExperimentError(
                f"{len(nodes)} nodes are here after {options.round_timeout:g} seconds (round-timeout), and the run wants "
                f"{options.min_nodes} (min-nodes). Start more SuperNodes, or ask for fewer."
            )
        time.sleep(PAUSE)


def lead(grid: Grid, options: RunOptions, strategy: Strategy, tell: Tell) -> None:
    """Lead one run from its first node to its last message.

    Raises:
        VflairError: The half cannot be served, or no node is left.
    """
    with served(options) as half:
        tell(f"The model party serves {half.server.address}, {half.party.fingerprint}.")
        parties = PartyGrid(grid, half, gathered(grid, options), tell)
        tell(f"Nodes of this run: {', '.join(parties.nodes.values())}.")
        try:
            _send(parties, "query.join", ArrayRecord(), options)
            result = strategy.start(
                parties, ArrayRecord(), num_rounds=options.rounds, timeout=options.round_timeout
            )
            _send(parties, "query.finish", result.arrays, options)
            parties.get_node_ids()  # somebody must have come to the end
            if options.folder:
                half.party.save(options.folder)
        finally:
            if options.folder:
                write_report(parties, Path(options.folder) / REPORT)


def _send(parties: PartyGrid, kind: str, arrays: ArrayRecord, options: RunOptions) -> None:
    nodes: Iterable[int] = parties.get_node_ids()
    messages = [Message(RecordDict({"arrays": arrays}), node, kind) for node in nodes]
    parties.send_and_receive(messages, timeout=options.round_timeout)


def write_report(parties: PartyGrid, file: Path) -> None:
    """Write what happened: what each node told at each stage, and who was lost."""
    stages: dict[str, dict[str, Any]] = {}
    for reply in parties.replies:
        told: dict[str, Any] = {}
        for config in reply.content.config_records.values():
            told |= dict(config)
        for metrics in reply.content.metric_records.values():
            told |= dict(metrics)
        stages.setdefault(reply.stage, {})[reply.node] = told
    report = {"stages": stages, "lost": [asdict(each) for each in parties.lost]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def model_party_app(strategy: Callable[[], Strategy] = fed_avg) -> ServerApp:
    """Make the ServerApp of the model party.

    Args:
        strategy: Makes the strategy of Flower that averages adapters, if the run asks for it. All nodes must take part in
            every round.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        lead(grid, read_run_options(context.run_config), strategy(), say)

    return app


app = model_party_app()
