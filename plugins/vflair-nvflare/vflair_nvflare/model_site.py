"""The model party at a site of NVFlare: it answers the data sites of its job, and keeps its half there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
from attrs import define
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import new_cell_message

from vflair_core import Message, ModelParty, ProtocolError, SessionLostError, answer
from vflair_nvflare.site import Site, function_of, site_of
from vflair_nvflare.site_channel import CHANNEL, TOPIC
from vflair_nvflare.tasks import CELLS, FINISH, GONE, SERVE, SITE, answered, failed, reported

THREADS = 32  # that answer at a time; one model party answers one message after the other
ASKED = re.compile(r"[0-9A-Za-z_-]{1,64}")  # names under which a data party asks for a session


@define(eq=False)
class Desk:
    """Answers frames of data sites, each of which has sessions of its own.

    Args:
        party: The model party.
        sites: Name of the site of each cell that may ask.
        encrypted: Refuse what came unencrypted.
        wire_dtype: What hidden states are rounded to.
    """

    party: ModelParty
    sites: Mapping[str, str]
    encrypted: bool
    wire_dtype: Any

    def answer(self, cell: str, frame: Any, *, encrypted: bool) -> bytes:
        """Answer one frame that came from `cell`."""
        site = self.sites.get(cell)

        def handle(message: Message) -> Message:
            if site is None:
                raise ProtocolError(f"Cell {cell[:80]!r} belongs to no data site of this job.")
            if self.encrypted and not encrypted:
                raise ProtocolError(
                    "This message came unencrypted, and the model party takes only messages that are encrypted from site "
                    "to site. Give all sites the same job."
                )
            return self.party.handle(self._in_own_session(site, message))

        whole = bytes(frame) if isinstance(frame, bytes | bytearray | memoryview) else b""
        return answer(handle, whole, wire_dtype=self.wire_dtype)

    def lose(self, site: str) -> int:
        """Forget the sessions of a site that is gone, so that nobody waits for it; return how many there were."""
        lost = [name for name in list(self.party.sessions) if _owner(name) == site]
        for name in lost:
            self.party.drop(name)
        return len(lost)

    def _in_own_session(self, site: str, message: Message) -> Message:
        if _owner(message.session) == site:
            return message
        if message.kind != "open":
            raise SessionLostError(
                f"Site {site!r} has no session {message.session[:12]!r}… here: it was opened by another site, or "
                "elsewhere. Open a new one, or resume."
            )
        if not ASKED.fullmatch(message.session):
            raise ProtocolError(
                "A session is asked for by 1 to 64 letters, digits, hyphens and underscores."
            )
        return attrs.evolve(message, session=f"{site}.{message.session}")


def _owner(session: str) -> str:
    """The site whose session this is: a name of its own, a full stop, and the name that it asked for."""
    site, _, asked = session.rpartition(".")
    return site if ASKED.fullmatch(asked) else ""


class ModelSite(Executor):  # type: ignore[misc]  # NVFlare's class has no types
    """Runs the model party of a job. Made by `split_job`.

    Args:
        function: ``module:function`` at this site, which takes a `Site` and returns the model party.
        options: For the function.
        encrypt: Refuse messages that are not encrypted from site to site.
        wire_dtype: What hidden states are rounded to.
    """

    def __init__(
        self,
        function: str,
        options: dict[str, Any] | None = None,
        encrypt: bool = True,  # noqa: FBT001, FBT002 - NVFlare gives it by name
        wire_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.encrypt, self.wire_dtype = encrypt, wire_dtype
        self._desk: Desk | None = None
        self._site: Site | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="vflair model party")

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: Any, abort_signal: Any
    ) -> Shareable:
        """Do what NVFlare's server asks: serve from now on, forget a site that is lost, or save this half."""
        try:
            if task_name == SERVE:
                return self._serve(shareable, fl_ctx)
            if task_name == GONE:
                return self._lose(shareable[SITE], fl_ctx)
            if task_name == FINISH:
                return self._finish()
        except Exception as error:  # noqa: BLE001 - whatever the function raises ends this party's work
            self.log_error(fl_ctx, reported(error, self._site, task_name))
            return failed(error)
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Stop answering when the job is over, whatever ended it."""
        if event_type == EventType.END_RUN:
            self._desk = None
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _serve(self, task: Shareable, context: Any) -> Shareable:
        self._site = site_of(context, self.options)
        party = function_of(self.function)(self._site)
        if not callable(getattr(party, "handle", None)):
            raise ProtocolError(
                f"{self.function!r} must return a model party, not a {type(party).__name__}."
            )
        cell = context.get_engine().get_cell()
        sites = {name: site for site, name in task[CELLS].items() if site != self._site.name}
        self._desk = Desk(party, sites, self.encrypt, self.wire_dtype)
        cell.register_request_cb(channel=CHANNEL, topic=TOPIC, cb=self._asked)
        weights = sum(weight.numel() for weight in party.parameters())
        return answered({"weights": weights})

    def _asked(self, request: Any) -> Any:
        """Answer in a thread of our own: those that NVFlare calls from also carry what comes in."""
        if self._desk is None:
            return _reply(b"", code="service_unavailable")
        origin = str(request.get_header(MessageHeaderKey.ORIGIN))
        encrypted = bool(request.get_header(MessageHeaderKey.SECURE, False))
        desk, frame = self._desk, request.payload

        def work() -> Any:
            return _reply(desk.answer(origin, frame, encrypted=encrypted))

        try:
            return self._threads.submit(work)
        except RuntimeError:  # the job is over
            return _reply(b"", code="service_unavailable")

    def _lose(self, site: str, context: Any) -> Shareable:
        """Forget a site that is gone: the model party may wait for its gradients, and others for them."""
        if self._desk is not None:
            lost = self._desk.lose(site)
            self.log_warning(context, f"site {site} is lost: {lost} sessions of it were dropped")
        return answered({})

    def _finish(self) -> Shareable:
        if self._desk is None or self._site is None:
            raise ProtocolError("The model party of this job was never started.")
        self._desk.party.save(self._site.folder)
        return answered({})


def _reply(payload: bytes, *, code: str = "ok") -> Any:
    return new_cell_message({MessageHeaderKey.RETURN_CODE: code}, payload)
