"""Which settings an ensemble should have."""
