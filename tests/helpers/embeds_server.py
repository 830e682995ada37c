"""A server of a bare language model that takes prefixes as vLLM does with `--enable-prompt-embeds`: parts of type
`prompt_embeds` in a chat, and a chat template of the request's. It knows nothing of this package; transformers' `generate()`
reads what it is sent.

    python -m tests.helpers.embeds_server FOLDER PORT
"""

import base64
import io
import json
import sys
import threading
import time
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
from transformers.utils.chat_template_utils import render_jinja_template


SENTINEL = "<prompt_embeds>"


def build(folder: str) -> FastAPI:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    app = FastAPI()

    def inputs(body: dict[str, Any]) -> dict[str, Any]:
        prefixes: list[torch.Tensor] = []
        messages = []
        for message in body["messages"]:
            parts = []
            for part in message["content"]:
                if part["type"] == "prompt_embeds":
                    prefixes.append(torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True).float())
                    parts.append({"type": "text", "text": SENTINEL})
                else:
                    parts.append(part)
            messages.append({**message, "content": parts})
        text = render_jinja_template(conversations=[messages], chat_template=body["chat_template"])[0][0]
        embed = model.get_input_embeddings()
        rows = []
        for index, piece in enumerate(text.split(SENTINEL)):
            ids = tokenizer(piece, add_special_tokens=body.get("add_special_tokens", False) and index == 0)["input_ids"]
            rows += [prefixes[index - 1]] if index else []
            rows += [embed(torch.tensor(ids, dtype=torch.long))]
        embeds = torch.cat(rows)[None]
        bias = {(int(index),): float(value) for index, value in (body.get("logit_bias") or {}).items()}
        options = {"sequence_bias": bias} if bias else {}
        length = {"max_new_tokens": body.get("max_tokens", 16), "do_sample": False}
        if body.get("ignore_eos"):
            length["eos_token_id"] = None
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2]).long(), **options, **length}

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": folder, "object": "model"}]}

    @app.get("/health")
    def health() -> Any:
        return {}

    @app.post("/v1/chat/completions")
    @torch.no_grad()
    def chat(body: dict[str, Any]) -> Any:
        if body["model"] != folder:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        facts = {"id": "x", "created": int(time.time()), "model": folder}
        if not body.get("stream"):
            text = tokenizer.decode(model.generate(**inputs(body))[0], skip_special_tokens=True)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            return {**facts, "object": "chat.completion", "choices": [choice]}
        streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        threading.Thread(target=model.generate, kwargs={**inputs(body), "streamer": streamer}, daemon=True).start()

        def events() -> Any:
            for piece in streamer:
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                yield f"data: {json.dumps({**facts, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    torch.set_num_threads(1)
    # It ends when the pipe does: with the test, however that may end.
    threading.Thread(target=lambda: (sys.stdin.read(), __import__("os")._exit(0)), daemon=True).start()
    uvicorn.run(build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
