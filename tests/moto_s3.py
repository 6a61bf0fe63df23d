"""An S3 in this process (moto's server), and the environment that leads to it, for tests of stores at a URL."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class Server:
    """moto's server; it can go away, answer with errors, and come back, with all its objects."""

    def __init__(self) -> None:
        self.port = 0
        self._server: Any = None
        self.come_back()

    def come_back(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def go_away(self) -> None:
        """Nobody listens there any more."""
        self._server.stop()


@contextlib.contextmanager
def moto_s3() -> Iterator[Server]:
    """A server with the bucket s3://bucket; whoever starts while the block runs, processes included, finds it."""
    import s3fs
    from moto.s3.responses import S3Response

    alone, put = threading.Lock(), S3Response._key_response_put

    def one_at_a_time(*args: Any) -> Any:  # S3 looks and writes in one step; moto's threads do not
        with alone:
            return put(*args)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setattr(S3Response, "_key_response_put", one_at_a_time)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)  # moto's objects live as long as its process
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
    server.go_away()
