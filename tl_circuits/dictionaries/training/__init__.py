"""Training of transcoders: text, the model's own samples, one step of all layers, checkpoints, and progress."""
