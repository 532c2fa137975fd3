"""`notellm2 build-tiny` as a Ray job.

ray job submit --working-dir . -- python jobs/build_tiny.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["build-tiny", *sys.argv[1:]])
