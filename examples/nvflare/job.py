"""A job of split learning for NVFlare: one model party, two data parties.

``job.py simulate FOLDER`` runs it in NVFlare's simulator; ``job.py export FOLDER`` writes it for ``nvflare job submit``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vflair_nvflare import split_job

CODE = [Path(__file__).with_name("parties.py")]

if __name__ == "__main__":
    verb, folder = sys.argv[1:]
    job = split_job(
        "smollm2",
        model={"model": "parties:model_party"},
        data={"alice": "parties:data_party", "bob": "parties:data_party"},
        model_code=CODE,
        data_code=CODE,
        encrypt=verb != "simulate",  # the simulator has no certificates
    )
    if verb == "simulate":
        sys.exit(job.simulator_run(folder))
    job.export_job(folder)
