"""Engines: where state lives and how a rule is run over it."""
