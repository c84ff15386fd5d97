"""Run `vllm serve` on the tiny model in processes of its own, and talk to it over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from openai import OpenAI

from engine import CACHE_BYTES, MODEL, environment

START_SECONDS = 300


class Server:
    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        self.log, self.process = log, process

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.5)
        raise RuntimeError(self.log.read_text())

    def metric(self, name: str, label: str = "") -> float:
        """Return the sum of a metric's values, or of those with `label`, as in 'engine="0"'."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE))

    def wait_until_idle(self) -> None:
        for _ in range(100):
            if self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0:
                return
            time.sleep(0.1)
        raise AssertionError("requests are still running 10 s after the last one ended")


@contextlib.contextmanager
def serving(*options: str, log: Path, env: dict[str, str | None] | None = None) -> Iterator[Server]:
    """Start `vllm serve` with our backend, chosen by variable, wait until it answers, and stop it afterwards.

    Args:
        options: of `vllm serve`, beside the model, its cache and where to listen.
        log: a file for all that the server's processes print.
        env: more variables; None unsets.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert vllm is not None, "no command `vllm` beside Python or on PATH"
    command = [vllm, "serve", MODEL, "--kv-cache-memory-bytes", str(CACHE_BYTES), *where, *options]
    with log.open("wb") as stream:
        merged = environment(**{"VLLM_ATTENTION_BACKEND": "HOPPER_MLA", **(env or {})})
        process = subprocess.Popen(command, env=merged, stdout=stream, stderr=subprocess.STDOUT)
    try:
        server = Server(port, log, process)
        server.wait()
        yield server
    finally:
        process.terminate()
        process.wait(60)
