"""Everything that happens around a model: configuration, data, the loop, checkpoints, evaluation, generation."""
