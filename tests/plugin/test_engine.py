"""Whole vLLM engines on the tiny model, against transformers and against each other."""

from __future__ import annotations

import os

import pytest
import torch

from engine import GREEDY, IN_ONE_PROCESS, ONLY_OURS, Run, run_engine
from tiny import gaps_of, greedy, logprobs_of, mean_difference, tokenized

BY_VARIABLE = {"VLLM_ATTENTION_BACKEND": "HOPPER_MLA"}
# In log-probability. Two tokens that are as likely but for fp32's rounding, which differs between processors, are both
# right: 1e-5 was seen. A softmax scale that is 1 % off makes 0.02.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def roomy() -> Run:
    """The 8 short prompts with all the cache they need, whole prefills and no prefix caching, in fp32."""
    return run_engine(
        tokenized(200),
        GREEDY,
        env={**BY_VARIABLE, **IN_ONE_PROCESS},
        dtype="float32",
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
    )


def test_greedy_tokens_are_those_that_transformers_finds_likeliest(roomy: Run) -> None:
    assert [len(tokens) for tokens in roomy.tokens] == [64] * 8
    assert gaps_of(tokenized(200), roomy.tokens).max() < ROUNDING


def test_the_log_names_the_backend_and_what_computes_it(roomy: Run) -> None:
    assert "Using HOPPER_MLA attention backend: mla_decode by PyTorch reference on cpu." in roomy.log
    assert "Using CPU_MLA" not in roomy.log
    assert "Using AMX_MLA" not in roomy.log
    assert roomy.preemptions == roomy.prefix_hits == 0


def test_preemption_prefix_caching_and_chunked_prefill_change_no_token(roomy: Run) -> None:
    """Each prompt twice in a row, so that the second finds the prefix of the first, in a cache for about three."""
    block, prompts = 32, tokenized(200)
    longest = max(len(prompt) for prompt in prompts) + 64
    tight = run_engine(
        [prompt for prompt in prompts for _ in range(2)],
        GREEDY,
        dtype="float32",
        attention_config={"backend": "HOPPER_MLA"},
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=block,
        max_model_len=longest,
        max_num_batched_tokens=48,
        max_num_seqs=8,
        num_gpu_blocks_override=3 * -(-longest // block) + 1,
    )
    assert tight.preemptions > 0
    assert tight.prefix_hits > 0
    assert "HOPPER_MLA keeps prefix caching (True) and chunked prefill (True)" in tight.log
    assert tight.tokens == [tokens for tokens in roomy.tokens for _ in range(2)]


def test_long_prompts() -> None:
    """Over the length up to which prefills go the decode way: vLLM's prefill, with context from the cache."""
    prompts = tokenized(2400)[:4]
    assert min(len(prompt) for prompt in prompts) > 400
    for tokens_per_step in (200, 2048):
        run = run_engine(
            prompts,
            {**GREEDY, "max_tokens": 16},
            env={**BY_VARIABLE, **IN_ONE_PROCESS},
            dtype="float32",
            max_num_batched_tokens=tokens_per_step,
            max_num_seqs=4,
        )
        assert run.tokens == greedy(prompts, 16)


def test_speculative_queries_of_mixed_lengths(roomy: Run) -> None:
    """Tokens guessed from the prompt make queries of 1 to 4 tokens in one batch; the answer is the same."""
    speculative = run_engine(
        tokenized(200),
        GREEDY,
        env=BY_VARIABLE,
        dtype="float32",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    assert speculative.accepted > 0
    assert speculative.tokens == roomy.tokens


def test_tensor_parallel() -> None:
    """Two workers with half of the heads each, on a processor each, where vLLM by itself wants a NUMA node for each."""
    processors = sorted(os.sched_getaffinity(0))[:2]
    if len(processors) < 2:
        pytest.skip("needs two processors")
    divided = run_engine(
        tokenized(200),
        GREEDY,
        env={**BY_VARIABLE, "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, processors))},
        dtype="float32",
        tensor_parallel_size=2,
    )
    assert divided.backends == [ONLY_OURS] * 2
    assert [len(tokens) for tokens in divided.tokens] == [64] * 8
    assert gaps_of(tokenized(200), divided.tokens).max() < ROUNDING


def test_teacher_forced_logprobs_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tokenized(1500)
    assert min(len(prompt) for prompt in prompts) >= 300
    settings = {"dtype": "bfloat16", "enable_prefix_caching": False}
    ask = {"max_tokens": 1, "prompt_logprobs": 0}
    # Steps of at most 64 tokens: all of them go the decode way, so that mla_decode computes every attention.
    ours = run_engine(prompts, ask, env=BY_VARIABLE, **settings, max_num_batched_tokens=64, max_num_seqs=8)
    # vLLM's own backend only computes the same model with the rotary kernel avoided that HOPPER_MLA avoids by itself.
    vllms = run_engine(prompts, ask, **settings, compilation_config={"custom_ops": ["-rotary_embedding"]})
    assert "Using HOPPER_MLA attention backend" in ours.log
    assert "HOPPER_MLA attention backend" not in vllms.log
    expected = logprobs_of(prompts, torch.bfloat16)
    difference, vllms_difference = (mean_difference(run.prompt_logprobs, expected) for run in (ours, vllms))
    with capsys.disabled():
        print(f"\nmean |log-probability - transformers'|: ours {difference:.5f}, vLLM's {vllms_difference:.5f}")
    assert difference < 0.02
    assert difference < 1.5 * vllms_difference
