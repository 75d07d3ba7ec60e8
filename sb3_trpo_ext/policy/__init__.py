"""π_θ on a batch: surrogate, KL divergence, Fisher products."""
