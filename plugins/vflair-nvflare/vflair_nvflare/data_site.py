"""A data party at a site of NVFlare: its function does the work, and only a few numbers go to NVFlare's server."""

from __future__ import annotations

from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from vflair_nvflare.site import Site, function_of, site_of
from vflair_nvflare.site_channel import CURRENT, TIMEOUT, SiteChannel, job_of
from vflair_nvflare.tasks import CELLS, SITE, WORK, answered, failed, numbers_of, reported


class DataSite(Executor):  # type: ignore[misc]  # NVFlare's class has no types
    """Runs a data party of a job. Made by `split_job`.

    Args:
        function: ``module:function`` at this site, which takes a `Site` and the channel to the model party.
        options: For the function.
        encrypt: Encrypt each message from this site to the model party's, so that NVFlare's server cannot read it.
        wire_dtype: What hidden states are rounded to.
        timeout: Seconds for one reply of the model party.
    """

    def __init__(
        self,
        function: str,
        options: dict[str, Any] | None = None,
        encrypt: bool = True,  # noqa: FBT001, FBT002 - NVFlare gives it by name
        wire_dtype: str = "float32",
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.encrypt, self.wire_dtype, self.timeout = encrypt, wire_dtype, timeout

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: Any, abort_signal: Any
    ) -> Shareable:
        """Do this party's work when NVFlare's server says so."""
        if task_name != WORK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        site = site_of(fl_ctx, self.options)
        try:
            return answered(numbers_of(self._work(site, shareable, fl_ctx, abort_signal)))
        except Exception as error:  # noqa: BLE001 - whatever the function raises ends this party's work
            self.log_error(fl_ctx, reported(error, site, task_name))
            return failed(error)

    def _work(self, site: Site, task: Shareable, context: Any, abort: Any) -> Any:
        model_site = task[SITE]
        job = job_of(
            context,
            abort,
            model_site,
            encrypt=self.encrypt,
            timeout=self.timeout,
            cells=task[CELLS],
        )
        function = function_of(self.function)
        token = CURRENT.set(job)
        channel = SiteChannel(job, model_site, wire_dtype=self.wire_dtype)
        try:
            return function(site, channel)
        finally:
            CURRENT.reset(token)
            channel.close()
