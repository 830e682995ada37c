"""What the code of README and docs/ finds when it is run: tiny parents under the ids that pages name, on the tests' Hub, and a
folder with data, photos and a checkpoint, as a user has them.

    hub.add_user("me", hub.token, orgs=OWNERS)                                       # once a Hub
    hub.run("from tests.helpers.docs_world import fill; fill()")
    hub.run("from tests.helpers.docs_world import run; run('docs/quickstart.md')")   # a page, in an empty folder

The blocks of a page run one after another in one namespace. It holds `model`, `processor`, `image`, `images`, `captions` and
`rows` from the start, so that a page about one thing need not join a model first; of the pages in `MORE`, what they say how to
get in words. `python -m tests.helpers.docs_world PAGE` runs a page in a folder that is laid out, as `torchrun` starts it.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
TOWERS = (
    "google/siglip2-base-patch16-224", "facebook/dinov2-small", "openai/clip-vit-base-patch32",
    "facebook/dinov2-with-registers-base", "google/mobilenet_v2_1.0_224",
)  # fmt: skip
LANGUAGE_MODELS = (
    "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf", "me/my-language-model",
)  # fmt: skip
AUDIO, TRANSLATOR, READER = "openai/whisper-tiny", "google-t5/t5-small", "sentence-transformers/all-MiniLM-L6-v2"
CAPTIONS = "jxie/flickr8k"
OWNERS = tuple({name.partition("/")[0] for name in (*TOWERS, *LANGUAGE_MODELS, AUDIO, TRANSLATOR, READER, CAPTIONS)} - {"me"})
CHAT = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a page in a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start(3)) + 1, re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE))
        for found in FENCE.finditer(text)
        if found[2] == language
    ]


def _upload(name: str, folder: Any, kind: str = "model") -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(name, repo_type=kind)
    HfApi().upload_folder(repo_id=name, folder_path=folder, repo_type=kind)


def _spoken() -> Any:
    from tests.helpers import tiny

    return tiny.tokenizer([*tiny.WORDS, "user", "assistant", "system", "<|im_start|>"], bos=False, chat_template=CHAT)


def serve(**text: int) -> None:
    """Puts on the Hub what others have put there: towers and language models (`text`: other sizes of these), and photos with
    captions."""
    from datasets import Dataset

    from tests.helpers import tiny

    spoken = _spoken()
    sizes = {"vocab_size": len(spoken) + 7, "max_position_embeddings": 512, **text}
    tower, language_model = tiny.save_parents(Path("parents"), text=sizes)
    spoken.save_pretrained(language_model)
    for name, folder in {**dict.fromkeys(TOWERS, tower), **dict.fromkeys(LANGUAGE_MODELS, language_model)}.items():
        _upload(name, folder)
    Path("squares/data").mkdir(parents=True)
    Dataset.from_list(tiny.rows(16)).to_parquet("squares/data/train.parquet")
    _upload("me/photos", "squares", "dataset")
    Path("captions/data").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        captioned = [{"image": row["image"], **{f"caption_{n}": row["text"] for n in range(5)}} for row in tiny.rows(16)]
        Dataset.from_list(captioned).to_parquet(f"captions/data/{split}-00000-of-00001.parquet")
    _upload(CAPTIONS, "captions", "dataset")


def fill(connector: dict[str, Any] | None = None, **text: int) -> None:
    """Puts every repository that pages name on the Hub, "me/eyes" with another connector if asked."""
    import torch
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from tests.helpers.audio_towers import AUDIO_TOWERS

    serve(**text)
    spoken = _spoken()
    config, kind, extractor = AUDIO_TOWERS["whisper"]
    kind(config).save_pretrained("audio")
    extractor().save_pretrained("audio")
    _upload(AUDIO, "audio")
    torch.manual_seed(0)
    t5 = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=len(spoken), decoder_start_token_id=0,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(t5).save_pretrained("t5")
    spoken.save_pretrained("t5")
    _upload(TRANSLATOR, "t5")
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(spoken), **bert)).save_pretrained("bert")
    spoken.save_pretrained("bert")
    _upload(READER, "bert")
    model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
        TOWERS[0], LANGUAGE_MODELS[0], connector_type="resampler", **connector or {"prefix_length": 4}
    )
    model.push_to_hub("me/eyes")
    FrozenPrefixProcessor.from_model(model).push_to_hub("me/eyes")
    model.push_to_hub("me/other-eyes")


def lay_out() -> None:
    """Fills the present folder with what a user has there."""
    from datasets import Dataset

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from tests.helpers import formats, tiny

    formats.lay_out(Path("."))
    images = _images()
    for name in ("photo.jpg", "photo.png", "first.jpg", "second.jpg", "a.jpg", "b.jpg"):
        images[0].save(name)
    Path("photos").mkdir()
    for number, image in enumerate(images):
        image.save(f"photos/{number}.jpg")
    lines = [f"{number}.jpg,a {name} square ." for number, name in enumerate(tiny.COLOURS)]
    Path("photos/metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    Path("shards").mkdir()
    rows = Dataset.from_list(tiny.rows(16))
    for number in range(4):
        rows.shard(4, number).to_parquet(f"shards/{number}.parquet")
    for part in (FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor):
        part.from_pretrained("me/eyes").save_pretrained("eyes")


def _images() -> list[Any]:
    from PIL import Image

    from tests.helpers import tiny

    return [Image.new("RGB", (40, 32), colour) for colour in tiny.COLOURS.values()]


def names_of(page: str) -> dict[str, Any]:
    """What the namespace of a page begins with, in a folder that is laid out."""
    from datasets import Dataset

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from tests.helpers import tiny

    names = {
        "model": FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes"),
        "processor": FrozenPrefixProcessor.from_pretrained("me/eyes"),
        "image": _images()[0],
        "images": _images(),
        "captions": [row["text"] for row in tiny.rows(4)],
        "rows": Dataset.from_list(tiny.rows(16)),
    }
    return names | (MORE[page](names) if page in MORE else {})


def _trainer(names: dict[str, Any]) -> dict[str, Any]:
    """One that was stopped at its second step."""
    from transformers import Trainer, TrainingArguments

    from modeling_frozen import DataCollatorForFrozenPrefix

    chosen = {
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    trainer = Trainer(
        names["model"], TrainingArguments("out", report_to="none", **chosen),
        train_dataset=names["rows"], data_collator=DataCollatorForFrozenPrefix(names["processor"]),
    )  # fmt: skip
    trainer.train()
    trainer.args.max_steps = 3
    return {"trainer": trainer}


def _clients(names: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's client, of several servers (`SERVERS`: model to address); a question; an adapter that holds the connector."""
    import openai
    from peft import get_peft_model

    from modeling_frozen import FrozenPrefixForConditionalGeneration
    from modeling_frozen.training.lora import lora_config

    clients = {model: openai.OpenAI(base_url=url, api_key="none") for model, url in json.loads(os.environ["SERVERS"]).items()}

    def create(model: str, **request: Any) -> Any:
        answer = clients[model].chat.completions.create(model=model, max_tokens=4, **request)
        assert answer.choices[0].message.content is not None
        return answer

    tuned = FrozenPrefixForConditionalGeneration.from_pretrained("eyes")
    get_peft_model(tuned, lora_config(tuned, r=2)).save_pretrained("tuned")
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    return {"client": client, "messages": [{"role": "user", "content": "what colour ?"}]}


MORE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "docs/several_devices.md": _trainer,
    "docs/vllm.md": _clients,
}


def run(name: str) -> None:
    """Runs the Python blocks of a page; an error shows the page's own line."""
    if not Path("eyes").is_dir():
        lay_out()
    names = names_of(name)
    for line, block in blocks(ROOT / name, "python"):
        exec(compile("\n" * (line - 1) + block, str(ROOT / name), "exec"), names)


if __name__ == "__main__":
    run(sys.argv[1])
