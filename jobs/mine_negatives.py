"""`notellm2 mine-negatives` as a Ray job.

ray job submit --working-dir . -- python jobs/mine_negatives.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["mine-negatives", *sys.argv[1:]])
