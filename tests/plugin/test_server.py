"""`vllm serve` with the environment variable and nothing else of ours in the command."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from engine import MODEL, run_engine
from prompts import demonstration_prompts
from server import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    lengths = ["--max-model-len", "1024", "--max-num-batched-tokens", "256"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving("--dtype", "float32", "--enforce-eager", *lengths, log=log) as server:
        yield server


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
