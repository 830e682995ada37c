"""The plug-in by which vLLM serves checkpoints of this package (entry point `vllm.general_plugins`).

    vllm serve me/eyes --dtype bfloat16

The language model is vLLM's own, with its paged attention, batching and quantisation; tower and connector are ours. vLLM calls
[`register`] in each of its processes and imports `model` where it builds one.
"""


def register() -> None:
    """Makes model type and model class known to vLLM, without importing the latter."""
    import vllm

    import modeling_frozen  # noqa: F401  # registers the config and the processor with transformers

    vllm.ModelRegistry.register_model(
        "FrozenPrefixForConditionalGeneration", f"{__name__}.model:FrozenPrefixForConditionalGeneration"
    )


__all__ = ["register"]
