"""`notellm2 train-ranker` as a Ray job.

ray job submit --working-dir . -- python jobs/train_ranker.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["train-ranker", *sys.argv[1:]])
