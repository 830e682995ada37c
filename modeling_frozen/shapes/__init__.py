"""A little world for a first try without a network: pictures of one coloured shape, sentences and questions about them
(`scenes.py`), and two tiny parents that never met (`parents.py`).

    python -m modeling_frozen.shapes --output_dir shapes    # parents and data, for any script that takes folders

The language model reads sentences and never meets a picture; the tower looks at pictures, labelled by numbers, and never
meets a word. A fifth of all scenes is held out: no picture and no sentence of theirs is seen by anybody in training.
"""
