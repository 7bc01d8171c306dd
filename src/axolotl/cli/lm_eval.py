"""`python -m axolotl.cli.lm_eval config.yml` is `axolotl lm-eval config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["lm-eval", *sys.argv[1:]])
