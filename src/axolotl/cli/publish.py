"""`python -m axolotl.cli.publish config.yml` is `axolotl publish config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["publish", *sys.argv[1:]])
