"""Commands that make certificates and tokens: tls init, tls client, token new."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from vflair_core.cli.app import Json
from vflair_core.cli.tables import say, table

if TYPE_CHECKING:
    from vflair_core.communication.remote.certificates import Written

tls = App(name="tls", help="Make certificates for a model party and its data parties.")
token = App(name="token", help="Make tokens for data parties.")

Days = Annotated[int, Parameter(help="How long certificates hold.")]


@tls.command
def init(
    folder: Path,
    *,
    host: Annotated[
        list[str] | None,
        Parameter(
            help="Name or address by which data parties reach the model party; repeatable. By default localhost, 127.0.0.1 and ::1."
        ),
    ] = None,
    client: Annotated[
        list[str] | None, Parameter(help="Name of a data party to make one for; repeatable.")
    ] = None,
    days: Days = 365,
    json_: Json = False,
) -> None:
    """Make a trial authority, a certificate of the model party and one of each client, in the new FOLDER."""
    from vflair_core.communication.remote.certificates import HOSTS, init_authority
    from vflair_core.communication.remote.tls import import_cryptography

    import_cryptography()
    _tell(
        init_authority(folder, hosts=host or HOSTS, clients=client or (), days=days), as_json=json_
    )
    if not json_:
        say(
            f"\nCopy {folder}/model-party to the machine of the model party and {folder}/clients/NAME to that of NAME, over a "
            f"way that nobody reads (scp). Keep {folder}/authority here: its key can sign a certificate for anybody."
        )


@tls.command(name="client")
def client_(
    folder: Path,
    name: str,
    *,
    days: Days = 365,
    json_: Json = False,
) -> None:
    """Make a certificate for one more client, NAME, of the authority in FOLDER."""
    from vflair_core.communication.remote.certificates import add_client
    from vflair_core.communication.remote.tls import import_cryptography

    import_cryptography()
    _tell(add_client(folder, name, days=days), as_json=json_)
    if not json_:
        say(
            f"\nCopy {folder}/clients/{name} to the machine of {name}, over a way that nobody reads (scp)."
        )


@token.command
def new(
    name: str,
    *,
    rights: Annotated[
        str, Parameter(help="What the client may do: infer, train, save, resume.")
    ] = "infer",
    expires: Annotated[
        str | None, Parameter(help="Last day on which the token holds, as 2027-06-30.")
    ] = None,
    add_to: Annotated[
        Path | None, Parameter(help="Add its line to this file of clients, made if there is none.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Write the token to this new file instead of showing it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Make a token for the client NAME: shown once, with the line that the file of clients needs."""
    from vflair_core.communication.remote.clients import add_entry, entry_for, new_token, write_new
    from vflair_core.errors import VflairError

    try:
        until = None if expires is None else dt.date.fromisoformat(expires)
    except ValueError as error:
        raise VflairError(f"--expires {expires!r} is no date. Write it as 2027-06-30.") from error
    made = new_token()
    line = entry_for(name, made, [right.strip() for right in rights.split(",")], expires=until)
    if out is not None:
        write_new(out, made + "\n")
    try:
        if add_to is not None:
            add_entry(add_to, line)
    except VflairError:
        if out is not None:
            out.unlink()
        raise
    shown = {} if out is not None else {"token": made}
    if json_:
        say(json.dumps({"name": name, **shown, "line": line}, indent=2))
        return
    where = (
        "Give it to nobody but that client; on its machine, put it in a file that only it reads."
    )
    if out is None:
        say(f"The token of {name}, shown only now. {where}\n\n{made}\n")
    else:
        say(f"{out} holds the token of {name}. {where}")
    if add_to is None:
        say(
            f"The line for the model party's file of clients (--tokens), which knows a digest only:\n\n{line}"
        )
    else:
        say(f"{add_to} knows {name} by a digest of the token.")


def _tell(written: Sequence[Written], *, as_json: bool) -> None:
    """Say of each file what it is for."""
    if as_json:
        say(json.dumps({str(each.path): each.what for each in written}, indent=2))
    else:
        table(("file", "what it is for"), [(str(each.path), each.what) for each in written])
