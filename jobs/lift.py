"""`notellm2 lift` as a Ray job.

ray job submit --working-dir . -- python jobs/lift.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["lift", *sys.argv[1:]])
