"""One sparse layer: router, dispatch, experts, losses and metrics, and all of it once more as plain loops."""
