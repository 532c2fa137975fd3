"""`notellm2 eval-retrieval` as a Ray job.

ray job submit --working-dir . -- python jobs/eval_retrieval.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["eval-retrieval", *sys.argv[1:]])
