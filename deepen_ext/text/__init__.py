"""Token ids and bytes: vocabularies as bytes, texts that grow, cuts, whole characters."""
