"""`notellm2 mine-pairs` as a Ray job.

ray job submit --working-dir . -- python jobs/mine_pairs.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["mine-pairs", *sys.argv[1:]])
