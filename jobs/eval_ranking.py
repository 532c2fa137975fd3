"""`notellm2 eval-ranking` as a Ray job.

ray job submit --working-dir . -- python jobs/eval_ranking.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["eval-ranking", *sys.argv[1:]])
