"""`python -m axolotl.cli.merge_sharded_fsdp_weights config.yml` is `axolotl merge-sharded-fsdp-weights config.yml`."""

import sys

from axolotl.cli.main import main

if __name__ == "__main__":
    main(["merge-sharded-fsdp-weights", *sys.argv[1:]])
