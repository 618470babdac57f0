"""The data party's channel to a model party at another site, over the cells of an NVFlare job."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Any

from attrs import frozen
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import new_cell_message

from vflair_core import ByteChannel, ChannelError, ProtocolError, alternatives

CHANNEL, TOPIC = "vflair", "message"  # of NVFlare's cells
TIMEOUT = 300.0  # seconds for one reply
ATTEMPT = 60.0  # seconds after which a message is sent once more; it is carried out once
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds between attempts

LOST = {  # what may be over the next moment
    ReturnCode.TIMEOUT: "it did not answer in time",
    ReturnCode.COMM_ERROR: "the way to it is interrupted",
    ReturnCode.TARGET_UNREACHABLE: "NVFlare has no way to it now",
    ReturnCode.SERVICE_UNAVAILABLE: "it is not ready",
}


@frozen
class Job:
    """What a data party's channel needs of the job that it runs in."""

    cell: Any
    model_sites: dict[str, str]  # the cell of each, by the name of its site
    abort: Any  # NVFlare's signal
    encrypt: bool
    timeout: float


CURRENT: contextvars.ContextVar[Job | None] = contextvars.ContextVar("vflair_job", default=None)


class SiteChannel(ByteChannel):
    """Messages as frames of vflair's codec, each one request of NVFlare's cells. Made by the job; threads take turns.

    A message whose fate is not known is sent again, the same one, until `timeout` has passed since the request began or
    the job is over: the model party carries it out once.

    Args:
        job: In which it lasts.
        site: Of the model party.
        wire_dtype: What hidden states and their gradients are rounded to, as the job says for all sites.
    """

    lasting = True

    def __init__(self, job: Job, site: str, **options: Any) -> None:
        super().__init__(**options)
        self.site, self._job, self._cell_name = site, job, job.model_sites[site]
        self.timeout = self.patience = job.timeout
        self._lock = threading.RLock()
        self._closed = False

    def carry(self, frame: bytes) -> bytes:
        with self._lock:
            until, pause, attempts = time.monotonic() + self.timeout, FIRST_PAUSE, 0
            while True:
                if self._closed:
                    raise self._error("the channel was closed")
                reply = self._attempt(frame, until)
                attempts += 1
                code = reply.get_header(MessageHeaderKey.RETURN_CODE, ReturnCode.OK)
                if self._job.abort.triggered:
                    raise self._error("the job was stopped")
                if code == ReturnCode.OK:
                    return _bytes(reply.payload)
                why = LOST.get(code)
                if why is None:
                    raise self._error(f"NVFlare reports {code!r}")
                if time.monotonic() + pause > until:
                    raise self._error(
                        f"{why}. Attempts within {self.timeout:g} seconds (timeout): {attempts}"
                    )
                time.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)

    def close(self) -> None:
        """Send nothing more. The session is not ended."""
        self._closed = True

    def _attempt(self, frame: bytes, until: float) -> Any:
        return self._job.cell.send_request(
            channel=CHANNEL,
            target=self._cell_name,
            topic=TOPIC,
            request=new_cell_message({}, frame),
            timeout=min(ATTEMPT, max(until - time.monotonic(), 0.001)),
            secure=self._job.encrypt,
            optional=True,
            abort_signal=_Until(self._job.abort, until),
        )

    def _error(self, reason: str) -> ChannelError:
        return ChannelError(f"The model party at site {self.site!r} cannot be reached: {reason}.")


@frozen
class _Until:
    """NVFlare's signal, and a deadline: NVFlare's own timeout counts anew for sending, waiting and receiving."""

    abort: Any
    until: float

    @property
    def triggered(self) -> bool:
        return self.abort.triggered or time.monotonic() > self.until


def _bytes(payload: Any) -> bytes:
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise ProtocolError(f"A reply must be bytes, not a {type(payload).__name__}.")
    return bytes(payload)


def job_of(
    context: Any,
    abort: Any,
    model_site: str,
    *,
    encrypt: bool,
    timeout: float,
    cells: dict[str, str],
) -> Job:
    """What channels of this data party need, with a look at whether messages can be encrypted.

    Raises:
        ChannelError: They are to be, and this site has no certificate for it.
    """
    cell = context.get_engine().get_cell()
    if encrypt and not cell.core_cell.supports_secure_messages():
        raise ChannelError(
            "Messages are to be encrypted from site to site, and this site has no certificates: NVFlare's simulator has "
            "none. Use a provisioned project or POC mode, or say split_job(..., encrypt=False), with which NVFlare's "
            "server can read the hidden states that it passes on."
        )
    return Job(cell, {model_site: cells[model_site]}, abort, encrypt, timeout)


def cells_of(context: Any, clients: Any) -> dict[str, str]:
    """The cell of this job at each site."""
    return {c.name: FQCN.join([c.get_fqcn(), context.get_job_id()]) for c in clients}


def open_in_job(url: str, wire_dtype: Any) -> SiteChannel:
    """Open ``nvflare://SITE`` in the job whose data party calls.

    Raises:
        ProtocolError: There is no such model party, or this runs in no job.
    """
    job, site = CURRENT.get(), url.removeprefix("nvflare://").rstrip("/")
    if job is None:
        raise ProtocolError(
            f"{url!r} is a way between sites of an NVFlare job, and this runs in none. Make a job with "
            "vflair_nvflare.split_job, and open it in the function that it names."
        )
    if site not in job.model_sites:
        raise ProtocolError(
            f"This job has no model party at site {site!r}.{alternatives(site, job.model_sites)}"
        )
    return SiteChannel(job, site, wire_dtype=wire_dtype)
