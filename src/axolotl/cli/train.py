"""`python -m axolotl.cli.train config.yml`, also under a launcher, is `axolotl train config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
