"""Makes the model type `frozen-prefix` known to the Auto classes of transformers."""


def register_with_auto_classes() -> None:
    """Registers config, models and processor; doing it twice changes nothing."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .configuration_frozen_prefix import FrozenPrefixConfig
    from .modeling_frozen_prefix import FrozenPrefixForConditionalGeneration, FrozenPrefixModel
    from .processors import FrozenPrefixProcessor

    AutoConfig.register(FrozenPrefixConfig.model_type, FrozenPrefixConfig, exist_ok=True)
    AutoModel.register(FrozenPrefixConfig, FrozenPrefixModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(FrozenPrefixConfig, FrozenPrefixForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(FrozenPrefixConfig, FrozenPrefixProcessor, exist_ok=True)
