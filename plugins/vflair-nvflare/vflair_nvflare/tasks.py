"""What NVFlare's server tells the sites to do, and what it hears of them: names, numbers and short reasons."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from vflair_core import BusyError, ChannelError, ProtocolError
from vflair_nvflare.site import Site

SERVE, WORK, FINISH = "vflair_serve", "vflair_work", "vflair_finish"
GONE = "vflair_gone"  # for the model party: a data site is lost
ANSWER, REASON, CELLS, SITE = "vflair_answer", "vflair_reason", "vflair_cells", "vflair_site"

MOST_NUMBERS = 64
REPORT = "error.txt"  # with the text of an error, which may quote anything


def answered(answer: Mapping[str, Any]) -> Shareable:
    """The answer to a task that was done."""
    reply: Shareable = make_reply(ReturnCode.OK)
    reply[ANSWER] = dict(answer)
    return reply


def failed(error: BaseException) -> Shareable:
    """The answer to a task that was not done. Only words that vflair wrote are told: others may quote a text."""
    told = isinstance(error, (BusyError, ChannelError, ProtocolError))
    words = f"{type(error).__name__}: {error}" if told else type(error).__name__
    reply: Shareable = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply[REASON] = f"{words}{'' if told else f' (site.folder at this site has {REPORT})'}"
    return reply


def reported(error: BaseException, site: Site | None, task: str) -> str:
    """Write what went wrong where it stays, and return what may be logged: NVFlare sends logs of errors to its server."""
    name = type(error).__name__
    if site is None:
        return f"{task} failed: {name}"
    report = site.folder / REPORT
    report.touch(mode=0o600)
    report.write_text("".join(traceback.format_exception(error)))
    return f"{task} failed: {name}. {report} has the whole of it, and stays here"


def numbers_of(found: Any) -> dict[str, float]:
    """What a data party's function returned, which goes to NVFlare's server: a few named numbers.

    Raises:
        ProtocolError: It is anything else.
    """
    if found is None:
        return {}
    fits = isinstance(found, Mapping) and len(found) <= MOST_NUMBERS
    if not fits or not all(_is_named_number(name, value) for name, value in found.items()):
        raise ProtocolError(
            f"What a data party's function returns goes to NVFlare's server: a map of at most {MOST_NUMBERS} names to "
            f"finite numbers, or None. This one returned {_kind(found)}. Save everything else in site.folder."
        )
    return {name: float(value) for name, value in found.items()}


def _is_named_number(name: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and math.isfinite(value)
    return number and isinstance(name, str) and name.isidentifier() and len(name) <= 64


def _kind(found: Any) -> str:
    if isinstance(found, Mapping):
        kinds = sorted({type(value).__name__ for value in found.values()})
        return f"a map of {len(found)} to {', '.join(kinds)}"
    return f"a {type(found).__name__}"


def reason_of(reply: Any) -> str:
    """Why a site did not do its task, in one sentence."""
    if reply is None:
        return "it was lost"
    said = reply.get(REASON)
    return said if isinstance(said, str) else f"NVFlare reports {reply.get_return_code()}"
