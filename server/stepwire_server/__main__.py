"""`python -m stepwire_server`: the command `stepwire`, for a machine without it on the PATH."""

from stepwire_server.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
