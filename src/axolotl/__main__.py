"""`python -m axolotl` is the command `axolotl`."""

from axolotl.cli.main import main

if __name__ == "__main__":
    main()
