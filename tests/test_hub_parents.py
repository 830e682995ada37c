# ruff: noqa: F811 (fixtures are imported by name)
"""Parents on the Hub: known again by commit and by the hashes that the Hub gives its files, in a GGUF file too."""

import pytest

from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401


pytestmark = pytest.mark.hub

SETUP = """
import json, pathlib, hashlib
from huggingface_hub import HfApi
from modeling_frozen import FrozenPrefixForConditionalGeneration as Model, FrozenPrefixProcessor
from tests.helpers import tiny

def upload(name, folder):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)

tower, words = tiny.save_parents(pathlib.Path("parents"))
"""


def test_a_whole_digest_is_that_of_the_hubs_hashes_and_reads_nothing(module_hub: Hub) -> None:
    facts = module_hub.run_json(
        SETUP
        + """
import builtins
from modeling_frozen.backbones import fingerprint
upload("me/tower", tower)
upload("me/words", words)
model = Model.from_vision_text_pretrained("me/tower", "me/words", full_fingerprint=True)
model.save_pretrained("eyes")
record = model.config.text_base_model
opened, plain = [], open
builtins.open = lambda file, *args, **kwargs: (opened.append(str(file)), plain(file, *args, **kwargs))[1]
of_cache = fingerprint("me/words", record["revision"], full=True)
builtins.open = plain
again = Model.from_pretrained("eyes")
print(json.dumps({
    "recorded": record["fingerprint"], "cache": of_cache, "folder": fingerprint(words, full=True),
    "same": tiny.same_logits(model, again), "opened": [file for file in opened if file.endswith("safetensors")],
    "files": "processor_files" in record,
}))
"""
    )
    assert facts["recorded"].startswith("full:") and facts["recorded"] == facts["cache"] == facts["folder"]
    assert facts["same"] and not facts["opened"] and not facts["files"]


def test_a_gguf_file_is_taken_at_its_commit(module_hub: Hub) -> None:
    pytest.importorskip("gguf", reason="GGUF files are read and written by the package gguf")
    facts = module_hub.run_json(
        SETUP
        + """
from tests.helpers.gguf_files import write_gguf
upload("me/eye", tower)
upload("me/gguf", write_gguf(pathlib.Path("gguf/words.gguf")))
model = Model.from_vision_text_pretrained("me/eye", "me/gguf", text_gguf_file="words.gguf")
model.save_pretrained("eyes")
HfApi().upload_file(
    repo_id="me/gguf", path_in_repo="words.gguf",
    path_or_fileobj=write_gguf(pathlib.Path("other/words.gguf"), seed=1) + "/words.gguf",
)
again = Model.from_pretrained("eyes")
processor = FrozenPrefixProcessor.from_model(again)
print(json.dumps({
    "record": again.config.text_base_model, "same": tiny.same_logits(model, again),
    "id": processor.image_token_id == model.config.image_token_id,
}))
"""
    )
    assert facts["same"] and facts["id"]
    assert len(facts["record"]["revision"]) == 40 and facts["record"]["gguf_file"] == "words.gguf"
