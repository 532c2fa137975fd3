"""`notellm2 make-sequences` as a Ray job.

ray job submit --working-dir . -- python jobs/make_sequences.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["make-sequences", *sys.argv[1:]])
