"""What the code of README and docs/ finds when it is run: tiny parents under the ids that pages name, on the tests' Hub, and a
folder with data, photos and a checkpoint, as a user has them.

    hub.add_user("me", hub.token, orgs=OWNERS)                                       # once a Hub
    hub.run("from tests.helpers.docs_world import fill; fill()")
    hub.run("from tests.helpers.docs_world import run; run('docs/quickstart.md')")   # a page, in an empty folder

The blocks of a page run one after another in one namespace. It holds `model`, `processor`, `image`, `images`, `captions` and
`rows` from the start, so that a page about one thing need not join a model first.
"""

import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
TOWERS = (
    "google/siglip2-base-patch16-224", "facebook/dinov2-small", "openai/clip-vit-base-patch32",
    "facebook/dinov2-with-registers-base", "google/mobilenet_v2_1.0_224",
)  # fmt: skip
LANGUAGE_MODELS = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "me/my-language-model")
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


def serve() -> None:
    """Puts on the Hub what others have put there: towers and language models, and photos with captions."""
    from datasets import Dataset

    from tests.helpers import tiny

    spoken = _spoken()
    sizes = {"vocab_size": len(spoken) + 7, "max_position_embeddings": 512}
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


def fill() -> None:
    """Puts every repository that pages name on the Hub."""
    import torch
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from tests.helpers.audio_towers import AUDIO_TOWERS

    serve()
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
        TOWERS[0], LANGUAGE_MODELS[0], connector_type="resampler", prefix_length=4
    )
    model.push_to_hub("me/eyes")
    FrozenPrefixProcessor.from_model(model).push_to_hub("me/eyes")
    model.push_to_hub("me/other-eyes")


def lay_out() -> dict[str, Any]:
    """Fills the present folder; returns what the namespace of a page begins with."""
    from datasets import Dataset
    from PIL import Image

    from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
    from tests.helpers import formats, tiny

    formats.lay_out(Path("."))
    images = [Image.new("RGB", (40, 32), colour) for colour in tiny.COLOURS.values()]
    for name in ("photo.jpg", "photo.png", "first.jpg", "second.jpg"):
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
    model = FrozenPrefixForConditionalGeneration.from_pretrained("me/eyes")
    processor = FrozenPrefixProcessor.from_pretrained("me/eyes")
    for part in (model, processor):
        part.save_pretrained("eyes")
    captions = [row["text"] for row in tiny.rows(4)]
    return {
        "model": model, "processor": processor, "image": images[0], "images": images, "captions": captions, "rows": rows,
    }  # fmt: skip


def run(name: str) -> None:
    """Runs the Python blocks of a page; an error shows the page's own line."""
    names = lay_out()
    for line, block in blocks(ROOT / name, "python"):
        exec(compile("\n" * (line - 1) + block, str(ROOT / name), "exec"), names)
