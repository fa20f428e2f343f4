"""export.py: a run, or a checkpoint, in the formats of other projects; and the average of checkpoints."""
