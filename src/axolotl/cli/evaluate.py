"""`python -m axolotl.cli.evaluate config.yml`, also under a launcher, is `axolotl evaluate config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
