"""What every folder may use and that knows nothing of models: checks of numbers, the cache folder."""
