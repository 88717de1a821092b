"""The encoder, the decoder and the translator; generation, checkpoints, and the model that ships."""
