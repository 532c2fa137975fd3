"""`notellm2 score-candidates` as a Ray job.

ray job submit --working-dir . -- python jobs/score_candidates.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["score-candidates", *sys.argv[1:]])
