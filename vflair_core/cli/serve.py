"""The command `vflair serve`: a model party for data parties on other machines."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from vflair_core.cli.app import configure_logging
from vflair_core.cli.limits import asked_limits, limits_of, rows_of
from vflair_core.cli.tables import say, table
from vflair_core.errors import VflairError, alternatives

if TYPE_CHECKING:
    from vflair_core.communication.remote.server import Server
    from vflair_core.parties.model_party.party import ModelParty
    from vflair_core.training.tuning import Lora


def serve(
    *,
    model: Annotated[
        str | None, Parameter(help="Folder, hub name or package:NAME/FOLDER, as at the data party.")
    ] = None,
    partition: Annotated[
        str, Parameter(help="Blocks that the data party keeps at either end: HEAD,TAIL.")
    ] = "2,2",
    listen: Annotated[
        str | None, Parameter(help="HOST:PORT; 0.0.0.0:8443 takes connections from everywhere.")
    ] = None,
    tls_cert: Annotated[Path | None, Parameter(help="The server's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, Parameter(help="Its key.")] = None,
    client_ca: Annotated[
        Path | None, Parameter(help="Authority that clients must have a certificate of.")
    ] = None,
    tokens: Annotated[
        Path | None, Parameter(help="File of clients: `vflair token new` makes its lines.")
    ] = None,
    checkpoints: Annotated[
        Path | None, Parameter(help="Folder in which clients may have their runs saved.")
    ] = None,
    sharing: Annotated[
        Literal["turns", "mean"],
        Parameter(help="How several training clients share the weights."),
    ] = "turns",
    expiry: Annotated[
        float | None, Parameter(help="Seconds after which a silent client is taken for gone.")
    ] = None,
    dtype: Annotated[str | None, Parameter(help="Of the weights, as at the data party.")] = None,
    device: Annotated[
        str, Parameter(help="Where to compute: cpu, cuda, cuda:1; auto is CUDA if it is there.")
    ] = "auto",
    gguf_file: Annotated[str | None, Parameter(help="GGUF file of the model.")] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a hub model.")] = None,
    trainable: Annotated[
        str | None,
        Parameter(
            help="Slices that clients train: body, blocks.7, …; none trains nothing here. By default all."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        Parameter(help="Train adapters instead: key=value in TOML, as r=8, alpha=16; repeatable."),
    ] = None,
    adapter: Annotated[
        Path | None, Parameter(help="A peft adapter of the whole model, as at the data party.")
    ] = None,
    limit: Annotated[
        list[str] | None, Parameter(help="name=value, as graph_bytes=4GiB; repeatable.")
    ] = None,
    show_limits: Annotated[
        bool, Parameter(help="Print every limit with its value, and end.")
    ] = False,
    insecure_loopback: Annotated[
        bool, Parameter(help="Do without TLS, on a loopback address only.")
    ] = False,
    audit: Annotated[
        Path | None, Parameter(help="Write who asked for what to this file, a JSON line each.")
    ] = None,
    metrics: Annotated[
        str | None, Parameter(help="HOST:PORT for Prometheus, in the clear: keep it inside.")
    ] = None,
    logs: Annotated[
        Literal["words", "json"], Parameter(help="What log lines on standard error look like.")
    ] = "words",
    drain: Annotated[
        float, Parameter(help="Seconds for what runs when the server is told to stop.")
    ] = 30.0,
) -> None:
    """Serve the model party's share of a model over gRPC until SIGTERM or Ctrl-C; SIGHUP reads certificates and clients again."""
    configure_logging(verbose=False, level=logging.INFO, as_json=logs == "json")
    if logs == "json":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own lines are no JSON
    asked = asked_limits(limit or ())
    head, tail = cut_in(partition)
    adapters = _lora(lora or ())
    if not 0 <= drain < math.inf or not (expiry is None or 0 < expiry < math.inf):
        raise VflairError("--drain and --expiry are seconds: 0 or more, and more than 0.")
    if not show_limits and (model is None or listen is None):
        raise VflairError(
            "Give --model and --listen, as in: vflair serve --model NAME --partition 2,2 --listen 0.0.0.0:8443 "
            "--tls-cert … --tls-key … --client-ca … --tokens …"
        )
    from vflair_core.cli.serving import read_terms, serve_until_stopped
    from vflair_core.communication.remote.extra import import_grpc

    import_grpc()
    if show_limits:
        table(("limit", "value", "of what"), rows_of(*limits_of(asked, _device(device))))
        return
    assert model is not None
    assert listen is not None
    terms = read_terms(
        listen,
        tls_cert=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        tokens=tokens,
        insecure_loopback=insecure_loopback,
        audit=audit,
        metrics=metrics,
    )
    if checkpoints is not None:
        checkpoints.mkdir(mode=0o700, parents=True, exist_ok=True)
    caps, limits = limits_of(asked, _device(device))
    party = _share_of(
        model,
        (head, tail),
        {"dtype": dtype, "gguf_file": gguf_file, "revision": revision, "adapter": adapter},
        trainable,
        adapters,
        _device(device),
    )
    if "positions" not in asked:
        caps.positions = party.caps.positions
    party.caps, party.sharing = caps, sharing
    party.checkpoints, party.expiry = checkpoints, expiry
    ending = serve_until_stopped(
        party,
        terms,
        limits,
        drain=drain,
        ready=lambda server: _say_ready(server, party, secure=not insecure_loopback),
    )
    if ending.cut_off:
        sys.stdout.flush()
        os._exit(
            int(ending.told_twice)
        )  # else Python would wait for the threads of what was cut off


def _share_of(
    model: str,
    cut: tuple[int, int],
    options: Mapping[str, Any],
    trainable: str | None,
    adapters: Lora | None,
    device: Any,
) -> ModelParty:
    """The model party's share of a model, with what clients may train chosen, where it computes."""
    from vflair_core.parties.load import load_model_party
    from vflair_core.partition.partition import Partition
    from vflair_core.training.tuning import EVERYTHING, tune

    given = {name: value for name, value in options.items() if value is not None}
    party = load_model_party(model, Partition(*cut), **given)
    if trainable is not None or adapters is not None:
        tune(party, _slices(trainable, EVERYTHING), adapters=adapters)
    party.model.to(device)
    return party


def _say_ready(server: Server, party: ModelParty, *, secure: bool) -> None:
    """One line that says what is served where."""
    weights = list(party.parameters())
    held = sum(weight.numel() for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    caps = party.caps
    say(
        f"serving {server.address} ({'TLS' if secure else 'plaintext, this machine only'}) · holds {held:,} parameters "
        f"({size / 2**20:,.0f} MiB) on {party.device}, of which clients may train {trained:,} · {party.fingerprint} · at most {caps.sessions} sessions, messages of "
        f"{caps.message_bytes / 2**20:,.0f} MiB; all limits: --show-limits"
    )
    sys.stdout.flush()


def cut_in(text: str) -> tuple[int, int]:
    """The cut that ``HEAD,TAIL`` means.

    Raises:
        VflairError: It means none.
    """
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise VflairError(
            f"--partition {text!r} is no cut. Write HEAD,TAIL: the blocks that the data party keeps at either end, as 2,2."
        )
    return int(match[1]), int(match[2])


def _slices(text: str | None, everything: Sequence[str]) -> Sequence[str]:
    """Names of slices as `tune` takes them; what the data party holds is its own business."""
    if text is None:
        return everything
    return () if text == "none" else [name.strip() for name in text.split(",")]


def _lora(words: Sequence[str]) -> Lora | None:
    """The adapters that ``key=value`` words describe, if there are any."""
    if not words:
        return None
    import attrs

    from vflair_core.experiments.config import override
    from vflair_core.partition.adapters import check_peft
    from vflair_core.training.tuning import Lora

    options: dict[str, Any] = {}
    for word in words:
        override(options, word)
    names = [field.name for field in attrs.fields(Lora)]
    for name in options:
        if name not in names:
            raise VflairError(f"There is no option {name!r} of --lora.{alternatives(name, names)}")
    try:
        adapters = Lora(**options)
    except (TypeError, ValueError) as error:
        raise VflairError(f"--lora {' '.join(words)}: {error.args[0]}") from error
    if adapters.r:
        check_peft()  # before the model is loaded
    return adapters


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise VflairError(
            f"There is no device {name!r} here: {str(error).splitlines()[0]} Possible: cpu, cuda, cuda:1, auto."
        ) from error
    return device
