"""`notellm2 build-index` as a Ray job.

ray job submit --working-dir . -- python jobs/build_index.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["build-index", *sys.argv[1:]])
