"""Whole vLLM engines on a GPU: the tiny model on the compiled kernel, beside vLLM's own FLASHMLA."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from engine import Run, run_engine
from mla_backend import has_compiled_kernels
from tiny import greedy, mean_difference, tokenized

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_kernels() and importlib.util.find_spec("vllm")),
    reason="needs a Hopper GPU, the compiled kernels and vLLM",
)

GREEDY = {"max_tokens": 64, "ignore_eos": True, "detokenize": False}
OURS = {"VLLM_ATTENTION_BACKEND": "HOPPER_MLA"}
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}


def agreement(run: Run) -> float:
    """Return how many of 64 tokens are transformers' in fp32, on average over the prompts."""
    pairs = zip(greedy(tokenized(200), 64), run.tokens, strict=True)
    return sum(a == b for expected, tokens in pairs for a, b in zip(expected, tokens, strict=True)) / len(run.tokens)


def generate(env: dict[str, Any], **llm: Any) -> Run:
    return run_engine(tokenized(200), GREEDY, env=env, dtype="bfloat16", max_model_len=4096, **llm)


@pytest.fixture(scope="module")
def with_graphs() -> Run:
    return generate(OURS, **GRAPHS)


def test_the_log_names_the_kernel(with_graphs: Run) -> None:
    assert "Using HOPPER_MLA attention backend: mla_decode by compiled kernel for sm_90a." in with_graphs.log


def test_tokens_are_those_of_transformers(with_graphs: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ours = agreement(with_graphs)
    theirs = agreement(generate({}, **GRAPHS, attention_config={"backend": "FLASHMLA"}))
    with capsys.disabled():
        print(f"\ntokens of 64 as transformers in fp32: HOPPER_MLA {ours:.1f}, FLASHMLA {theirs:.1f}")
    assert ours >= theirs - 4


def test_graphs_change_no_token(with_graphs: Run) -> None:
    assert generate(OURS).tokens == with_graphs.tokens


def test_logprobs_are_as_close_as_with_flashmla(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tokenized(1500)
    ask = {"max_tokens": 1, "prompt_logprobs": 0}
    steps = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_prefix_caching": False}  # all the decode way
    differences = {}
    for name in ("HOPPER_MLA", "FLASHMLA"):
        env = OURS if name == "HOPPER_MLA" else {}
        other = {} if name == "HOPPER_MLA" else {"attention_config": {"backend": name}}
        run = run_engine(prompts, ask, env=env, dtype="bfloat16", **steps, **other)
        differences[name] = mean_difference(run, prompts, torch.float32)
    with capsys.disabled():
        print(f"\nmean |log-probability - transformers' in fp32|: {differences}")
    assert differences["HOPPER_MLA"] < 1.2 * differences["FLASHMLA"]


def test_mixed_batch_with_chunked_prefill_and_prefix_caching() -> None:
    """64 requests of 10 to 3,000 tokens in one engine, against each by itself."""
    long = [token for prompt in tokenized(2400) for token in prompt]
    prompts = [long[7 * i : 7 * i + 10 + 46 * i] for i in range(64)]
    ask = {**GREEDY, "max_tokens": 8}
    settings = {"dtype": "bfloat16", "max_model_len": 4096, "env": OURS, **GRAPHS}
    together = run_engine(prompts, ask, **settings, max_num_batched_tokens=512)
    assert all(len(tokens) == 8 for tokens in together.tokens)
    alone = run_engine(prompts, ask, **settings, max_num_seqs=1, enable_prefix_caching=False)
    same = sum(a == b for t, u in zip(together.tokens, alone.tokens, strict=True) for a, b in zip(t, u, strict=True))
    assert same >= 0.9 * 64 * 8, f"{same} of {64 * 8} tokens"  # rounding in bf16 differs with the batch


def test_ray_executor(with_graphs: Run) -> None:
    pytest.importorskip("ray")
    run = generate({**OURS, "RAY_DEDUP_LOGS": "0"}, distributed_executor_backend="ray", **GRAPHS)
    assert "Using HOPPER_MLA attention backend" in run.log
    assert agreement(run) >= agreement(with_graphs) - 4  # steps are put together differently, and bf16 rounds with them
