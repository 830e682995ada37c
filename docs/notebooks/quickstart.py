# %% [markdown]
# # A language model gets eyes
#
# SmolLM2 has never met an image, and MobileNetV2 has never met a word. Both stay frozen; a connector between them
# learns from 762 captioned photos to write what the tower saw as ten vectors that the language model reads among its
# words.
#
# A few minutes on two processor cores, so don't expect much: what it shows is how far that gets, beside the same
# model *blind*.
#
# ```
# pip install "frozen-prefix[quickstart]"
# ```

# %% [markdown]
# ## Join two models

# %%
# %matplotlib inline
from modeling_frozen import FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor
from transformers import set_seed

set_seed(0)
model = FrozenPrefixForConditionalGeneration.from_vision_text_pretrained(
    "google/mobilenet_v2_1.0_224",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    connector_type="mlp",
    prefix_length=10,
    vision_feature_select_strategy="pooled",  # one vector of a photo, from which the connector writes the whole prefix
)
processor = FrozenPrefixProcessor.from_model(model)
trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
print(f"{trained:,} of {model.num_parameters():,} parameters train: {sorted(model.config.trainable)}")

# %% [markdown]
# ## Photos with captions
#
# The question is asked in the language model's own chat format. The tower looks at each photo once, and its features
# are kept.

# %%
from modeling_frozen import cache_vision_features, load_image_text

prompt = processor.chat_prompt("Describe the photo.")
print(prompt)


def as_answers(row):
    return {"prompt": prompt, "answer": [caption.strip().replace(" .", ".") for caption in row["text"]]}


splits = {}
for split in ("train", "validation", "test"):
    rows = load_image_text("jxie/flickr8k", split=split)
    splits[split] = rows.select(range(min(len(rows), 800))).map(as_answers, remove_columns=["text"])
train = cache_vision_features(splits["train"], model, processor)
validation = cache_vision_features(splits["validation"], model, processor)

# %% [markdown]
# ## Train the connector
#
# All five captions of a photo are learnt behind one reading of it. `SightCallback` compares, every 40 steps, the loss
# on photos with the loss on the same captions with the photos exchanged: while that makes no difference, the model is
# blind, however the loss falls.

# %%
from modeling_frozen import DataCollatorForFrozenPrefix
from modeling_frozen.training.sight import SightCallback
from transformers import Trainer, TrainingArguments

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "training",
        max_steps=120,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=8,
        weight_decay=0.05,
        adam_beta2=0.98,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,  # the collator reads the image column
        report_to="none",
    ),
    train_dataset=train,
    data_collator=DataCollatorForFrozenPrefix(processor, all_texts=True),
    processing_class=processor,
    callbacks=[SightCallback(validation, DataCollatorForFrozenPrefix(processor), every=40)],
)
result = trainer.train()

# %%
from modeling_frozen.evaluation.plots import plot_training

plot_training(trainer)

# %% [markdown]
# ## Beside blind
#
# The score alone says little: a language model guesses well. *Blind* is the same model with each photo exchanged for
# another.

# %%
from modeling_frozen.evaluation import evaluate

test = splits["test"].select(range(min(len(splits["test"]), 40)))
scores = evaluate(model, processor, test, kinds=("sighted", "blind", "random_connector"), max_new_tokens=20, batch_size=20)
print(scores.table())

# %% [markdown]
# ## Ask
#
# Photos of another source, COCO, with what the model says of each. Some of it is right, some is not: minutes of
# training on a few hundred photos of people and dogs leave it with people and dogs.

# %%
from modeling_frozen.evaluation.plots import new_figure, show_image

COCO = "http://images.cocodataset.org/"
photos = [
    f"{COCO}val2017/000000377575.jpg", f"{COCO}val2017/000000214753.jpg", f"{COCO}val2017/000000199055.jpg",
    f"{COCO}val2017/000000405279.jpg", f"{COCO}val2017/000000500663.jpg", f"{COCO}val2017/000000099053.jpg",
]  # fmt: skip
inputs = processor(images=photos, text=[prompt] * len(photos), padding=True, return_tensors="pt")
ids = model.generate(**inputs, num_beams=3, max_new_tokens=24)
said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

figure = new_figure(10.5, 6.6)
for place, photo, words in zip(figure.subplots(2, 3).flat, photos, said):
    show_image(place, photo)
    place.set_xlabel(words.strip(), fontsize=10, wrap=True)
figure

# %% [markdown]
# A question of your own: it learnt captions alone, so an answer is a caption that was asked for. For questions, train
# on questions, as in [your own data](own_data.ipynb).

# %%
question = processor.chat_prompt("What is the dog doing?")
inputs = processor(images=photos[0], text=question, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

# %% [markdown]
# ## Save it, and load it again
#
# What is saved is the connector; loading fetches both parents, checks that they are the ones it was trained with, and
# joins them.

# %%
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

model.save_pretrained("eyes")
processor.save_pretrained("eyes")
print(f"{sum(file.stat().st_size for file in Path('eyes').iterdir()) / 1e6:.1f} MB")

again = AutoModelForImageTextToText.from_pretrained("eyes")
inputs = AutoProcessor.from_pretrained("eyes")(images=photos[0], text=question, return_tensors="pt")
print((again.generate(**inputs, max_new_tokens=24, do_sample=False) == ids).all().item())

# %% [markdown]
# Next: [look inside](look_inside.ipynb) this model. `frozen-prefix demo eyes` is a page to drop photos into.
#
# Photos of COCO 2017, made smaller; each belongs to its photographer on Flickr, under
# [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/):
# [377575](https://www.flickr.com/photo.gne?id=3937557668), [214753](https://www.flickr.com/photo.gne?id=8392128987),
# [199055](https://www.flickr.com/photo.gne?id=5134639056), [405279](https://www.flickr.com/photo.gne?id=443807489),
# [500663](https://www.flickr.com/photo.gne?id=4046745441), [99053](https://www.flickr.com/photo.gne?id=5884430904).
