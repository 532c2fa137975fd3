"""`notellm2 build-tiny-mllm` as a Ray job.

ray job submit --working-dir . -- python jobs/build_tiny_mllm.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["build-tiny-mllm", *sys.argv[1:]])
