"""Commands that show what is installed: plugins, list, show."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from vflair_core.cli.app import Json, NoPlugin, Plugin, app, configure_logging, leave_out
from vflair_core.cli.tables import plain, say, summary, table
from vflair_core.errors import VflairError, alternatives


def plugins(*, plugin: Plugin = None, no_plugin: NoPlugin = None, json_: Json = False) -> None:
    """List every plugin, where it came from, what it implements, and why it failed if it did."""
    leave_out(no_plugin)
    import attrs

    from vflair_core.plugins import plugin_manager

    configure_logging(verbose=False, level=logging.ERROR)
    infos = plugin_manager(plugin or ()).about()
    if json_:
        say(json.dumps([attrs.asdict(info) for info in infos], indent=2))
        return
    rows = [
        (info.name, f"{info.source} {info.version}".strip(), info.error or ", ".join(info.hooks))
        for info in infos
    ]
    table(("plugin", "from", "hooks, or why it failed"), rows)


def list_(
    what: str | None = None,
    *,
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    json_: Json = False,
) -> None:
    """List attacks, defenses, tasks or models (types that `verify` found exact)."""
    leave_out(no_plugin)
    if what is None:
        app.help_print(["list"])
        return
    if what == "models":
        from vflair_core.parties.verified_models import VERIFIED

        if json_:
            say(json.dumps(VERIFIED, indent=2))
        else:
            types = [(kind, ", ".join(cuts)) for kind, cuts in VERIFIED.items()]
            table(("model type · task", "exact for"), types)
        return
    from vflair_core.offers import offers
    from vflair_core.plugins import plugin_manager

    shelves = ("attacks", "defenses", "tasks", "commands")
    if what not in shelves:
        raise VflairError(f"Cannot list {what!r}.{alternatives(what, (*shelves, 'models'))}")
    found = offers(plugin_manager(plugin or ()), what)  # type: ignore[arg-type]
    if what == "tasks":
        list_tasks(found, json_=json_)
        return
    rows = [(name, offered.source, summary(offered.load())) for name, offered in found.items()]
    if json_:
        say(
            json.dumps(
                [dict(zip(("name", "from", "summary"), row, strict=True)) for row in rows], indent=2
            )
        )
    else:
        table(("name", "from", "what it does"), rows)


def show(
    name: str,
    *,
    option: Annotated[
        list[str] | None,
        Parameter(name=["--option", "-o"], help="key=value of a task in TOML; repeatable."),
    ] = None,
    plugin: Plugin = None,
    no_plugin: NoPlugin = None,
    json_: Json = False,
) -> None:
    """Show an attack, a defense or a task: options with types, defaults and what they are, source; of a task also an example."""
    leave_out(no_plugin)
    from vflair_core.cli.catalogue import describe
    from vflair_core.experiments.config import override
    from vflair_core.plugins import plugin_manager

    options: dict[str, Any] = {}
    for each in option or ():
        override(options, each)
    facts = describe(plugin_manager(plugin or ()), name, options)
    if json_:
        say(json.dumps(facts, indent=2))
        return
    say(f"{facts['name']} ({facts['sort']}, from {facts['from']})\n\n{facts['text']}\n")
    if facts.get("knowledge"):
        say(f"needs: {', '.join(facts['knowledge']['needs']) or 'nothing'}")
        say(f"can use: {', '.join(facts['knowledge']['can use']) or 'nothing else'}\n")
    table(
        ("option", "type", "default", "what it is"),
        [(o["name"], o["type"], o["default"], o.get("about", "")) for o in facts["options"]],
    )
    for part in ("card", "example"):
        if facts.get(part):
            say("")
            table((part, ""), [(key, plain(value)) for key, value in facts[part].items()])


def list_tasks(found: Mapping[str, Any], *, json_: bool) -> None:
    """A task's card says what there is to know without its data; what has none is listed without."""
    from vflair_core.cli.catalogue import card_of, size_of

    loaded = {name: (offered, offered.load()) for name, offered in found.items()}
    if json_:
        facts = [
            {"name": name, "from": offered.source, "summary": summary(thing), **card_of(thing)}
            for name, (offered, thing) in loaded.items()
        ]
        say(json.dumps(facts, indent=2))
        return
    rows = []
    for name, (_, thing) in loaded.items():
        card = card_of(thing)
        told = (card.get("kind", ""), size_of(card), card.get("metric", ""), card.get("source", ""))
        rows.append((name, *told, card.get("licence", ""), summary(thing)))
    columns = ("name", "kind", "size", "metric", "source", "licence", "what it does")
    table(columns, rows)
