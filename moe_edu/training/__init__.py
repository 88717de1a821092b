"""Training a translator: settings, shards, the loop, a run's folder, evaluation."""
