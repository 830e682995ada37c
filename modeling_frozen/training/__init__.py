"""Training beyond `Trainer` itself: recommended arguments, LoRA on the language model, streams that are resumed, callbacks,
checkpoints on several devices."""
