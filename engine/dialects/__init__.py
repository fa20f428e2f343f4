"""The command lines of other projects, one file each: their flags -> ours, with their defaults."""
