"""The plug-in by which vLLM serves checkpoints of this package (entry point `vllm.general_plugins`).

    vllm serve me/eyes --dtype bfloat16

The language model is vLLM's own, with its paged attention, batching and quantisation; tower and connector are ours. vLLM calls
[`register`] in each of its processes and imports `model` where it builds one.
"""

import logging


def register() -> None:
    """Makes model type, model class and the reader of chats known to vLLM, without importing the latter two."""
    import vllm

    import modeling_frozen  # noqa: F401  # registers the config and the processor with transformers

    vllm.ModelRegistry.register_model(
        "FrozenPrefixForConditionalGeneration", f"{__name__}.model:FrozenPrefixForConditionalGeneration"
    )
    # No model names a renderer of its own: the one of all models with transformers' tokenizers is told which are ours. Other
    # models must not suffer where a release of vLLM keeps its renderers elsewhere.
    try:
        from vllm.renderers.registry import RENDERER_REGISTRY

        RENDERER_REGISTRY.renderers["hf"] = (f"{__name__}.renderer", "Renderer")
    except (ImportError, AttributeError, TypeError) as error:
        logging.getLogger("vllm").warning(
            "frozen-prefix: chats whose template writes no BOS are read without one here, for this vLLM has no table of "
            "renderers (%s); ask for `add_special_tokens` in requests.",
            error,
        )


__all__ = ["register"]
