"""`notellm2 run-retrieval` as a Ray job.

ray job submit --working-dir . -- python jobs/run_retrieval.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["run-retrieval", *sys.argv[1:]])
