"""What an administrator of an NVFlare project does in tests, in a process of its own, where warnings are no errors.

``nvflare_admin.py KIT wait SITES`` waits until so many sites are there; ``nvflare_admin.py KIT run JOB SECONDS`` runs a job to
its end and prints as JSON its number, its status, and where its result was downloaded.
"""

from __future__ import annotations

import json
import sys
import time

from nvflare.fuel.flare_api.flare_api import new_secure_session


def connected(kit):
    until = time.monotonic() + 120
    while True:
        try:
            return new_secure_session("admin@nvidia.com", kit, timeout=5)
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def main(kit, verb, *arguments):
    session = connected(kit)
    try:
        if verb == "wait":
            until = time.monotonic() + 120
            while len(session.get_system_info().client_info) < int(arguments[0]):
                if time.monotonic() > until:
                    raise TimeoutError("the sites did not come")
                time.sleep(0.2)
            return
        job, seconds = arguments
        number = session.submit_job(job)
        session.monitor_job(number, timeout=float(seconds))
        status = session.get_job_meta(number).get("status", "")
        found = {"number": number, "status": status, "result": session.download_job_result(number)}
        sys.stdout.write("\n" + json.dumps(found) + "\n")
    finally:
        session.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
