"""What runs observe about drafts: the time of forward passes, and which tokens stood."""
