"""Split learning between the sites of an NVFlare project: ``nvflare://SITE`` is the channel to the model party there.

NVFlare brings identities, certificates, the way between the sites, and jobs; vflair brings what is computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vflair_core import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vflair_core import Channel
    from vflair_nvflare.job import split_job as split_job
    from vflair_nvflare.site import Site as Site
    from vflair_nvflare.site_channel import SiteChannel as SiteChannel

_HOMES = {"split_job": "job", "Site": "site", "SiteChannel": "site_channel"}

__all__ = ["Site", "SiteChannel", "split_job", "vflair_open_channel"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vflair_nvflare' has no attribute {name!r}")
    return getattr(import_module(f"vflair_nvflare.{_HOMES[name]}"), name)


@hookimpl
def vflair_open_channel(url: str, options: Mapping[str, Any]) -> Channel | None:
    """Open ``nvflare://SITE`` within a job of NVFlare; pass on every other URL."""
    if not url.startswith("nvflare:"):
        return None
    from vflair_nvflare.site_channel import open_in_job

    return open_in_job(url, options["wire_dtype"])
