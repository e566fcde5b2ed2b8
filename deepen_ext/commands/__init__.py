"""The commands of `deepen-ext`, one a file."""
