"""The contract's generated messages. Never edited; `make proto` writes them."""
