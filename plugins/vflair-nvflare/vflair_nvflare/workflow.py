"""What NVFlare's server does in a job of split learning: it starts the parties, hears how they fared, and ends them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from vflair_core import ProtocolError
from vflair_nvflare.site_channel import cells_of
from vflair_nvflare.tasks import ANSWER, CELLS, FINISH, GONE, SERVE, SITE, WORK, reason_of

LOOK = 0.5  # seconds between looks at whether all sites are there
TOLD = 60  # seconds for the model party to hear that a site is gone


class SplitLearning(Controller):  # type: ignore[misc]  # NVFlare's class has no types
    """Starts the model party, lets all data parties work at once, and has the model party save its half.

    It sees the names of the sites, the numbers that the data parties' functions return, and why a site failed. A data
    site whose function fails, or that is lost as a whole, is named in ``vflair.json``; the others go on, and the job ends
    as failed when they are done. Where the model party is lost, or the process of the job at any site dies, NVFlare stops
    the job for all.

    Args:
        model_site: The site of the model party.
        data_sites: The sites of the data parties.
        start_timeout: Seconds for the model party to be ready.
    """

    def __init__(
        self, model_site: str, data_sites: list[str], start_timeout: float = 600.0
    ) -> None:
        super().__init__()
        self.model_site, self.data_sites = model_site, data_sites
        self.start_timeout = start_timeout

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing is needed before."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing is kept."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Run the job."""
        try:
            cells = self._cells(fl_ctx)
            self._told(SERVE, {CELLS: cells}, int(self.start_timeout), fl_ctx, abort_signal)
            results = self._work(cells, fl_ctx, abort_signal)
            if not abort_signal.triggered:
                self._told(FINISH, {}, int(self.start_timeout), fl_ctx, abort_signal)
        except ProtocolError as error:
            self.system_panic(str(error), fl_ctx)
            return
        self._write(results, fl_ctx)
        if abort_signal.triggered:
            return  # whoever stopped the job has said why
        if bad := {site: r["failed"] for site, r in results.items() if "failed" in r}:
            words = "; ".join(f"{site}: {reason}" for site, reason in bad.items())
            self.system_panic(f"Data sites failed, the others are done. {words}", fl_ctx)

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Leave a result alone that came too late."""
        self.log_warning(fl_ctx, f"a result of {task_name} came late from {client.name}")

    def _cells(self, context: Any) -> dict[str, str]:
        clients = context.get_engine().get_clients()
        there = {client.name for client in clients}
        wanted = [self.model_site, *self.data_sites]
        if missing := [site for site in wanted if site not in there]:
            raise ProtocolError(
                f"Sites {', '.join(missing)} are not in this job. There are: {', '.join(sorted(there)) or 'none'}."
            )
        cells = cells_of(context, clients)
        return {site: cells[site] for site in wanted}

    def _told(
        self, name: str, data: Mapping[str, Any], timeout: int, context: Any, abort: Any
    ) -> None:
        """Have the model party do something, and wait until it is done."""
        replies: dict[str, Any] = {}
        task = self._task(name, data, replies, timeout)
        self.broadcast_and_wait(task, context, [self.model_site], 1, abort_signal=abort)
        reply = replies.get(self.model_site)
        if abort.triggered:
            return
        if reply is None or reply.get_return_code() != ReturnCode.OK:
            raise ProtocolError(
                f"The model party at site {self.model_site!r} did not do {name}: {reason_of(reply)}"
            )

    def _work(self, cells: Mapping[str, str], context: Any, abort: Any) -> dict[str, Any]:
        """Let the data parties work; of each, what it answered, or why not."""
        replies: dict[str, Any] = {}
        data = {CELLS: {self.model_site: cells[self.model_site]}, SITE: self.model_site}
        task = self._task(WORK, data, replies, 0)
        self.broadcast(task, context, list(self.data_sites), len(self.data_sites))
        gone: set[str] = set()
        while len(replies.keys() | gone) < len(self.data_sites) and not abort.triggered:
            for site in self.data_sites:
                if site not in replies and site not in gone and self._is_lost(site):
                    gone.add(site)
                    self.log_error(context, f"data site {site} is lost; the others go on")
                    self._told(GONE, {SITE: site}, TOLD, context, abort)
            time.sleep(LOOK)
        self.cancel_task(task, fl_ctx=context)
        stopped = abort.triggered
        return {
            site: _result(replies.get(site), stopped=stopped and site not in gone)
            for site in self.data_sites
        }

    def _is_lost(self, site: str) -> bool:
        return bool(self.get_client_disconnect_time(site))

    @staticmethod
    def _task(name: str, data: Mapping[str, Any], replies: dict[str, Any], timeout: int) -> Task:
        def received(client_task: Any, **_: Any) -> None:
            replies[client_task.client.name] = client_task.result

        return Task(name, Shareable(dict(data)), timeout=timeout, result_received_cb=received)

    def _write(self, results: Mapping[str, Any], context: Any) -> None:
        folder = Path(context.get_workspace().get_run_dir(context.get_job_id()))
        (folder / "vflair.json").write_text(json.dumps(results, indent=2) + "\n")


def _result(reply: Any, *, stopped: bool) -> dict[str, Any]:
    if reply is None and stopped:
        return {"failed": "the job was stopped before it was done"}
    if reply is None or reply.get_return_code() != ReturnCode.OK:
        return {"failed": reason_of(reply)}
    return {"numbers": reply[ANSWER]}
