"""Training beyond `Trainer` itself: LoRA on the language model, streams that are resumed."""
