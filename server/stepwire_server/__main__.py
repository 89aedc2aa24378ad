"""The command `stepwire`, and `python -m stepwire_server` for a machine without it on the PATH."""

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command. Ctrl-C ends it without a trace also while its modules load."""
    try:
        from stepwire_server.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except ModuleNotFoundError as missing:
        if missing.name != "typer":
            raise
        print("stepwire: the command needs the server's packages: pip install 'stepwire[server]'", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
