"""`notellm2 prepare` as a Ray job.

ray job submit --working-dir . -- python jobs/prepare.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
