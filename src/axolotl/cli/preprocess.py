"""`python -m axolotl.cli.preprocess config.yml`, also under a launcher, is `axolotl preprocess config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["preprocess", *sys.argv[1:]])
