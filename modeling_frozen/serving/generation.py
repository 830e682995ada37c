"""How transformers' server calls `generate()` of our models: by the tokenizer, and to the last learned position."""

from typing import Any

from transformers.cli.serving.utils import BaseGenerateManager, GenerateManager, GenerationState


class FrozenPrefixGenerateManager(GenerateManager):
    """`stop` asks the tokenizer for its vocabulary, where transformers hands on the processor. Where the language model has a
    table of positions, the answer ends with it, as at a length limit: the config that is changed is the request's own, by
    which the server tells why an answer ended."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any) -> Any:
        _end_at_last_position(model, inputs, gen_config)
        return super().generate_streaming(model, _tokenizer(processor), inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _end_at_last_position(model, inputs, gen_config)
        return await super().generate_non_streaming(model, _tokenizer(processor), inputs, gen_config, *args, **kwargs)


class FrozenPrefixGenerationState:
    """transformers' state of its handlers, with our manager for each model."""

    def __init__(self, state: GenerationState):
        self.state = state
        self.managers: dict[str, FrozenPrefixGenerateManager] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        if use_cb:
            return self.state.get_manager(model_id, use_cb=True)
        if model_id not in self.managers:
            self.managers[model_id] = FrozenPrefixGenerateManager()
        return self.managers[model_id]


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _end_at_last_position(model: Any, inputs: Any, gen_config: Any) -> None:
    positions = getattr(getattr(model, "model", None), "max_positions", None)
    alone = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[-1]
    left = None if positions is None else positions - alone + 1  # the last token is never read
    if left is not None and left > 0:  # an input that is too long itself is refused by the model
        gen_config.max_new_tokens = min(gen_config.max_new_tokens or left, left)


__all__ = ["FrozenPrefixGenerateManager", "FrozenPrefixGenerationState"]
