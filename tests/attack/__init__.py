"""Clients that mean harm, against a server in a process of its own."""
