"""Durable state: the log of steps, checkpoints, epochs, and what is kept of them."""
