"""Whole vLLM engines on a GPU: the tiny model on the compiled kernel, beside vLLM's own FLASHMLA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine import GREEDY, IN_ONE_PROCESS, Run, run_engine
from gpu_engine import BESIDE, GAP, GRAPHS, ON_RAY, OTHERS, OURS
from mla_backend import has_compiled_kernels
from tiny import gaps_of, greedy, logprobs_of, mean_difference, tokenized

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_kernels() and importlib.util.find_spec("vllm")),
    reason="needs a Hopper GPU, the compiled kernels and vLLM",
)

SHORT, LONG = 200, 1500  # characters of the prompts
MIXED = 64  # requests

FLASHMLA = {"attention_config": {"backend": "FLASHMLA"}}
EAGER = {"enforce_eager": True}
FP8 = {"kv_cache_dtype": "fp8"}
DECODE_WAY = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_prefix_caching": False}  # in prefills too


def mixed_prompts() -> list[list[int]]:
    """Return prompts of 10 to 3,000 tokens."""
    long = [token for prompt in tokenized(2400) for token in prompt]
    return [long[7 * i : 7 * i + 10 + 46 * i] for i in range(MIXED)]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[Run]]]:
    short, long, mixed = tokenized(SHORT), tokenized(LONG), mixed_prompts()
    score, few = {"max_tokens": 1, "prompt_logprobs": 0}, {**GREEDY, "max_tokens": 8}
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False}
    with ThreadPoolExecutor(11) as pool:

        def start(
            prompts: list[list[int]], sampling: dict[str, Any], env: dict[str, str | None], **llm: Any
        ) -> Future[Run]:
            return pool.submit(run_engine, prompts, sampling, env=env, **BESIDE, **llm)

        yield {
            "ray": start(short, GREEDY, ON_RAY, distributed_executor_backend="ray", **GRAPHS),
            "graphs": start(short, GREEDY, {**OURS, **IN_ONE_PROCESS}, **GRAPHS),
            "graphs, FLASHMLA": start(short, GREEDY, {**OTHERS, **IN_ONE_PROCESS}, **GRAPHS, **FLASHMLA),
            "eager": start(short, GREEDY, {**OURS, **IN_ONE_PROCESS}, **EAGER),
            "scores": start(long, score, OURS, **EAGER, **DECODE_WAY),
            "scores, FLASHMLA": start(long, score, OTHERS, **EAGER, **DECODE_WAY, **FLASHMLA),
            "fp8": start(short, GREEDY, {**OURS, **IN_ONE_PROCESS}, **GRAPHS, **FP8),
            "fp8, scores": start(long, score, OURS, **EAGER, **DECODE_WAY, **FP8),
            "fp8, scores, FLASHMLA": start(long, score, OTHERS, **EAGER, **DECODE_WAY, **FP8, **FLASHMLA),
            "mixed": start(mixed, few, OURS, max_num_batched_tokens=512, **GRAPHS),
            "mixed, one by one": start(mixed, few, OURS, **GRAPHS, **alone),
        }


@pytest.fixture(scope="module")
def expected(runs: dict[str, Future[Run]]) -> list[list[int]]:
    """What transformers generates in fp32, computed while the engines run."""
    return greedy(tokenized(SHORT), GREEDY["max_tokens"])


def agreement(run: Run, expected: list[list[int]]) -> float:
    """Return how many of 64 tokens are the expected ones, on average over the prompts."""
    pairs = zip(expected, run.tokens, strict=True)
    return sum(a == b for wanted, tokens in pairs for a, b in zip(wanted, tokens, strict=True)) / len(run.tokens)


def test_tokens_are_those_of_transformers(
    runs: dict[str, Future[Run]], expected: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    # After one choice between two that are almost equally likely, a text as a whole is another one. So each token is
    # judged after the text that it continues; how many are the same without that is only printed.
    both = {name: runs[name].result() for name in ("graphs", "graphs, FLASHMLA")}
    gaps = {name: gaps_of(tokenized(SHORT), run.tokens) for name, run in both.items()}
    likeliest = {name: (of_run == 0).sum(1).float().mean().item() for name, of_run in gaps.items()}
    with capsys.disabled():
        for name, run in both.items():
            print(f"\n{name}: of 64 tokens {likeliest[name]:.1f} are the likeliest in fp32, ", end="")
            print(
                f"all are within {gaps[name].max():.3f} of it, {agreement(run, expected):.1f} are in transformers' text"
            )
    assert likeliest["graphs"] >= 60
    assert gaps["graphs"].max() < GAP


def test_the_log_names_the_kernel(runs: dict[str, Future[Run]]) -> None:
    log = runs["graphs"].result().log
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in log


def test_graphs_change_no_token(runs: dict[str, Future[Run]]) -> None:
    assert runs["eager"].result().tokens == runs["graphs"].result().tokens


def test_logprobs_are_as_close_as_with_flashmla(
    runs: dict[str, Future[Run]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = logprobs_of(tokenized(LONG), torch.float32)
    ours, theirs = (
        mean_difference(runs[name].result().prompt_logprobs, expected) for name in ("scores", "scores, FLASHMLA")
    )
    with capsys.disabled():
        print(f"\nmean |log-probability - transformers' in fp32|: HOPPER_MLA {ours:.5f}, FLASHMLA {theirs:.5f}")
    assert ours < 1.2 * theirs


def test_a_quantised_cache(runs: dict[str, Future[Run]], capsys: pytest.CaptureFixture[str]) -> None:
    """What arithmetic adds to the rounding of a cache to float8, in text and in scores, beside FLASHMLA.

    Latents that differ by bf16's rounding are rounded to other float8 numbers, so no single token says much: one that
    the model over such a cache finds less likely by 0.4, or once by 1, is common. Means are steady.
    """
    gaps = gaps_of(tokenized(SHORT), runs["fp8"].result().tokens, float8=True)
    likeliest = (gaps == 0).sum(1).float().mean().item()
    plain, expected = (logprobs_of(tokenized(LONG), torch.float32, float8=float8) for float8 in (False, True))
    ours, theirs = (
        mean_difference(runs[name].result().prompt_logprobs, expected)
        for name in ("fp8, scores", "fp8, scores, FLASHMLA")
    )
    rounding = mean_difference(plain, expected)
    with capsys.disabled():
        print(f"\nfp8: of 64 tokens {likeliest:.1f} are the likeliest in fp32 over such a cache; ", end="")
        print("mean |log-probability - transformers' in fp32 over such a cache|: ", end="")
        print(f"HOPPER_MLA {ours:.5f}, FLASHMLA {theirs:.5f}, transformers' without one {rounding:.5f}")
    assert likeliest >= 62  # a cache that is read 20 % too large makes 60.8
    assert ours < theirs
    assert ours < rounding  # bf16 makes four fifths of it, a cache that is read 5 % too large half as much again


def test_mixed_batch_with_chunked_prefill_and_prefix_caching(runs: dict[str, Future[Run]]) -> None:
    """64 requests of 10 to 3,000 tokens in one engine, against each by itself."""
    together, alone = runs["mixed"].result(), runs["mixed, one by one"].result()
    assert all(len(tokens) == 8 for tokens in together.tokens)
    same = sum(a == b for t, u in zip(together.tokens, alone.tokens, strict=True) for a, b in zip(t, u, strict=True))
    assert same >= 0.9 * MIXED * 8, f"{same} of {MIXED * 8} tokens"  # rounding in bf16 differs with the batch


def test_ray_executor(runs: dict[str, Future[Run]]) -> None:
    pytest.importorskip("ray")
    run = runs["ray"].result()
    assert "Using HOPPER_MLA attention backend" in run.log
    assert gaps_of(tokenized(SHORT), run.tokens).max() < GAP
