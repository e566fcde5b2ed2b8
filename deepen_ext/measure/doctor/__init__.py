"""What members are worth to one another, before anybody fuses them."""
