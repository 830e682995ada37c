# %% [markdown]
# # Look inside
#
# A caption that sounds right may owe nothing to the photo. Three questions to a trained model: which words owe
# something to the image, and how much; to which part of the image; and what the prefix looks like among the words.
#
# It asks the model that [the quickstart](quickstart.ipynb) trained and left in `eyes`; any other checkpoint will do.
#
# ```
# pip install "frozen-prefix[plots]"
# ```

# %%
# %matplotlib inline
from modeling_frozen.processors import load_rgb_image
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_frozen  # noqa: F401  (registers the model)

model = AutoModelForImageTextToText.from_pretrained("eyes").eval()
processor = AutoProcessor.from_pretrained("eyes")
prompt = processor.chat_prompt("Describe the photo.")
COCO = "http://images.cocodataset.org/val2017/"
photos = [load_rgb_image(f"{COCO}{number:012}.jpg", "photo") for number in (377575, 214753, 199055)]


def describe(photo):
    inputs = processor(images=photo, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, num_beams=3, max_new_tokens=24)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


said = [describe(photo) for photo in photos]
print(*said, sep="\n")

# %% [markdown]
# ## Which words owe something to the image
#
# How much less likely each word becomes when the image is exchanged for one of the other two, in nats. A model that
# is blind owes nothing anywhere. Words that any caption has, as "a", owe little.

# %%
from modeling_frozen.interpretation import attention_to_image, nearest_words, sightedness

owed = sightedness(model, processor, photos, said, prompts=prompt)
print(f"{owed.mean:.2f} nats a token")
owed.plot()

# %% [markdown]
# The same for what a person might say. Words that the model would not have thought of cost much, with any image; what
# counts is the difference.

# %%
own = ["A dog stands next to a fire hydrant.", "Two people are riding horses on the beach.", "A boy is riding a skateboard."]
sightedness(model, processor, photos, own, prompts=prompt).plot()

# %% [markdown]
# ## Which part of the image
#
# Cover a part with grey, and see how much less likely the words become: an answer for any tower and any connector.
# Bright is where covering costs most. (This model's connector reads one vector of the whole photo, so attention has
# no places to show.)

# %%
import numpy as np
from modeling_frozen.evaluation.plots import new_figure, show_image

PARTS = 6


def covered(photo):
    """The photo with each of PARTS x PARTS parts covered, and as much around it."""
    for row in range(PARTS):
        for column in range(PARTS):
            pixels = np.array(photo)
            high, wide = (size / PARTS for size in pixels.shape[:2])
            top, left = max(0, int((row - 0.5) * high)), max(0, int((column - 0.5) * wide))
            pixels[top : int((row + 1.5) * high), left : int((column + 1.5) * wide)] = 128
            yield pixels


figure = new_figure(10.5, 3.6)
for place, photo, words in zip(figure.subplots(1, 3), photos, said):
    (sample,) = sightedness(model, processor, photo, words, prompts=prompt, other_images=list(covered(photo))).samples
    lost = (sample.log_likelihood - sample.swapped).sum(dim=1).reshape(PARTS, PARTS)
    show_image(place, photo.convert("L").convert("RGB"))
    place.imshow(lost, alpha=0.55, extent=(-0.5, photo.width - 0.5, photo.height - 0.5, -0.5))
    place.set_xlabel(f"{words}\n{lost.min():.1f} to {lost.max():.1f} nats", fontsize=9, wrap=True)
figure

# %% [markdown]
# ## Where the words look
#
# Attention from each word to each of the ten vectors of the prefix, and how much of all its attention that is.
# Attention is no explanation: a word may look at the prefix and owe nothing to the image. A connector that keeps
# places (`mlp` or `resampler` over all positions of the tower) has this drawn on the photo.

# %%
looked = attention_to_image(model, processor, photos[0], prompt, text=said[0])
looked.plot()

# %% [markdown]
# ## The prefix among the words
#
# The words nearest to each of the prefix's vectors, with their cosine. Prefixes seldom lie near words, and are read
# all the same.

# %%
near = nearest_words(model, processor, photos[0])
print(near.table())

# %%
near.plot()

# %% [markdown]
# `frozen-prefix demo eyes` shows all of this for a photo that you drop into a page, beside the answer of the blind
# model.
#
# Photos of COCO 2017, made smaller; each belongs to its photographer on Flickr, under
# [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/):
# [377575](https://www.flickr.com/photo.gne?id=3937557668), [214753](https://www.flickr.com/photo.gne?id=8392128987),
# [199055](https://www.flickr.com/photo.gne?id=5134639056).
