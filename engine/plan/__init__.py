"""What a run needs, known beforehand; and what it does with the memory that it finds."""
