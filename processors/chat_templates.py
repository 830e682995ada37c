# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a language model's own made to render images (videos, audio), one for those without, few-shot
conversations."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


_FLATTEN_MEDIUM = """\
{%- elif fp_i['type'] == 'MEDIUM' -%}
{%- set fp_t.text = fp_t.text + TOKEN -%}
"""
# Put before a template, it turns every list of content items into the string that text-only templates expect.
_FLATTEN_CONTENT = """\
{%- set fp_c = namespace(messages=[]) -%}
{%- for fp_m in messages -%}
{%- if fp_m['content'] is iterable and fp_m['content'] is not string -%}
{%- set fp_t = namespace(text='') -%}
{%- for fp_i in fp_m['content'] -%}
{%- if fp_i is string -%}
{%- set fp_t.text = fp_t.text + fp_i -%}
MEDIA{%- elif fp_i['text'] is string -%}
{%- set fp_t.text = fp_t.text + fp_i['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set fp_c.messages = fp_c.messages + [dict(fp_m, content=fp_t.text)] -%}
{%- else -%}
{%- set fp_c.messages = fp_c.messages + [fp_m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = fp_c.messages -%}
"""
# Put before a template that takes nothing but such lists, it turns every string into one.
_LIST_CONTENT = """\
{%- set fp_c = namespace(messages=[]) -%}
{%- for fp_m in messages -%}
{%- if fp_m['content'] is string -%}
{%- set fp_c.messages = fp_c.messages + [dict(fp_m, content=[{'type': 'text', 'text': fp_m['content']}])] -%}
{%- else -%}
{%- set fp_c.messages = fp_c.messages + [fp_m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = fp_c.messages -%}
"""

# For language models without a template of their own: roles in plain words, EOS after each answer.
DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}{{- ' ' + message['content'] + (eos_token | default('', true)) -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message['role'] == 'system' -%}
{{- message['content'] + '\\n' -}}
{%- else -%}
{{- message['role'] | capitalize + ': ' + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

# Frozen's own form for in-context learning (arXiv 2106.13884, section 3): images and text in a row, no roles.
INTERLEAVED_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
"""


@lru_cache(maxsize=64)
def with_media(template: str, tokens: tuple[tuple[str, str], ...], special_tokens: tuple[tuple[str, str], ...]) -> str:
    """The template itself where it renders one image (video, audio) and one text rightly, and a text that is a plain string;
    else the template after what turns lists into strings, or strings into lists.

    Asked by rendering it: text-only templates drop content lists silently, print them as Python lists, or raise; those of
    models that see drop strings. Wrapping the template, instead of changing messages on the way in, keeps what is saved
    complete: every tool that reads `chat_template.jinja` renders the same.
    """

    def renders(candidate: str, content: Any, *expected: str) -> bool:
        chat = [{"role": "user", "content": content}]
        variables: dict[str, Any] = dict(special_tokens)
        try:
            text = render_jinja_template(conversations=[chat], chat_template=candidate, **variables)[0][0]
        except Exception:  # a template may raise whatever it likes
            return False
        return all(text.count(one) == 1 for one in expected) and "'type'" not in text

    mixed = [{"type": modality} for modality, _ in tokens] + [{"type": "text", "text": "fp-probe"}]
    media = "".join(
        _FLATTEN_MEDIUM.replace("MEDIUM", modality).replace("TOKEN", json.dumps(token)) for modality, token in tokens
    )
    for candidate in (template, _FLATTEN_CONTENT.replace("MEDIA", media) + template):
        if renders(candidate, mixed, "fp-probe", *(token for _, token in tokens)):
            takes_strings = renders(candidate, "fp-probe", "fp-probe")
            return candidate if takes_strings else _LIST_CONTENT + candidate
    return template  # made for something else: no images, or the first content item alone


def few_shot_messages(
    support: Sequence[Sequence[Any] | Mapping[str, Any]], query: Any, *, instruction: str | None = None
) -> list[dict[str, Any]]:
    """Frozen's interleaved in-context learning as a conversation (arXiv 2106.13884, section 4.2).

    Per support example a user turn with image (and question) and an assistant turn with the answer; then the query.

    Args:
        support: any number of `(image, answer)`, `(image, question, answer)` or mappings with these names. An image
            may be a list of images.
        query: an image, `(image, question)` or a mapping.
        instruction: task induction, put before the first image.

    Returns: messages for `processor.apply_chat_template(messages, tokenize=True, return_dict=True, …)`. With
    `chat_template=INTERLEAVED_CHAT_TEMPLATE` they are rendered as in the paper, without roles.
    """

    def user(image: Any, question: str | None) -> dict[str, Any]:
        images = image if isinstance(image, list) else [image]
        content = [{"type": "image", "image": one} for one in images]
        content += [{"type": "text", "text": question}] if question else []
        return {"role": "user", "content": content}

    messages = []
    for index, shot in enumerate(support):
        if isinstance(shot, Mapping):
            image, question, answer = shot.get("image"), shot.get("question"), shot.get("answer")
        elif isinstance(shot, Sequence) and not isinstance(shot, str) and len(shot) in (2, 3):
            image, question, answer = shot[0], shot[1] if len(shot) == 3 else None, shot[-1]
        else:
            raise ValueError(
                f"support[{index}] must be (image, answer), (image, question, answer) or a mapping. [errors.md#shape]"
            )
        if image is None or not isinstance(answer, str):
            raise ValueError(
                f"support[{index}] needs an image and an answer (a string); got answer={answer!r}. [errors.md#shape]"
            )
        messages += [user(image, question), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    if isinstance(query, Mapping):
        messages.append(user(query.get("image"), query.get("question")))
    else:
        messages.append(user(*query) if isinstance(query, tuple) else user(query, None))
    if instruction:
        messages[0]["content"].insert(0, {"type": "text", "text": instruction})
    return messages


__all__ = ["DEFAULT_CHAT_TEMPLATE", "INTERLEAVED_CHAT_TEMPLATE", "few_shot_messages", "with_media"]
