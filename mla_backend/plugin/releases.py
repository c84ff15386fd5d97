"""The places where supported vLLM releases differ, each with the release named.

Supported are 0.26 to 0.33. tests/plugin/test_releases.py checks what the plugin takes from vLLM against the sources of
the installed release and of three others; a difference belongs here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.v1.attention.backends.registry as registry
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum

if TYPE_CHECKING:  # register_backend runs before vLLM knows its platform, which its configuration needs to be imported
    from vllm.config import VllmConfig

logger = init_logger("vllm.mla_backend")

# Beside what the functions below ask for, the releases differ in signatures that the plugin leaves open with *args:
# `_build_decode` gets max_query_len from 0.31 on, `do_kv_cache_update` gets skip_scale from 0.33 on.

NAME = "HOPPER_MLA"
BACKEND_PATH = "mla_backend.plugin.backend.HopperMLABackend"


def register_backend() -> None:
    """Register the backend as CUSTOM, and as HOPPER_MLA where vLLM takes new names (from 0.32 on)."""
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        registry.register_backend(custom, BACKEND_PATH)
    elif custom.get_path() != BACKEND_PATH:
        logger.warning("CUSTOM is already taken by %s; %s keeps its own name only.", custom.get_path(), NAME)
    add_name: Any = getattr(AttentionBackendEnum, "register", None)
    if add_name is not None and NAME not in AttentionBackendEnum.__members__:
        member = add_name(NAME, BACKEND_PATH)
        # vLLM sends its configuration to processes that unpickle it before they load plugins. An enum member is
        # pickled as a look-up of its value, which does not exist there yet; this one brings its registration along.
        member.__reduce_ex__ = lambda protocol: (backend_member, ())


def backend_member() -> AttentionBackendEnum:
    """Return the name under which this release knows the backend, registering it if need be.

    Raises:
        ValueError: the release takes no new names, and another plugin has taken CUSTOM.
    """
    register_backend()
    for name in (NAME, "CUSTOM"):
        member = AttentionBackendEnum.__members__.get(name)
        if member is not None and is_backend(member):
            return member
    raise ValueError(
        f"{NAME} is not available: this vLLM offers one place for other backends, CUSTOM, and another plugin has "
        f"taken it ({AttentionBackendEnum.CUSTOM.get_path()}); uninstall one of the two, or name the wanted one in "
        f"VLLM_PLUGINS."
    )


def is_backend(member: AttentionBackendEnum | None) -> bool:
    """Whether `member` stands for this backend."""
    if member is None or member.name not in (NAME, "CUSTOM"):
        return False
    return bool(member.is_overridden() and member.get_path() == BACKEND_PATH) or member.value == BACKEND_PATH


def cpu_serves_mla() -> bool:
    """Whether vLLM's own parts of MLA run on the CPU, with prefill that attends to cached tokens (from 0.29 on)."""
    import vllm._custom_ops  # here, because it needs vLLM's platform, as above

    return hasattr(vllm._custom_ops, "gather_mla_context_cache_cpu")


def avoid_cpu_rotary_kernel(vllm_config: VllmConfig) -> None:
    """Have rotary embeddings computed in PyTorch on the CPU, unless the user decided otherwise (seen up to 0.32).

    vLLM's CPU kernel takes the stride between the heads of a key for the one between tokens. In MLA the key is a view
    into the projection that holds the latent too, and the kernel writes rotated numbers over latent ones.
    """
    custom_ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding"} & set(custom_ops):
        custom_ops.append("-rotary_embedding")
