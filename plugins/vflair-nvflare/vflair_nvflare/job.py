"""A job of split learning for NVFlare, to be run in its simulator, in POC mode or in a provisioned project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.job_config.api import FedJob

from vflair_core import ProtocolError
from vflair_nvflare.data_site import DataSite
from vflair_nvflare.model_site import ModelSite
from vflair_nvflare.site_channel import TIMEOUT
from vflair_nvflare.workflow import SplitLearning


def split_job(
    name: str,
    *,
    model: Mapping[str, str],
    data: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    model_code: Sequence[str | Path] = (),
    data_code: Sequence[str | Path] = (),
    encrypt: bool = True,
    wire_dtype: str = "float32",
    timeout: float = TIMEOUT,
    start_timeout: float = 600.0,
) -> FedJob:
    """Make a job: one model party at one site, data parties at others.

    Functions are named as ``module:function`` and looked for at their site: in what is installed there, or in the files
    that the job brings. The model party's takes a `Site` and returns a `ModelParty`; a data party's takes a `Site` and a
    channel, and returns a few named numbers, or None.

    Args:
        name: Of the job.
        model: The site of the model party, and its function.
        data: The site of each data party, and its function.
        options: For all functions (`Site.options`): plain values, which everybody in the project can read.
        model_code: Python files that the job brings to the model party's site. NVFlare calls that custom code: a site lets
            it in, or not.
        data_code: Python files that the job brings to the data parties' sites.
        encrypt: Encrypt messages from site to site, by the certificates of the project. Without it NVFlare's server can
            read hidden states; the simulator knows no other way.
        wire_dtype: What hidden states and their gradients are rounded to on their way.
        timeout: Seconds for one reply of the model party.
        start_timeout: Seconds for the model party to be ready, and to save its half.

    Raises:
        ProtocolError: The sites do not make a job.
    """
    if len(model) != 1 or not data or set(model) & set(data):
        raise ProtocolError(
            f"A job has one model party and at least one data party, each at a site of its own; these are {dict(model)} "
            f"and {dict(data)}."
        )
    (model_site, function), data_sites = next(iter(model.items())), list(data)
    job = FedJob(
        name=name,
        min_clients=2,  # while the model party and one data party are there, the job goes on
        mandatory_clients=[model_site],
        fail_fast=True,  # a process that ended is lost now, not after a minute
    )
    job.set_app_packages(["vflair_core", "vflair_nvflare"])
    job.to_server(SplitLearning(model_site, data_sites, start_timeout), id="vflair")
    common: dict[str, Any] = {"encrypt": encrypt, "wire_dtype": wire_dtype}
    given = dict(options or {})
    job.to(ModelSite(function, options=given, **common), model_site, tasks=["*"])
    for site, function in data.items():
        party = DataSite(function, options=given, timeout=timeout, **common)
        job.to(party, site, tasks=["*"])
    for site, files in [(model_site, model_code), *((site, data_code) for site in data)]:
        for file in files:
            job.add_file_to(str(file), site, app_folder_type="custom")
    return job
