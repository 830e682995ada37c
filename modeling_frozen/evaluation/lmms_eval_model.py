"""Our models under lmms-eval: any of its tasks, by `--model frozen_prefix`.

    pip install frozen-prefix lmms-eval
    python -m lmms_eval --model frozen_prefix --model_args pretrained=me/eyes --tasks vqav2_val --batch_size 16

lmms-eval finds this file by the entry point `lmms_eval.models` of our package (EvolvingLMMs-Lab/lmms-eval, registry v2).
"""

from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


def manifest() -> ModelManifest:
    """What the entry point gives."""
    place = "modeling_frozen.evaluation.lmms_eval_model.FrozenPrefixLMMS"
    return ModelManifest(model_id="frozen_prefix", simple_class_path=place)


class FrozenPrefixLMMS(lmms):
    """
    Args (each as `key=value` of `--model_args`):
        pretrained (`str`): id on the Hub or folder of the checkpoint.
        revision (`str`, *optional*), dtype (`str`, *optional*): as for `from_pretrained`.
        device (`str`, *optional*): defaults to the accelerator where there is one.
        batch_size (`int`): questions that are answered together.
        template (`str`): what is put around the task's words, `{}` standing for them; images come where the processor
            puts them.
        chat (`bool`): render the words as a user's turn by the chat template instead.
        trust_remote_code (`bool`): for parents with code of their own.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        template: str = "{}",
        chat: bool | str = False,
        trust_remote_code: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs := {key: value for key, value in kwargs.items() if key != "max_batch_size"}:
            raise ValueError(f"--model_args has {sorted(kwargs)}, which frozen_prefix doesn't know. [errors.md#choices]")
        if device in (None, "cuda") and not torch.cuda.is_available():
            device = "cpu"
        options = {"revision": revision, "trust_remote_code": _is_true(trust_remote_code)}
        if dtype is not None:
            options["dtype"] = dtype
        model = AutoModelForImageTextToText.from_pretrained(pretrained, **options)
        self.model = model.to(device or "cuda")  # type: ignore[arg-type]  # transformers' wrapper hides nn.Module's signature
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        self.batch_size, self.template, self.chat = int(batch_size), template, _is_true(chat)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, cut at the first stop word; requests of the same settings are answered in batches of like length."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(index)
        bar = tqdm(total=len(requests), desc="frozen_prefix: generate_until", disable=self.rank != 0)
        for group in groups.values():
            group.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(group), self.batch_size):
                chunk = group[start : start + self.batch_size]
                for index, answer in zip(chunk, self._generate([requests[index] for index in chunk]), strict=True):
                    answers[index] = answer
                bar.update(len(chunk))
        bar.close()
        return answers

    def _generate(self, requests: list[Instance]) -> list[str]:
        settings = dict(requests[0].args[1])
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        if not settings.get("temperature"):
            settings = {key: value for key, value in settings.items() if key not in ("temperature", "top_p", "top_k")}
        settings.setdefault("do_sample", "temperature" in settings)
        settings.setdefault("max_new_tokens", 128)
        known = set(self.model.generation_config.to_dict())
        settings = {key: value for key, value in settings.items() if key in known}
        inputs = self._inputs([(request.args[0], self._visuals(request.args[2:])) for request in requests])
        tokenizer = self.processor.tokenizer
        ids = self.model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **settings)
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        answers = []
        for text in tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True):
            for stop in until:
                text = text.split(stop)[0] if stop else text
            answers.append(text.strip())
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(negative log-likelihood of the continuation, whether greedy decoding would write it); a question's choices share
        its prefix. Negative, for lmms-eval's own models give a loss, and its multiple choice takes the least."""
        answers: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), desc="frozen_prefix: loglikelihood", disable=self.rank != 0)
        for indices in self._same_prompt(requests):
            context, _, *where = requests[indices[0]].args
            inputs = self._inputs([(context, self._visuals(where))])
            continuations = [self._continuation(requests[index], context) for index in indices]
            prefix = self.model.encode_prefix(**inputs)
            scores = self.model.score([continuations], prefix_cache=prefix)[0].tolist()
            longest = max(map(len, continuations))
            written = self.model.generate(prefix_cache=prefix, do_sample=False, max_new_tokens=longest)[0]
            start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            greedy = written[start:].tolist()
            for index, score, ids in zip(indices, scores, continuations, strict=True):
                answers[index] = _unharmed((-score, greedy[: len(ids)] == ids))
            bar.update(len(indices))
        bar.close()
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not served: the words of a later round depend on the task's own state."""
        raise NotImplementedError("frozen_prefix answers single rounds: choose tasks of generate_until or loglikelihood.")

    # --------------------------------------------------------------------------------------------------------- inputs

    def _document(self, where: Any) -> tuple[Any, Any]:
        doc_to_visual, doc_id, task, split = where
        return doc_to_visual, self.task_dict[task][split][doc_id]

    def _visuals(self, where: Any) -> list[Image.Image]:
        doc_to_visual, document = self._document(where)
        visuals = doc_to_visual(document) if doc_to_visual is not None else None
        visuals = [] if visuals is None else visuals if isinstance(visuals, list) else [visuals]
        if other := [type(one).__name__ for one in visuals if not isinstance(one, Image.Image)]:
            raise ValueError(f"The task gives {other[0]}, and frozen_prefix answers about images here. [errors.md#evaluation]")
        return visuals

    def _prompt(self, context: str, images: list[Image.Image]) -> str:
        if self.chat:
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": context}]
            turn = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.processor.place_images(self.template.format(context), len(images))

    def _inputs(self, questions: list[tuple[str, list[Image.Image]]]) -> Any:
        images = [images for _, images in questions]
        text = [self._prompt(*question) for question in questions]
        shown = images if any(images) else None
        return self.processor(text=text, images=shown, padding=True, return_tensors="pt").to(self.model.device)

    def _continuation(self, request: Instance, context: str) -> list[int]:
        _, target, *where = request.args
        target = target if isinstance(target, str) else target(self._document(where)[1])
        if not self.model.config.is_encoder_decoder and context and not context[-1].isspace() and not target[:1].isspace():
            target = f" {target}"  # as the collator joined prompt and answer in training
        return self.processor.tokenizer(target, add_special_tokens=False)["input_ids"]

    def _same_prompt(self, requests: list[Instance]) -> Iterator[list[int]]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            context, _, _, *where = request.args
            groups.setdefault((context, *where), []).append(index)
        yield from groups.values()


def _unharmed(pair: tuple[float, bool]) -> Any:
    """In a form in which it reaches the task: release 0.7.3 turns plain pairs into strings on their way."""
    return pair if unwrap_generation_output(pair)[0] == pair else GenerationResult(text=pair)


def _is_true(value: bool | str) -> bool:
    return value if isinstance(value, bool) else value.lower() in ("true", "1", "yes")


__all__ = ["FrozenPrefixLMMS", "manifest"]
