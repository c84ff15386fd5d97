"""Generate text with a DeepSeek model through vLLM and the HOPPER_MLA attention backend.

    python examples/offline_generate.py                          # the tiny model beside this file, CPU or GPU
    python examples/offline_generate.py --model deepseek-ai/DeepSeek-V2-Lite

Prints the backend and what computes its attention, the prompts with their continuations, the speed, and what the
compressed cache saves.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent / "tiny_deepseek"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="a folder or a hub name (default: the tiny model)")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the demonstration prompts (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="prompt and continuation (default: 2048)")
    options = parser.parse_args()

    # What a user sets in the shell. Set before vLLM is imported, and inherited by the processes that it starts.
    os.environ.setdefault("VLLM_ATTENTION_BACKEND", "HOPPER_MLA")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    on_cpu: dict[str, Any] = (
        {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28} if current_platform.is_cpu() else {}
    )
    llm = LLM(options.model, max_model_len=options.max_model_len, **on_cpu)

    sys.path.append(str(TINY))
    from prompts import demonstration_prompts

    prompts = demonstration_prompts(options.prompts, characters=200)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=options.max_tokens))
    seconds = time.perf_counter() - begin

    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{' prompt ':-^80}\n{prompt}\n{' continuation ':-^80}\n{output.outputs[0].text}")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print("=" * 80)
    print(describe_backend(llm))
    print(
        f"speed: {tokens / seconds:.0f} tokens per second ({tokens} in {seconds:.1f} s, {len(prompts)} prompts at once)"
    )
    print(describe_cache(llm))


def describe_backend(llm: Any) -> str:
    """Name the backend that the engine's configuration chooses for MLA layers, and what computes it."""
    from mla_backend.plugin.backend import HopperMLABackend
    from mla_backend.plugin.selection import is_chosen

    if not is_chosen(llm.llm_engine.vllm_config):
        return "backend: vLLM's own choice"
    return f"backend: {HopperMLABackend.get_name()}, {HopperMLABackend.describe_kernel()}"


def describe_cache(llm: Any) -> str:
    """Compare the latent cache with the keys and values that it stands for, in bytes per token."""
    model = llm.llm_engine.vllm_config.model_config
    config = model.hf_text_config
    layers = config.num_hidden_layers * model.dtype.itemsize
    latent = layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    expanded = layers * config.num_attention_heads * (key + value)
    return (
        f"cache: {latent} bytes per token, {expanded / latent:.1f} times smaller than the {expanded} bytes of "
        f"expanded keys and values"
    )


if __name__ == "__main__":
    main()
