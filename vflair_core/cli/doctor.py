"""The command `vflair doctor`: the way to a model party, one line for each step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from vflair_core.cli.app import Json, configure_logging
from vflair_core.cli.serve import cut_in
from vflair_core.cli.tables import say
from vflair_core.errors import VflairError

if TYPE_CHECKING:
    from vflair_core.communication.remote.client import GrpcChannel

TOKEN = "VFLAIR_TOKEN"  # noqa: S105 - a variable's name


def doctor(
    url: str,
    *,
    ca: Annotated[
        Path | None, Parameter(help="Authority that the server's certificate comes from.")
    ] = None,
    certificate: Annotated[Path | None, Parameter(help="Your certificate.")] = None,
    key: Annotated[Path | None, Parameter(help="Its key.")] = None,
    token_file: Annotated[
        Path | None,
        Parameter(
            help=f"File with your token; or set {TOKEN}, for others see what a command is given."
        ),
    ] = None,
    plaintext: Annotated[bool, Parameter(help="Do without TLS, on this machine only.")] = False,
    model: Annotated[
        str | None, Parameter(help="Load your half of this model, and see whether theirs fits.")
    ] = None,
    partition: Annotated[
        str, Parameter(help="Blocks that the data party keeps at either end: HEAD,TAIL.")
    ] = "2,2",
    dtype: Annotated[str | None, Parameter(help="Of the weights.")] = None,
    gguf_file: Annotated[str | None, Parameter(help="GGUF file of the model.")] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a hub model.")] = None,
    rounds: Annotated[int, Parameter(help="Messages for the round trip.")] = 20,
    json_: Json = False,
) -> None:
    """Go the way to the model party at URL (grpc://HOST:PORT), and say in plain words where it fails and what to do."""
    configure_logging(verbose=False)
    from vflair_core.communication.remote.doctor import examine

    if rounds < 1:
        raise VflairError(f"--rounds must be at least 1, not {rounds}.")
    head, tail = cut_in(partition)
    options = {"dtype": dtype, "gguf_file": gguf_file, "revision": revision}

    def holds(channel: GrpcChannel) -> str:
        return _holds(
            model, (head, tail), channel, {k: v for k, v in options.items() if v is not None}
        )

    steps = examine(
        url,
        ca=ca,
        certificate=certificate,
        key=key,
        token=_token(token_file),
        plaintext=plaintext,
        rounds=rounds,
        model=None if model is None else holds,
    )
    failed, rows = False, []
    for step in steps:
        failed |= not step.well
        if json_:
            rows.append({"step": step.name, "ok": step.well, "text": step.text})
        else:
            say(f"{'ok    ' if step.well else 'FAILED'}  {step.name:<12} {step.text}")
            sys.stdout.flush()
    if json_:
        say(json.dumps(rows, indent=2))
    if failed:
        sys.exit(1)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise VflairError(f"The token cannot be read: {error}.") from error


def _holds(
    model: str | None, cut: tuple[int, int], channel: GrpcChannel, options: dict[str, Any]
) -> str:
    """Open a session as a data party would, which compares fingerprints, and close it."""
    from vflair_core.parties.load import load_data_party
    from vflair_core.partition.partition import Partition

    assert model is not None
    data_party = load_data_party(model, Partition(*cut), channel=channel, **options)
    data_party.close()
    return f"both hold halves of one model: {data_party.connection.fingerprint}"
