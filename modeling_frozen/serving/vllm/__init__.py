"""The plug-in by which vLLM serves checkpoints of this package (entry point `vllm.general_plugins`).

    vllm serve me/eyes --dtype bfloat16

The language model is vLLM's own, with its paged attention, batching and quantisation; tower and connector are ours. vLLM calls
[`register`] in each of its processes and imports `model` where it builds one.
"""


def register() -> None:
    """Makes model type, model class and the reader of chats known to vLLM, without importing the latter two."""
    import vllm
    from vllm.renderers.registry import RENDERER_REGISTRY

    import modeling_frozen  # noqa: F401  # registers the config and the processor with transformers

    vllm.ModelRegistry.register_model(
        "FrozenPrefixForConditionalGeneration", f"{__name__}.model:FrozenPrefixForConditionalGeneration"
    )
    # No model names a renderer of its own: the one of all models with transformers' tokenizers is told which are ours.
    RENDERER_REGISTRY.renderers["hf"] = (f"{__name__}.renderer", "Renderer")


__all__ = ["register"]
