"""The relative space: anchors that all members share, and the relative rows of their tokens."""
