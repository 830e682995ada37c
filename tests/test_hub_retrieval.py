"""A retrieval model on the Hub: pushed once, it retrieves the same elsewhere, with this package and without, and captions."""

import json

import pytest

from tests.helpers.hub_fixtures import Hub, module_hub  # noqa: F401


pytestmark = pytest.mark.hub

ASK = """
import json
from PIL import Image
def ask(model, processor):
    image = Image.new("RGB", (20, 18), (200, 30, 30))
    inputs = processor.tokenizer(["a red square", "blue"], padding=True, return_tensors="pt")
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    return model(inputs["input_ids"], pixels, inputs["attention_mask"]).logits_per_image.tolist()
"""

PUSH = (
    ASK
    + """
import tempfile
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from modeling_frozen import FrozenPrefixForImageTextRetrieval, FrozenPrefixProcessor
from tests.helpers.tiny import save_parents

tower, words = save_parents(Path(tempfile.mkdtemp()))
CLIPVisionModel.from_pretrained(tower).push_to_hub("me/tower")
AutoImageProcessor.from_pretrained(tower).push_to_hub("me/tower")
AutoModelForCausalLM.from_pretrained(words).push_to_hub("me/words")
AutoTokenizer.from_pretrained(words).push_to_hub("me/words")
model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained("me/tower", "me/words", text_pooling="ret")
processor = FrozenPrefixProcessor.from_model(model)
model.push_to_hub("me/retrieval")
processor.push_to_hub("me/retrieval")
print(json.dumps(ask(model, processor)))
"""
)

PULL = (
    ASK
    + """
from transformers import AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
trust = {trust!r}
if trust is None:
    import modeling_frozen
model = AutoModelForZeroShotImageClassification.from_pretrained("me/retrieval", trust_remote_code=trust)
processor = AutoProcessor.from_pretrained("me/retrieval", trust_remote_code=trust)
writer = AutoModelForImageTextToText.from_pretrained("me/retrieval", trust_remote_code=trust)
classify = pipeline("zero-shot-image-classification", model="me/retrieval", trust_remote_code=trust)
labels = classify(Image.new("RGB", (20, 18), (200, 30, 30)), candidate_labels=["red", "blue"])
print(json.dumps({{
    "answers": ask(model, processor), "module": type(model).__module__, "writes": type(writer).__name__,
    "labels": sorted(one["label"] for one in labels),
}}))
"""
)


@pytest.mark.bits
@pytest.mark.parametrize("trust", [None, True], ids=["with the package", "without it"])
def test_pulled_elsewhere_it_finds_the_same(module_hub: Hub, pushed: list, trust: bool | None) -> None:  # noqa: F811
    pulled = json.loads(module_hub.run(PULL.format(trust=trust), package=trust is None).splitlines()[-1])
    assert pulled["answers"] == pushed
    assert pulled["module"].startswith("modeling_frozen" if trust is None else "transformers_modules")
    assert pulled["writes"] == "FrozenPrefixForConditionalGeneration" and pulled["labels"] == ["blue", "red"]


@pytest.fixture(scope="module")
def pushed(module_hub: Hub) -> list:  # noqa: F811
    """A retrieval model and its parents on the Hub; what it said before."""
    return json.loads(module_hub.run(PUSH).splitlines()[-1])
