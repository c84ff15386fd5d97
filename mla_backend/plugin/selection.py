"""How the backend is chosen: `--attention-backend`, `attention_config` and VLLM_ATTENTION_BACKEND.

vLLM asks its platform (CUDA or CPU) two things: to complete the configuration, once, and to choose a backend, for each
layer. The plugin answers first in both places. Completing the configuration is where the environment variable becomes
part of it, so that it reaches every worker process with the configuration, whichever executor starts it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import vllm.envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from mla_backend.plugin import releases

logger = init_logger("vllm.mla_backend")

VARIABLE = "VLLM_ATTENTION_BACKEND"
MLA_KIND = KVCacheSpecKind.MLA_ATTENTION.value
MARK = "mla_backend"
"""Key in vLLM's additional configuration for what was decided when the configuration was first completed.

vLLM completes a configuration again whenever it changes a part, for draft models above all. The variable then no longer
counts, except that a backend named for the draft takes its choice back.
"""


def install() -> None:
    """Put the plugin's answers before the platform's. Calling it again changes nothing."""
    # A variable that vLLM does not know is reported as a typing error, and not passed on to Ray's workers.
    vllm.envs.environment_variables.setdefault(VARIABLE, lambda: os.environ.get(VARIABLE))
    platform = type(current_platform)
    _put_before(platform, "check_and_update_config", complete_config)
    _put_before(platform, "get_attn_backend_cls", choose_backend)


def _put_before(owner: type, name: str, answer: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "answered_by_mla_backend", False):
        return

    @functools.wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return answer(original, *args, **kwargs)

    method.answered_by_mla_backend = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method))


def complete_config(original: Callable[[VllmConfig], None], vllm_config: VllmConfig) -> None:
    """Apply VLLM_ATTENTION_BACKEND, and stop where the backend is chosen for a model that it cannot serve.

    On the CPU, also keep the settings that only vLLM's own MLA backends need changed.
    """
    model = vllm_config.model_config
    if model is None:
        original(vllm_config)
        return
    additional: Any = vllm_config.additional_config  # a dictionary on the platforms of vLLM itself
    mark = additional.get(MARK)
    if mark is None:
        by_variable = apply_environment(vllm_config)
        mark = {"chosen": is_chosen(vllm_config), "by_variable": by_variable}
        if mark["chosen"]:
            # The layers ask again, one by one; asking here stops start-up before any process is started.
            refuse_unserved(model.model, _expected_layer(vllm_config))
        if mark["chosen"] or VARIABLE in os.environ:
            additional[MARK] = mark
    elif mark["by_variable"] and vllm_config.attention_config.backend is not None:
        _unset_mla_kind(vllm_config)
    if mark["chosen"] and current_platform.is_cpu():
        releases.avoid_cpu_rotary_kernel(vllm_config)
        _complete_cpu_config(original, vllm_config)
    else:
        original(vllm_config)


def _expected_layer(vllm_config: VllmConfig) -> AttentionSelectorConfig:
    """Describe the model's attention layers from its configuration, as far as this release asks."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    settings: dict[str, Any] = {
        "head_size": model.get_head_size(),
        "dtype": model.dtype,
        "kv_cache_dtype": cache.cache_dtype,
        "block_size": cache.block_size if cache.user_specified_block_size else None,
        "use_mla": model.use_mla,
        "use_sparse": hasattr(model.hf_text_config, "index_topk"),
        "use_batch_invariant": vllm.envs.VLLM_BATCH_INVARIANT,
        "use_dcp": parallel.decode_context_parallel_size > 1,
        "use_pcp": parallel.prefill_context_parallel_size > 1,
    }
    return AttentionSelectorConfig(**{k: v for k, v in settings.items() if k in AttentionSelectorConfig._fields})


def apply_environment(vllm_config: VllmConfig) -> bool:
    """Let VLLM_ATTENTION_BACKEND=HOPPER_MLA choose the backend for MLA layers, unless a backend is named explicitly.

    Returns:
        Whether the variable decided.
    """
    asked = os.environ.get(VARIABLE, "")
    attention = vllm_config.attention_config
    if asked and asked.upper() != releases.NAME:
        _warn_of_other_value(asked)
        return False
    if not asked or attention.backend is not None or MLA_KIND in attention.backend_per_kind:
        return False
    attention.backend_per_kind = {**attention.backend_per_kind, MLA_KIND: releases.backend_member()}
    return True


def _unset_mla_kind(vllm_config: VllmConfig) -> None:
    """Take the variable's choice back, without touching the configuration that this one was made from."""
    attention = vllm_config.attention_config
    others = {kind: backend for kind, backend in attention.backend_per_kind.items() if kind != MLA_KIND}
    attention.backend_per_kind = others


@functools.cache
def _warn_of_other_value(asked: str) -> None:
    logger.warning(
        "%s=%s has no effect: this vLLM no longer reads the variable, and mla_backend acts on %s only; "
        "use --attention-backend %s instead.",
        VARIABLE,
        asked,
        releases.NAME,
        asked,
    )


def is_chosen(vllm_config: VllmConfig) -> bool:
    """Whether the backend is to serve the MLA layers of `vllm_config`."""
    attention = vllm_config.attention_config
    return releases.is_backend(attention.backend_per_kind.get(MLA_KIND, attention.backend))


def _complete_cpu_config(original: Callable[[VllmConfig], None], vllm_config: VllmConfig) -> None:
    """Complete the configuration on the CPU, where vLLM provides for its own two MLA backends.

    For the one that runs without AMX it fixes the page size and disables chunked prefill and prefix caching. This
    backend takes other page sizes and attends to cached tokens, so what was configured stays.
    """
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    block_size = cache.block_size if cache.user_specified_block_size else None
    configured = (cache.enable_prefix_caching, scheduler.enable_chunked_prefill)
    max_num_batched_tokens = scheduler.max_num_batched_tokens
    original(vllm_config)
    cache.enable_prefix_caching, scheduler.enable_chunked_prefill = configured
    scheduler.max_num_batched_tokens = max_num_batched_tokens
    if block_size is not None:
        cache.block_size = block_size
    logger.info("%s keeps prefix caching (%s) and chunked prefill (%s) as configured.", releases.NAME, *configured)


def choose_backend(
    original: Callable[..., str],
    selected_backend: AttentionBackendEnum | None,
    attn_selector_config: AttentionSelectorConfig,
    num_heads: int | None = None,
) -> str:
    """Return the path of this backend's class if it is selected, else vLLM's own choice."""
    if not releases.is_backend(selected_backend):
        return original(selected_backend, attn_selector_config, num_heads)
    from mla_backend.plugin.backend import HopperMLABackend

    refuse_unserved(get_current_vllm_config().model_config.model, attn_selector_config)
    logger.info_once("Using %s attention backend: %s.", releases.NAME, HopperMLABackend.describe_kernel())
    return releases.BACKEND_PATH


def refuse_unserved(model: str, config: AttentionSelectorConfig) -> None:
    """Raise where the backend cannot serve a layer of `model`.

    Raises:
        ValueError: says what was asked, what is supported and what to do instead.
    """
    # Late, because the backend needs vLLM's attention layers, which only a process that uses it should load.
    from mla_backend.plugin.backend import HopperMLABackend

    capability: Any = current_platform.get_device_capability()  # None on the CPU, which the backend admits
    reasons = HopperMLABackend.validate_configuration(device_capability=capability, **config._asdict())
    if current_platform.is_cpu() and not releases.cpu_serves_mla():
        reasons.append("this vLLM release has no MLA on the CPU, or none that attends to cached tokens")
    if current_platform.is_cpu() and getattr(config, "use_dcp", False):
        reasons.append("vLLM has no decode context parallelism on the CPU")
    if reasons:
        asked = {name: value for name, value in config._asdict().items() if value not in (None, False)}
        others = "CPU_MLA" if current_platform.is_cpu() else "FLASHMLA or TRITON_MLA"
        other = f"name {others} with --attention-backend, or " if config.use_mla and not config.use_sparse else ""
        raise ValueError(
            f"{releases.NAME} cannot serve {model} ({', '.join(reasons)}): asked was "
            f"{', '.join(f'{name}={value}' for name, value in asked.items())}; supported are "
            f"{HopperMLABackend.describe_support()}; {other}unset --attention-backend and {VARIABLE}, and vLLM chooses."
        )
