"""Names and file formats of other projects, as streams of (our name, tensor)."""
