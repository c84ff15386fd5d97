"""The vLLM plugin. Everything that knows vLLM is in this package, and nothing else is."""


def register() -> None:
    """Make the backend known to vLLM: the entry point of the group `vllm.general_plugins`.

    vLLM calls it in every process that it starts, some more than once; later calls change nothing. Imports happen
    inside, because an entry point must stay cheap to load where vLLM is never used.
    """
    from mla_backend.plugin import releases, selection

    releases.register_backend()
    selection.install()


def register_name() -> None:
    """Make the backend's name known: the entry point of the group `vllm.platform_plugins`.

    vLLM asks these entry points for a platform as soon as it is imported; this one has none to offer. It is there
    because `LLM(attention_config={"backend": "HOPPER_MLA"})` looks the name up before vLLM loads general plugins.
    """
    from mla_backend.plugin import releases

    releases.register_backend()
