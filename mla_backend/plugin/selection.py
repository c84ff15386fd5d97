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
    if model is not None:
        apply_environment(vllm_config)
    if model is None or not is_chosen(vllm_config):
        original(vllm_config)
        return
    cache_dtype: Any = vllm_config.cache_config.cache_dtype  # from 0.33 on, names that only other plugins know too
    # The layers ask again, one by one; asking here stops start-up before any process is started. A draft model may
    # have other attention than its target, and what is not MLA in it is not this backend's.
    if model.use_mla or model.runner_type != "draft":
        refuse_unserved(
            model.model,
            AttentionSelectorConfig(
                head_size=model.get_head_size(),
                dtype=model.dtype,
                kv_cache_dtype=cache_dtype,
                block_size=None,
                use_mla=model.use_mla,
                use_sparse=hasattr(model.hf_text_config, "index_topk"),
            ),
        )
    if current_platform.is_cpu():
        releases.avoid_cpu_rotary_kernel(vllm_config)
    if current_platform.is_cpu() and releases.cpu_attends_to_context():
        _complete_cpu_config(original, vllm_config)
    else:
        original(vllm_config)


def apply_environment(vllm_config: VllmConfig) -> None:
    """Let VLLM_ATTENTION_BACKEND=HOPPER_MLA choose the backend for MLA layers, unless a backend is named explicitly."""
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return
    if asked.upper() != releases.NAME:
        _warn_of_other_value(asked)
        return
    attention = vllm_config.attention_config
    if attention.backend is None and MLA_KIND not in attention.backend_per_kind:
        attention.backend_per_kind[MLA_KIND] = releases.backend_member()


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
    if (cache.enable_prefix_caching, scheduler.enable_chunked_prefill) != configured:
        cache.enable_prefix_caching, scheduler.enable_chunked_prefill = configured
        scheduler.max_num_batched_tokens = max_num_batched_tokens
        logger.info("%s keeps prefix caching (%s) and chunked prefill (%s) as configured.", releases.NAME, *configured)
    if block_size is not None:
        cache.block_size = block_size


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
        reasons.append("this vLLM release has no MLA on the CPU")
    if reasons:
        asked = {name: value for name, value in config._asdict().items() if value not in (None, False)}
        raise ValueError(
            f"{releases.NAME} cannot serve {model} ({', '.join(reasons)}): asked was "
            f"{', '.join(f'{name}={value}' for name, value in asked.items())}; supported are "
            f"{HopperMLABackend.describe_support()}; name another backend, such as TRITON_MLA for MLA models, with "
            f"--attention-backend, or unset it and {VARIABLE}, and vLLM chooses."
        )
