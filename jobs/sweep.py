"""`notellm2 sweep` as a Ray job.

ray job submit --working-dir . -- python jobs/sweep.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
