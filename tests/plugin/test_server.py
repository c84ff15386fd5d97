"""`vllm serve` with the environment variable and nothing else of ours in the command."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from engine import CACHE_BYTES, MODEL, environment, run_engine
from prompts import demonstration_prompts

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

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE))

    def wait_until_idle(self) -> None:
        for _ in range(100):
            if self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0:
                return
            time.sleep(0.1)
        raise AssertionError("requests are still running 10 s after the last one ended")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    vllm = str(Path(sys.executable).with_name("vllm"))
    lengths = ["--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    cache = ["--kv-cache-memory-bytes", str(CACHE_BYTES)]
    command = [vllm, "serve", MODEL, "--dtype", "float32", "--enforce-eager", *lengths, *cache, *where]
    with log.open("wb") as stream:
        env = environment(VLLM_ATTENTION_BACKEND="HOPPER_MLA")
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        server = Server(port, log, process)
        server.wait()
        yield server
    finally:
        process.terminate()
        process.wait(60)


PROMPTS = [prompt for characters in (60, 200, 500, 1500) for prompt in demonstration_prompts(4, characters)]
MAX_TOKENS = [16 + 4 * i for i in range(16)]


@pytest.fixture(scope="module")
def offline() -> list[str]:
    """What `LLM.generate` makes of the prompts: text, up to the longest length asked for."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    run = run_engine(
        ids,
        {"max_tokens": max(MAX_TOKENS), "ignore_eos": True},
        env={"VLLM_ATTENTION_BACKEND": "HOPPER_MLA"},
        dtype="float32",
    )
    return [tokenizer.decode(tokens[:n]) for tokens, n in zip(run.tokens, MAX_TOKENS, strict=True)]


def ask(server: Server, i: int) -> str:
    completion = server.client.completions.create(
        model=MODEL, prompt=PROMPTS[i], max_tokens=MAX_TOKENS[i], temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == MAX_TOKENS[i]
    return completion.choices[0].text


def stream(server: Server, i: int, max_tokens: int) -> Iterator[str]:
    chunks = server.client.completions.create(
        model=MODEL,
        prompt=PROMPTS[i],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with chunks:
        for chunk in chunks:
            yield chunk.choices[0].text


def test_completion(server: Server, offline: list[str]) -> None:
    assert ask(server, 5) == offline[5]


def test_streamed_completion(server: Server, offline: list[str]) -> None:
    pieces = list(stream(server, 9, MAX_TOKENS[9]))
    assert len(pieces) > 5
    assert "".join(pieces) == offline[9]


def test_sixteen_concurrent_requests_of_mixed_lengths(server: Server, offline: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: ask(server, i), range(16)))
    assert answers == offline
    server.wait_until_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_a_cancelled_request_leaves_no_block_behind(server: Server, offline: list[str]) -> None:
    generated = server.metric("vllm:generation_tokens_total")
    pieces = stream(server, 0, 900)
    beginning = "".join(next(pieces) for _ in range(10))
    assert server.metric("vllm:num_requests_running") == 1
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    pieces.close()  # type: ignore[attr-defined]
    assert beginning
    assert offline[0].startswith(beginning[: len(offline[0])])

    server.wait_until_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert 10 <= server.metric("vllm:generation_tokens_total") - generated < 900
    assert ask(server, 0) == offline[0]


def test_the_log_names_the_backend(server: Server) -> None:
    log = server.log.read_text()
    assert "Using HOPPER_MLA attention backend" in log
    assert "VLLM_ATTENTION_BACKEND" not in log, "vLLM complains about the variable"
