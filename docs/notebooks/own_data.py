# %% [markdown]
# # Your own data
#
# Questions and answers about images, in the JSON that LLaVA made common: check them, train, ask, compare with blind.
# The images here are drawn by the notebook, so that there is something to train on; put your own JSON in their place.
#
# ```
# pip install "frozen-prefix[quickstart]"
# ```

# %% [markdown]
# ## The data
#
# `llava.json` and the images beside it: two questions about each image. The images of the test are drawn anew, at other
# places, in other sizes and shades; nobody has seen them.

# %%
# %matplotlib inline
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
SHAPES = {"square": 4, "triangle": 3, "circle": 0, "hexagon": 6}
rng = random.Random(0)


def draw(colour, shape):
    shade = rng.randrange(200, 256)
    image = Image.new("RGB", (224, 224), (shade, shade, shade))
    x, y, size = rng.randrange(80, 144), rng.randrange(80, 144), rng.randrange(40, 70)
    pencil = ImageDraw.Draw(image)
    if shape == "circle":
        pencil.ellipse([x - size, y - size, x + size, y + size], fill=COLOURS[colour])
    else:
        pencil.regular_polygon((x, y, size), SHAPES[shape], rotation=rng.randrange(-15, 16), fill=COLOURS[colour])
    return image


def write(name, count, questions):
    rows = []
    for number in range(count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
        file = f"images/{name}_{number}.png"
        draw(colour, shape).save(file)
        asked = [("What colour is it?", f"It is {colour}."), ("What shape is it?", f"It is a {shape}.")]
        turns = []
        for question, answer in rng.sample(asked, questions):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append({"id": str(number), "image": file, "conversations": turns})
    Path(name).with_suffix(".json").write_text(json.dumps(rows, indent=1))
    return rows


Path("images").mkdir(exist_ok=True)
rows = write("llava", 320, questions=2)
write("test", 48, questions=1)
print(json.dumps(rows[0], indent=1))

# %% [markdown]
# ## Check it before the first step
#
# Files that are not there, `<image>` that no image comes for, rows with nothing to learn, images that are cut off:
# one line each. Here is nothing to say, so an entry is broken first.

# %%
broken = [*rows[:5], {**rows[5], "image": "images/gone.png"}, {**rows[6], "conversations": rows[6]["conversations"][:1]}]
characters = Path("broken.json").write_text(json.dumps(broken))

# %%
# !frozen-prefix check broken.json

# %%
# !frozen-prefix check llava.json

# %% [markdown]
# ## Train

# %%
from modeling_frozen import (
    DataCollatorForFrozenPrefix,
    FrozenPrefixForConditionalGeneration,
    FrozenPrefixProcessor,
    cache_vision_features,
    load_image_text,
)
from transformers import Trainer, TrainingArguments, set_seed

set_seed(0)
model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
    "google/mobilenet_v2_1.0_224",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    connector_type="mlp",
    prefix_length=4,
    vision_feature_select_strategy="pooled",
)
processor = FrozenPrefixProcessor.from_model(model)
data = load_image_text("llava.json")
print(data[0]["messages"])

# %%
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "training",
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=cache_vision_features(data, model, processor),  # the tower looks at each image once
    data_collator=DataCollatorForFrozenPrefix(processor),  # the assistant's turns are learnt, and their end
    processing_class=processor,
)
result = trainer.train()

# %% [markdown]
# ## Beside blind
#
# Blind, each image is exchanged for another: what is right then was guessed.

# %%
from modeling_frozen.evaluation import evaluate

test = load_image_text("test.json")
scores = evaluate(model, processor, test, kinds=("sighted", "blind"), max_new_tokens=8, batch_size=16)
print(scores.table())
right = {
    kind: [float(said.strip() == answers[0].strip()) for said, answers in zip(predictions, scores.references)]
    for kind, predictions in scores.predictions.items()
}
for kind, some in right.items():
    print(f"{kind}: {sum(some):.0f} of {len(some)} answers are right")

# %% [markdown]
# ## What went right and what went wrong

# %%
from modeling_frozen.evaluation.plots import plot_sheet

said = scores.predictions["sighted"]
questions = [row["messages"][0]["content"][-1]["text"].strip() for row in test]
plot_sheet(
    [row["images"][0] for row in test],
    [f"{question} {answer}" for question, answer in zip(questions, said)],
    scores.references,
    right["sighted"],
    each=2,
    score_name="right",
)

# %% [markdown]
# ## Ask in turns


# %%
def turn(role, *content):
    return {"role": role, "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]}


def answer(chat):
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


chat = [turn("user", {"type": "image", "image": "images/test_0.png"}, "What shape is it?")]
print(answer(chat))
chat += [turn("assistant", answer(chat)), turn("user", "What colour is it?")]
print(answer(chat))

# %% [markdown]
# [Data formats](../data.md) lists what else is read the same way. With less than some 10,000 rows of real photos,
# start from a connector that has learnt captions, at a lower rate: [questions on your own JSON](../questions.md).
