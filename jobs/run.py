"""`notellm2 run` as a Ray job.

ray job submit --working-dir . -- python jobs/run.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
