"""How probable a text is, to a member alone and to an ensemble."""
