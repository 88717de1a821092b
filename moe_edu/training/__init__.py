"""Training a translator: settings, shards, the training loop, a run and its folder, evaluation."""
