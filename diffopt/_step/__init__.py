"""One pure step, its derivatives, and what it was seen to use."""
