"""`python -m axolotl.cli.vllm_serve config.yml` is `axolotl vllm-serve config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["vllm-serve", *sys.argv[1:]])
