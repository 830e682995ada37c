"""Assisted decoding of a model that sees, by an assistant that doesn't.

The assistant (a plain language model of the same tokenizer, or a look-up in the prompt) reads text alone: placeholders, whose
ids it may not even know, are hidden from it, and it can't propose any.
"""

from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator


class BlindCandidateGenerator(CandidateGenerator):
    """
    A candidate generator of the library, shown no placeholder.

    Args:
        generator (`CandidateGenerator`): the library's.
        placeholders: gives the mask of `input_ids`' placeholders.
        word (`int`): id that stands where a placeholder does; it is masked from the assistant's attention.
    """

    def __init__(self, generator: CandidateGenerator, placeholders: Any, word: int):
        self.generator, self.placeholders, self.word = generator, placeholders, word

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["generator"], name)

    @property
    def requires_model_outputs(self) -> bool:
        return self.generator.requires_model_outputs

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
        """Candidates after `input_ids`, up to the first placeholder among them."""
        length = input_ids.shape[1]
        hidden = input_ids.masked_fill(self.placeholders(input_ids), self.word)
        ids, logits = self.generator.get_candidates(hidden, **kwargs)
        new = ids[:, length:].to(input_ids.device)
        proposed = self.placeholders(new).any(0)
        if bool(proposed.any()):
            new = new[:, : int(proposed.nonzero()[0, 0])]
            logits = None if logits is None else logits[:, : new.shape[1]]
        return torch.cat([input_ids, new], dim=1), logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int) -> None:
        """As the library's."""
        return self.generator.update_candidate_strategy(input_ids, scores, num_matches)


class AssistedDecodingMixin:
    """`generate(assistant_model=...)` and `generate(prompt_lookup_num_tokens=...)` with pictures in the prompt."""

    def _get_candidate_generator(
        self,
        generation_config: Any,
        input_ids: torch.LongTensor,
        inputs_tensor: torch.Tensor,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> CandidateGenerator:
        sees = getattr(getattr(assistant_model, "config", None), "model_type", None) == self.config.model_type
        other_words = kwargs.get("target_tokenizer") is not None and kwargs.get("assistant_tokenizer") is not None
        blind = not sees and not other_words
        word = self.generation_config.pad_token_id or 0
        if not sees and assistant_model is not None:
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "mm_encoder_outputs"}
        if blind and assistant_model is not None:
            if not torch.is_floating_point(inputs_tensor):
                inputs_tensor = inputs_tensor.masked_fill(self.model.placeholders(inputs_tensor), word)
            if not self.config.is_encoder_decoder:
                model_kwargs.update(self._text_alone(input_ids, model_kwargs))
        generator = super()._get_candidate_generator(
            generation_config=generation_config,
            input_ids=input_ids,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            assistant_model=assistant_model,
            **kwargs,
        )
        return BlindCandidateGenerator(generator, self.model.placeholders, word) if blind else generator

    def _text_alone(self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Mask and positions of the words without the placeholders between them."""
        mask = model_kwargs.get("attention_mask")
        words = (~self.model.placeholders(input_ids)).long()
        words = words if mask is None or mask.shape != words.shape else words * mask
        return {"attention_mask": words, "position_ids": (words.cumsum(-1) - 1).clamp(min=0)}


__all__ = ["AssistedDecodingMixin", "BlindCandidateGenerator"]
