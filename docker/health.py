"""Is this container's program well? Exit code 0 or 1; Docker asks every ten seconds (`docker compose ps` shows it).

    health.py       PIFT_ROLE says which program it is: mlflow, head or worker

MLflow is asked through its API, by the name that other containers use: its own /health says 200 even where the API
refuses every call. Ray's nodes are asked whether they are still part of the cluster.
"""

from __future__ import annotations

import base64
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 8.0
SECRETS = Path("/run/secrets")


def asked(role: str) -> urllib.request.Request | None:
    """What the program of a role must answer with 200; None for a role that serves nothing."""
    if role == "mlflow":
        address = "http://127.0.0.1:5000/api/2.0/mlflow/experiments/search?max_results=1"
        return urllib.request.Request(address, headers={"Host": "mlflow:5000"} | login())
    if role == "head":
        return urllib.request.Request("http://127.0.0.1:8265/api/gcs_healthz", headers=token())
    if role == "worker":
        return urllib.request.Request("http://127.0.0.1:52365/api/local_raylet_healthz", headers=token())
    return None


def token() -> dict[str, str]:
    return {"Authorization": f"Bearer {(SECRETS / 'ray_token').read_text().strip()}"}


def login() -> dict[str, str]:
    """What MLflow asks for in profile auth."""
    path = SECRETS / "mlflow_password"
    if "auth" not in os.environ.get("PIFT_PROFILES", "").split(","):
        return {}
    words = f"pift:{path.read_text().strip()}".encode()
    return {"Authorization": f"Basic {base64.b64encode(words).decode()}"}


def main() -> int:
    request = asked(os.environ.get("PIFT_ROLE", ""))
    if request is None:
        return 0
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            print(answer.status)
            return int(answer.status != 200)
    except (OSError, urllib.error.URLError) as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
