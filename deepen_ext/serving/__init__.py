"""An ensemble as a service: many texts, asked for at any time, written side by side by one loop."""
