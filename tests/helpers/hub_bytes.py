"""Bytes on the wire for a push, and for a pull by somebody who has the parents already, against a Hub on loopback.

    python -m tests.helpers.hub_bytes

Every client is a process of its own with the real huggingface_hub; the server counts what comes and goes, HTTP headers
included. Beside each figure stand the connector's own bytes and those of its parents.
"""

import tempfile
from pathlib import Path

from tests.helpers.hub_fixtures import Hub


PARENTS = """
import tempfile
from pathlib import Path
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from tests.helpers.tiny import save_parents
sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
tower, words = save_parents(Path(tempfile.mkdtemp()), vision=sizes, text=sizes)
CLIPVisionModel.from_pretrained(tower).push_to_hub("me/tower")
AutoImageProcessor.from_pretrained(tower).push_to_hub("me/tower")
AutoModelForCausalLM.from_pretrained(words).push_to_hub("me/words")
AutoTokenizer.from_pretrained(words).push_to_hub("me/words")
"""

JOIN = """
import json
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained("me/tower", "me/words", connector_type="mlp")
processor = FrozenPrefixProcessor.from_model(model)
print(json.dumps({
    "connector": sum(p.numel() * p.element_size() for p in model.model.connector.parameters()),
    "parents": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
}))
"""

PUSH = """
model.push_to_hub("me/eyes")
processor.push_to_hub("me/eyes")
"""

PULL = """
import modeling_frozen
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained("me/eyes")
AutoProcessor.from_pretrained("me/eyes")
"""


def main() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        hub = Hub(Path(folder))
        try:
            home = hub.new_home()
            hub.run(PARENTS, home=home)
            figures = hub.run_json(JOIN, home=home)
            hub.reset_stats()  # the parents lie in the cache now
            hub.run(JOIN + PUSH, home=home)
            figures["push, sent"] = hub.bytes_in()
            hub.reset_stats()
            hub.run(PULL, home=home)
            figures["pull, received"] = hub.bytes_out()
        finally:
            hub.stop()
    for name, count in figures.items():
        print(f"{name:<16} {count:>12,} bytes")
    return figures


if __name__ == "__main__":
    main()
