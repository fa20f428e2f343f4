"""From weight files to a filled model: reading, quantising, keeping what was quantised."""
