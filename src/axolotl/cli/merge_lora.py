"""`python -m axolotl.cli.merge_lora config.yml` is `axolotl merge-lora config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["merge-lora", *sys.argv[1:]])
