"""Data: the formats that people bring, collators, batches of like length, augmentation, the store of tower features."""
