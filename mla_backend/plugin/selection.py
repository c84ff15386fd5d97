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
INSTEAD = "Use another backend (--attention-backend FLASHMLA or TRITON_MLA, for example), or name none and vLLM chooses."


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
    """Apply VLLM_ATTENTION_BACKEND, and on the CPU keep the settings that only vLLM's own MLA backends need changed."""
    apply_environment(vllm_config)
    if current_platform.is_cpu() and is_chosen(vllm_config) and releases.cpu_attends_to_context():
        _complete_cpu_config(original, vllm_config)
    else:
        original(vllm_config)


def apply_environment(vllm_config: VllmConfig) -> None:
    """Let VLLM_ATTENTION_BACKEND=HOPPER_MLA choose the backend for MLA layers, unless a backend is named explicitly.

    Raises:
        ValueError: the model has no multi-head latent attention.
    """
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return
    if asked.upper() != releases.NAME:
        _warn_of_other_value(asked)
        return
    attention = vllm_config.attention_config
    if attention.backend is not None or MLA_KIND in attention.backend_per_kind:
        return
    speculative = vllm_config.speculative_config
    model = vllm_config.model_config if speculative is None else speculative.target_model_config
    if model is None:
        return
    if not model.use_mla:
        raise ValueError(
            f"{VARIABLE}={releases.NAME} asks for a backend that serves models with multi-head latent attention only "
            f"(DeepSeek-V2/V3/R1, Kimi-K2, Moonlight), but {model.model} has none or has it disabled; unset {VARIABLE}."
        )
    attention.backend_per_kind[MLA_KIND] = releases.backend_member()


@functools.cache
def _warn_of_other_value(asked: str) -> None:
    logger.warning(
        "%s=%s has no effect: this vLLM no longer reads the variable, and mla_backend acts on %s only. "
        "Use --attention-backend %s instead.",
        VARIABLE,
        asked,
        releases.NAME,
        asked,
    )


def is_chosen(vllm_config: VllmConfig) -> bool:
    """Whether the backend serves the MLA layers of `vllm_config`."""
    attention = vllm_config.attention_config
    return releases.is_backend(attention.backend_per_kind.get(MLA_KIND, attention.backend))


def _complete_cpu_config(original: Callable[[VllmConfig], None], vllm_config: VllmConfig) -> None:
    """Complete the configuration on the CPU, where vLLM provides for its own two MLA backends.

    For the one that runs without AMX it fixes the page size and disables chunked prefill and prefix caching. This
    backend takes other page sizes and attends to cached tokens, so what was configured stays.
    """
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    block_size = cache.block_size if cache.user_specified_block_size else None
    prefix_caching, chunked_prefill = cache.enable_prefix_caching, scheduler.enable_chunked_prefill
    max_num_batched_tokens = scheduler.max_num_batched_tokens
    original(vllm_config)
    changed = (cache.enable_prefix_caching, scheduler.enable_chunked_prefill) != (prefix_caching, chunked_prefill)
    cache.enable_prefix_caching, scheduler.enable_chunked_prefill = prefix_caching, chunked_prefill
    if changed:
        scheduler.max_num_batched_tokens = max_num_batched_tokens
        logger.info(
            "%s attends to cached tokens: prefix caching (%s) and chunked prefill (%s) stay as configured.",
            releases.NAME,
            prefix_caching,
            chunked_prefill,
        )
    if block_size is not None:
        cache.block_size = block_size


def choose_backend(
    original: Callable[..., str],
    selected_backend: AttentionBackendEnum | None,
    attn_selector_config: AttentionSelectorConfig,
    num_heads: int | None = None,
) -> str:
    """Return the path of this backend's class if it is selected, else vLLM's own choice.

    Raises:
        ValueError: the backend is selected and cannot serve the layer.
    """
    if not releases.is_backend(selected_backend):
        return original(selected_backend, attn_selector_config, num_heads)

    # Late, because the backend's module imports vLLM's attention layers, which not every process needs.
    from mla_backend.plugin.backend import HopperMLABackend

    reasons = HopperMLABackend.validate_configuration(
        device_capability=current_platform.get_device_capability(), **attn_selector_config._asdict()
    )
    if current_platform.is_cpu() and not releases.cpu_serves_mla():
        reasons.append("this vLLM release has no multi-head latent attention on the CPU")
    if reasons:
        raise ValueError(
            f"{releases.NAME} cannot serve {get_current_vllm_config().model_config.model}: {', '.join(reasons)}. "
            f"Asked: {_describe(attn_selector_config)}. Supported: {HopperMLABackend.describe_support()}. {INSTEAD}"
        )
    logger.info_once("Using %s attention backend: %s.", releases.NAME, HopperMLABackend.describe_kernel())
    return releases.BACKEND_PATH


def _describe(config: AttentionSelectorConfig) -> str:
    """Name the settings of a layer, leaving out the switches that are off."""
    settings = {name: value for name, value in config._asdict().items() if value not in (None, False)}
    return ", ".join(f"{name}={value}" for name, value in settings.items())
