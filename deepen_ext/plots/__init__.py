"""Results as pictures: plots by matplotlib (extra `plot`), and doctor's page of HTML."""
