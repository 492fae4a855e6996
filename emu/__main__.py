"""`python -m emu`, and the script `emu`."""

import sys


def main() -> int:
    """Run the command line."""
    try:
        from emu.cli.app import main as run_main

        return run_main()
    except KeyboardInterrupt:  # while importing; afterwards the command line says it itself
        return 130


if __name__ == "__main__":
    sys.exit(main())
