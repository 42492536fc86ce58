"""Makes ``python -m speclm`` the `speclm` command."""

from speclm.cli import main

if __name__ == "__main__":
    main()
