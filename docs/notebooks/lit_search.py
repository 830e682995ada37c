# %% [markdown]
# # Search photos by words: locked-image tuning
#
# LiT (arXiv 2111.07991) locks the image tower and trains the text side until texts lie where their images lie. Here
# MobileNetV2 is locked, and MiniLM, a sentence encoder, learns to find photos: minutes on two processor cores.
#
# ```
# pip install "frozen-prefix[search]"
# ```

# %% [markdown]
# ## Join, and look at each photo once

# %%
# %matplotlib inline
from modeling_frozen import (
    FrozenPrefixForImageTextRetrieval,
    FrozenPrefixProcessor,
    cache_vision_features,
    load_image_text,
)
from transformers import set_seed

set_seed(0)
model = FrozenPrefixForImageTextRetrieval.from_vision_text_pretrained(
    "google/mobilenet_v2_1.0_224",
    "sentence-transformers/all-MiniLM-L6-v2",
    trainable=("connector", "text"),
    vision_feature_select_strategy="pooled",
)
processor = FrozenPrefixProcessor.from_model(model)
rows = load_image_text("jxie/flickr8k", split="train")  # columns: image, text (five captions of each)
features = cache_vision_features(rows, model, processor)
print(f"{len(rows)} photos; images by the {model.config.image_embedding}, texts pooled by {model.config.text_pooling}")

# %% [markdown]
# ## Before training: chance
#
# Recall at k: among so many photos that nobody trained on, how often the right one is among the first k.

# %%
from modeling_frozen.evaluation import evaluate_retrieval

test = load_image_text("jxie/flickr8k", split="test")
images, captions = [row["image"] for row in test], [row["text"] for row in test]
before = evaluate_retrieval(model, processor, images, captions)
{name: round(value, 3) for name, value in before.items()}

# %% [markdown]
# ## Train
#
# The new projections at a high rate, the sentence encoder at a low one: it knows already what lies near what.

# %%
import torch
from modeling_frozen import DataCollatorForFrozenPrefixRetrieval
from transformers import Trainer, TrainingArguments

trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
known = [one for name, one in trained.items() if "language_model" in name]
new = [one for name, one in trained.items() if "language_model" not in name]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "search",
        max_steps=80,
        per_device_train_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=features,
    data_collator=DataCollatorForFrozenPrefixRetrieval(processor),
    processing_class=processor,
    optimizers=(torch.optim.AdamW([{"params": new, "lr": 1e-3}, {"params": known, "lr": 5e-5}]), None),
)
result = trainer.train()

# %%
after = evaluate_retrieval(model, processor, images, captions)
for name in before:
    print(f"{name:<24} {before[name]:8.3f} {after[name]:8.3f}")

# %% [markdown]
# ## Search
#
# Photos of another source, COCO, which were never trained on.

# %%
from modeling_frozen.evaluation.plots import new_figure, show_image
from modeling_frozen.evaluation.retrieval import embed_images, embed_texts
from modeling_frozen.processors import load_rgb_image

COCO = "http://images.cocodataset.org/val2017/"
NUMBERS = (377575, 214753, 199055, 405279, 500663, 99053, 285, 126107, 165518, 577932, 303818, 431848)
gallery = [load_rgb_image(f"{COCO}{number:012}.jpg", "photo") for number in NUMBERS]
places = embed_images(model, processor, gallery)  # (12, width), of length 1: keep them, for an index


def search(words, count=3):
    likeness = (embed_texts(model, processor, [words]) @ places.T)[0]
    return [(index, likeness[index].item()) for index in likeness.topk(count).indices.tolist()]


queries = ["a dog on a leash", "riding a horse by the sea", "someone does a trick on a skateboard", "something to eat"]
figure = new_figure(8.4, 8.6)
for line, words in zip(figure.subplots(len(queries), 3), queries):
    for place, (index, likeness) in zip(line, search(words)):
        show_image(place, gallery[index])
        place.set_xlabel(f"{likeness:.2f}", fontsize=9)
    line[0].set_title(words, loc="left", fontsize=11, fontweight="bold")
figure

# %% [markdown]
# ## Save and load
#
# The trained text side is saved with the projections; the tower stays where it is.

# %%
model.save_pretrained("finder")
processor.save_pretrained("finder")
again = FrozenPrefixForImageTextRetrieval.from_pretrained("finder").eval()
print(torch.equal(embed_texts(again, processor, queries), embed_texts(model.eval(), processor, queries)))

# %% [markdown]
# [Search and classify](../search.md) says what pays, and `python examples/search.py` keeps the photos in a FAISS index.
#
# Photos of COCO 2017, made smaller; each belongs to its photographer on Flickr, under
# [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/):
# [377575](https://www.flickr.com/photo.gne?id=3937557668), [214753](https://www.flickr.com/photo.gne?id=8392128987),
# [199055](https://www.flickr.com/photo.gne?id=5134639056), [405279](https://www.flickr.com/photo.gne?id=443807489),
# [500663](https://www.flickr.com/photo.gne?id=4046745441), [99053](https://www.flickr.com/photo.gne?id=5884430904),
# [285](https://www.flickr.com/photo.gne?id=9138147604), [126107](https://www.flickr.com/photo.gne?id=100911501),
# [165518](https://www.flickr.com/photo.gne?id=7243537732), [577932](https://www.flickr.com/photo.gne?id=5159956078),
# [303818](https://www.flickr.com/photo.gne?id=9604033757), [431848](https://www.flickr.com/photo.gne?id=7802093280).
