"""Spans: whole words that members propose and all of them score."""
