"""The members of an ensemble: what each is, where it comes from, and the backends that compute for them."""
