"""One sparse layer: router, dispatch, experts, losses and metrics, and the slow, obvious form of it all."""
