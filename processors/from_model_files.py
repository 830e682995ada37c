"""The processor of a checkpoint that holds a model and no processor.

Pipelines save and push their model, tokenizer and image processor one by one, and not the processor that holds them;
and `model.save_pretrained` alone writes no processor either. What such a folder lacks is all in the model's config, and
in the parents that it records.
"""

from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from .processing_compat import ProcessorMixin


# Part -> what loads it, and a file by which it is known to be there.
_PARTS = {
    "image_processor": (AutoImageProcessor, "preprocessor_config.json"),
    "feature_extractor": (AutoFeatureExtractor, "preprocessor_config.json"),
    "tokenizer": (AutoTokenizer, "tokenizer_config.json"),
}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")


class FromModelFilesMixin(ProcessorMixin):
    """Lets a processor's `from_pretrained` do without `processor_config.json` where a frozen-prefix model lies."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As the library's; without `processor_config.json` the processor is that of the model there, with those of its
        parts that were saved beside it."""
        name = pretrained_model_name_or_path
        shared = {key: kwargs[key] for key in _HUB_OPTIONS if kwargs.get(key) is not None}
        place = {key: kwargs[key] for key in ("revision", "subfolder") if kwargs.get(key) is not None}

        def lacks(file: str) -> bool:
            found = cached_file(
                name,
                file,
                **shared,
                **place,
                # Private, as the library's own loaders do: an `OSError` does not tell these from a name that is none.
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
            )
            return found is None

        if not lacks("processor_config.json") or lacks("config.json"):
            return super().from_pretrained(name, *args, **kwargs)
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code"), **shared, **place)
        if config.model_type != "frozen-prefix":
            return super().from_pretrained(name, *args, **kwargs)
        wanted = {"image": "image_processor", "audio": "feature_extractor"}
        parts: dict[str, Any] = {}
        for part in ("tokenizer", *(wanted[medium] for medium in config.media if medium in wanted)):
            auto_class, file = _PARTS[part]
            if not lacks(file):
                parts[part] = auto_class.from_pretrained(name, **shared, **place)
        saved = getattr(parts.get("tokenizer"), "special_tokens_map", {})
        tokens = {key: saved[key] for key in ("image_token", "video_token", "audio_token") if key in saved}
        return cls.from_model(config, **parts, **tokens, **shared)


__all__ = ["FromModelFilesMixin"]
