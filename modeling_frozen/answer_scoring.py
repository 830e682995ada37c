# SPDX-License-Identifier: Apache-2.0
"""How likely each of many answers is: log-likelihoods over one kept prefix, for multiple choice, zero-shot classification and
re-ranking."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .padding import pad_right
from .prefix_cache import PrefixCache, mask_or_none, media_together, padded_right


@torch.no_grad()
def score_answers(
    model: Any,
    candidates: Sequence[Any] | torch.LongTensor,
    *,
    tokenizer: Any = None,
    candidates_mask: torch.Tensor | None = None,
    prefix_cache: PrefixCache | None = None,
    reduction: str = "sum",
    batch_size: int = 32,
    **inputs: Any,
) -> torch.Tensor:
    """As [`FrozenPrefixForConditionalGeneration.score`], of `model`."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'`reduction="{reduction}"` should be "sum" or "mean". [errors.md#choices]')
    if prefix_cache is None or any(value is not None for value in inputs.values()):
        prefix_cache = model.encode_prefix(prefix_cache=prefix_cache, **inputs)
    answers = _answers(candidates, candidates_mask, tokenizer, len(prefix_cache))
    scores = torch.full((len(prefix_cache), max(map(len, answers))), -float("inf"), device=model.device)
    pairs = [(row, column) for row, own in enumerate(answers) for column in range(len(own))]
    pairs.sort(key=lambda pair: len(answers[pair[0]][pair[1]]))  # little padding in a batch
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        rows, columns = torch.tensor(chunk, device=model.device).T
        targets = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(answers[row][column]) for row, column in chunk], batch_first=True, padding_value=-1
        ).to(model.device)
        real = targets >= 0
        targets = targets.clamp(min=0)
        logits = _answer_logits(model, prefix_cache, rows, targets, real).float()
        logprobs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
        total = logprobs.masked_fill(~real, 0.0).sum(-1)
        scores[rows, columns] = total / real.sum(-1) if reduction == "mean" else total
    return scores


def _answer_logits(
    model: Any, prefix: PrefixCache, rows: torch.Tensor, targets: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Logits `(answers, length, vocabulary)` for each token of the answers."""
    some = prefix._select(rows)
    if some.encoder_outputs is not None:
        start = model.generation_config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "The generation config has no `decoder_start_token_id`, so no answer can begin: set it."
                " [errors.md#language-model]"
            )
        begin = torch.full_like(targets[:, :1], start)
        return model(
            encoder_outputs=some.encoder_outputs,
            attention_mask=pad_right(None, None, some.attention_mask)[2],  # as the encoder read it
            decoder_input_ids=torch.cat([begin, targets[:, :-1]], dim=1),
            use_cache=False,
        ).logits
    if some.cache is not None and some.logits is not None:
        first = some.logits[:, None].to(model.device)
        if targets.shape[1] == 1:
            return first
        begun = some.attention_mask.sum(-1)
        fed = real[:, 1:].long()  # nothing comes after the last token of an answer
        mask = torch.cat([some.attention_mask, fed], dim=1)
        outputs = model(
            input_ids=targets[:, :-1],
            attention_mask=mask_or_none(mask),
            position_ids=begun[:, None] + torch.arange(targets.shape[1] - 1, device=mask.device)[None],
            cache=some.past_key_values,
            use_cache=True,
        )
        return torch.cat([first, outputs.logits.to(first.device)], dim=1)
    ids, mask = padded_right(*some._followed_by(targets, real.long()))
    logits = model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=media_together(some.media), use_cache=False).logits
    begun = some.attention_mask.sum(-1)
    columns = begun[:, None] - 1 + torch.arange(targets.shape[1], device=begun.device)[None]
    columns = columns.clamp(max=logits.shape[1] - 1)
    return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))


def _answers(candidates: Any, mask: torch.Tensor | None, tokenizer: Any, rows: int) -> list[list[list[int]]]:
    """Token ids of each answer of each row."""
    if isinstance(candidates, torch.Tensor):
        mask = torch.ones_like(candidates) if mask is None else mask
        shared = [ids[real.bool()].tolist() for ids, real in zip(candidates, mask, strict=True)]
        answers = [shared] * rows
    else:
        candidates = [ids.tolist() if isinstance(ids, torch.Tensor) else ids for ids in candidates]
        first = candidates[0] if candidates else None
        nested = isinstance(first, (list, tuple)) and bool(first) and not isinstance(first[0], int)
        if nested and len(candidates) != rows:
            raise ValueError(
                f"{len(candidates)} lists of candidates were passed for {rows} prompt(s): one for each, or one for all."
                " [errors.md#evaluation]"
            )
        answers = [list(_tokenized(own, tokenizer)) for own in (candidates if nested else [candidates])]
        answers = answers if nested else answers * rows
    if not answers or any(not own or any(not ids for ids in own) for own in answers):
        raise ValueError("Each prompt needs a candidate at least, and each candidate a token. [errors.md#padding]")
    return answers


def _tokenized(candidates: Iterable[Any], tokenizer: Any) -> Iterator[list[int]]:
    for candidate in candidates:
        if isinstance(candidate, str):
            if tokenizer is None:
                raise ValueError(
                    "Models hold no tokenizer: pass `tokenizer=processor.tokenizer` with strings, or token ids."
                    " [errors.md#processor]"
                )
            yield tokenizer(candidate, add_special_tokens=False)["input_ids"]
        else:
            yield candidate.tolist() if isinstance(candidate, torch.Tensor) else list(candidate)


__all__ = ["score_answers"]
