"""Drafts: who writes ahead, how far, and at what price."""
