"""`python -m axolotl.cli.inference config.yml`, also under a launcher, is `axolotl inference config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["inference", *sys.argv[1:]])
