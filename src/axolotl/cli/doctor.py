"""`python -m axolotl.cli.doctor --distributed` under torchrun: the links between several machines."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
