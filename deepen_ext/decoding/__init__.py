"""The loop: who takes part in a step, the token that is picked, when a text ends."""
