"""`python -m emu`, and the script `emu`."""

import sys


def main() -> int:
    """Run the command line."""
    from emu.cli.app import main as run_main

    return run_main()


if __name__ == "__main__":
    sys.exit(main())
