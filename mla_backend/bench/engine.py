"""The command `mla-bench-engine`: whole decode steps of vLLM, one attention backend after the other.

The model has the shape of DeepSeek-V2-Lite and dummy weights, so nothing is downloaded; its steps are as long as the
real one's except for which experts the tokens go to. Each backend gets a process of its own, with the engine inside it.
The engine schedules as it does by default, the next step while the GPU works on this one, so that a call of it returns
one step's tokens, and from call to call passes the time of a step as users have it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mla_backend import has_compiled_kernels
from mla_backend.bench.report import about, draw_layer
from mla_backend.dimensions import HEAD_DIM

OURS = "HOPPER_MLA"
ATTENTION_KERNELS = {
    OURS: r"mla_backend::",
    "FLASHMLA": r"flash_fwd|mla_metadata|sched_meta",
    "FLASH_ATTN_MLA": r"flash::",
}
"""The backends, as vLLM names them, and what the names of their decode kernels contain."""

SHORT = ((1, 8192), (32, 4096))
LONG = ((1, 100_000), (8, 32768), (64, 8192))
"""Decode steps as requests and cached tokens in each."""

MODEL: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "dtype": "bfloat16",
}

PAGE_SIZE = 64
PREFILL_TOKENS = 16384  # per step
WARM_UP, TIMED, PROFILED = 8, 64, 8  # decode steps
ROOM = 256  # tokens that a request may generate: those steps, and the steps in which later requests are prefilled


@dataclass
class Row:
    """A decode step of one backend. All times are in milliseconds.

    Attributes:
        requests: requests in the step, each with one query token.
        tokens: cached tokens of each request when its prefill ends.
        backend: the attention backend, as vLLM names it.
        median: time of a step as the engine's caller sees it, so with what work of the CPU the GPU waits for.
        fastest: the same for the fastest step.
        slowest: the same for the slowest step.
        gpu: time per step in which the GPU runs a kernel.
        attention: the same for attention kernels.
        kernels: time per step of each kernel, in sum more than `gpu` where one starts before the last one ends.
    """

    requests: int
    tokens: int
    backend: str
    median: float
    fastest: float
    slowest: float
    gpu: float = math.nan
    attention: float = math.nan
    kernels: dict[str, float] = field(default_factory=dict)


def start(backend: str, shapes: list[tuple[int, int]]) -> Any:
    """Return vLLM's `LLM` with `backend` in this process, with a cache for the largest of `shapes`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # greedy sampling needs none of it, and it is compiled at the start
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if backend == OURS:  # by variable, because vLLM before 0.32 does not take its name
        os.environ["VLLM_ATTENTION_BACKEND"] = OURS
    from vllm import LLM

    cached = max(requests * (tokens + ROOM + PAGE_SIZE) for requests, tokens in shapes) + PAGE_SIZE
    sizes = sorted({requests for requests, _ in shapes})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        return LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_config=None if backend == OURS else {"backend": backend},
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sizes,
            },
            block_size=PAGE_SIZE,
            kv_cache_memory_bytes=cached * MODEL["num_hidden_layers"] * HEAD_DIM * 2,
            max_model_len=max(tokens for _, tokens in shapes) + ROOM,
            max_num_seqs=sizes[-1],
            max_num_batched_tokens=PREFILL_TOKENS,
            enable_prefix_caching=False,
            enable_flashinfer_autotune=False,
        )


@contextmanager
def decoding(engine: Any, requests: int, tokens: int) -> Iterator[Callable[[], None]]:
    """Prefill the requests, each with a prompt of its own, and yield a function that makes one decode step of them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    each_step = {"output_kind": RequestOutputKind.DELTA, "detokenize": False}
    sampling = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True, **each_step)
    rng = random.Random(tokens)
    names = [f"{requests}x{tokens}-{i}" for i in range(requests)]
    for name in names:
        prompt = {"type": "token", "prompt_token_ids": rng.choices(range(MODEL["vocab_size"]), k=tokens)}
        engine.add_request(name, prompt, sampling)
    while len(engine.step()) < requests:  # less than one token for each: some are still being prefilled
        pass

    def step() -> None:
        served = len(engine.step())
        if served != requests:
            raise RuntimeError(f"{served} of {requests} requests got a token: this was no plain decode step")

    for _ in range(WARM_UP):
        step()
    yield step
    engine.abort_request(names)


def milliseconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much of the time the spans, each from its begin to its end, cover together."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def profile_steps(step: Callable[[], None], row: Row, trace: Path | None) -> None:
    """Fill in what `row` says of the GPU, from a few steps; write their Chrome trace and a picture of it."""
    torch.cuda.synchronize()  # the step that is under way already is none of those that are launched from here on
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
    if trace:
        profiler.export_chrome_trace(str(trace))
        draw_layer(trace.with_suffix(".png"), trace, ATTENTION_KERNELS[row.backend])
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    per_step = 1e3 * PROFILED  # from microseconds of all steps
    attention = re.compile(ATTENTION_KERNELS[row.backend])
    row.gpu = covered(chain(*spans.values())) / per_step
    row.attention = covered(chain(*(mine for name, mine in spans.items() if attention.search(name)))) / per_step
    row.kernels = {name: sum(end - begin for begin, end in mine) / per_step for name, mine in spans.items()}


def measure(backend: str, shapes: list[tuple[int, int]], traces: Path | None = None) -> list[Row]:
    """Time the decode steps of `shapes` in a new engine, then profile them.

    Profiled last, because a profiler that has run once may leave CUDA slower than it was.
    """
    try:
        engine = start(backend, shapes).llm_engine
        rows = []
        for requests, tokens in shapes:
            with decoding(engine, requests, tokens) as step:
                times = [milliseconds(step) for _ in range(TIMED)]
            rows.append(Row(requests, tokens, backend, statistics.median(times), min(times), max(times)))
        for row in rows:
            trace = traces / f"{backend}-{row.requests}x{row.tokens}.json" if traces else None
            with decoding(engine, row.requests, row.tokens) as step:
                profile_steps(step, row, trace)
        return rows
    except Exception as problem:  # as one that can be sent to another process, which not every error of vLLM's can
        raise RuntimeError(f"{backend}: {type(problem).__name__}: {problem}") from problem


def table(rows: list[Row]) -> str:
    lines = [
        f"{'requests x tokens':18} {'backend':15} {'step':>8} {'fastest':>8} {'slowest':>8} "
        f"{'GPU':>8} {'attention':>10} {'share':>6}"
    ]
    for row in sorted(rows, key=lambda r: (r.requests * r.tokens, r.requests)):
        share = row.attention / row.gpu if row.gpu else math.nan
        lines.append(
            f"{f'{row.requests} x {row.tokens}':18} {row.backend:15} {row.median:8.3f} {row.fastest:8.3f} "
            f"{row.slowest:8.3f} {row.gpu:8.3f} {row.attention:10.3f} {share:6.1%}"
        )
    return "\n".join(lines)


def longest_kernels(row: Row, count: int = 12) -> str:
    ordered = sorted(row.kernels.items(), key=lambda item: -item[1])[:count]
    lines = [f"{time:9.4f}  {name[:110]}" for name, time in ordered]
    return "\n".join([f"{row.backend}, {row.requests} x {row.tokens}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="mla-bench-engine",
        description="Measure whole decode steps of vLLM, a DeepSeek-V2-Lite with dummy weights.",
    )
    parser.add_argument("--out", type=Path, help="folder for mla-bench-engine.json (default: none)")
    parser.add_argument(
        "--only", nargs="+", default=list(ATTENTION_KERNELS), choices=list(ATTENTION_KERNELS), help="backends"
    )
    parser.add_argument("--all", action="store_true", help="long caches and many requests too")
    parser.add_argument("--kernels", action="store_true", help="print the kernels that take the most time")
    parser.add_argument(
        "--trace",
        type=Path,
        help="folder for Chrome traces and pictures of a layer, per backend and shape (default: none)",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("mla-bench-engine: no GPU was found, and there is nothing to measure without one.")
    if OURS in options.only and not has_compiled_kernels():
        raise SystemExit("mla-bench-engine: the compiled kernels are not installed; reinstall with MLA_BACKEND_CUDA=1.")
    if options.trace and find_spec("matplotlib") is None:  # said before minutes of measuring
        raise SystemExit("mla-bench-engine: --trace draws with matplotlib, which is not there; pip install '.[bench]'.")
    for folder in filter(None, (options.out, options.trace)):
        folder.mkdir(parents=True, exist_ok=True)

    shapes = [*SHORT, *LONG] if options.all else list(SHORT)
    rows: list[Row] = []
    for backend in options.only:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                rows += process.submit(measure, backend, shapes, options.trace).result()
            except Exception:  # one that cannot start is a result too, and the others can still be measured
                traceback.print_exc()
                continue
        print(f"{backend}\n{table(rows[-len(shapes) :])}", flush=True)  # starting the next one takes most of a minute
    if not rows:
        raise SystemExit("mla-bench-engine: no backend could be measured.")
    print(f"decode steps on {torch.cuda.get_device_name()}, medians of {TIMED}, milliseconds")
    print(table(rows))
    if options.kernels:
        print("\n\n".join(["milliseconds per step by kernel", *map(longest_kernels, rows)]))
    if options.out:
        result = {"about": about(), "rows": [asdict(row) for row in rows]}
        (options.out / "mla-bench-engine.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
