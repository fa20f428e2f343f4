"""From rows on disk to packs: text, token layout, images, packing, order."""
