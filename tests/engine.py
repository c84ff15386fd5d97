"""Run a vLLM engine in a process of its own and get back what it generated and what it logged.

A process of its own, because the environment decides what vLLM does from its import on, and because an engine's memory
and workers end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = str(Path(__file__).parents[1] / "examples" / "tiny_deepseek")
CACHE_BYTES = 100_000_000
GREEDY: dict[str, Any] = {"max_tokens": 64, "ignore_eos": True, "detokenize": False}
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the same requests in every step, however busy the machine is
ONLY_OURS = ["mla_backend.plugin.backend.HopperMLABackend"]
"""What `Run.backends` has of a worker with our backend in all layers."""


@dataclass
class Run:
    """What came out of an engine.

    Attributes:
        tokens: generated token ids per prompt.
        prompt_logprobs: log-probability of each prompt token after the first, per prompt, where asked for.
        preemptions: how often a request lost its cache and was computed again.
        prefix_hits: prompt tokens that prefix caching saved.
        accepted: guessed tokens that turned out right, with speculative decoding.
        backends: per worker, the attention backends of its layers, as paths of classes.
        log: everything that the engine's processes printed.
    """

    tokens: list[list[int]]
    prompt_logprobs: list[list[float]]
    preemptions: int
    prefix_hits: int
    accepted: int
    backends: list[list[str]]
    log: str


def environment(**changes: str | None) -> dict[str, str]:
    """Return this process's environment with VLLM_ATTENTION_BACKEND unset and `changes` made; None unsets.

    Without torch.compile, which vLLM uses for log-probabilities even where it is to be eager: that would need a C++
    compiler, and fails on the CPU in a folder whose path has a space. And workers run functions that are sent to them.
    """
    fixed = {"VLLM_ATTENTION_BACKEND": None, "TORCHDYNAMO_DISABLE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    merged: dict[str, str | None] = {**os.environ, **fixed, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run_engine(
    prompts: list[list[int]], sampling: dict[str, Any], env: dict[str, str | None] | None = None, **llm: Any
) -> Run:
    """Generate from token ids with `LLM(**llm)`; a failure raises with the log in its message."""
    llm = {"model": MODEL, "enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": CACHE_BYTES, **llm}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = json.dumps({"prompts": prompts, "sampling": sampling, "llm": llm, "result": str(result)})
        done = subprocess.run(
            [sys.executable, __file__],
            input=job,
            env=environment(**(env or {})),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout)
        return Run(**json.loads(result.read_text()), log=done.stdout)


def backends_of(worker: Any) -> list[str]:
    """Return the attention backends of a worker's layers, each once. Runs in the worker."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backends = [layer.get_attn_backend() for layer in layers if isinstance(layer, AttentionLayerBase)]
    return sorted({f"{backend.__module__}.{backend.__name__}" for backend in backends})


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(**job["llm"], disable_log_stats=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, **job["sampling"]), use_tqdm=False)
    logprobs = [
        [step[token].logprob for token, step in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)]
        for o in outputs
        if o.prompt_logprobs is not None
    ]
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "prompt_logprobs": logprobs,
        "preemptions": metrics["vllm:num_preemptions"],
        "prefix_hits": metrics["vllm:prefix_cache_hits"],
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
        "backends": llm.collective_rpc(backends_of),
    }
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
