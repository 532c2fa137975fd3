"""`notellm2 swap-embedder` as a Ray job.

ray job submit --working-dir . -- python jobs/swap_embedder.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["swap-embedder", *sys.argv[1:]])
