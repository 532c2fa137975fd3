"""`notellm2 summarize-images` as a Ray job.

ray job submit --working-dir . -- python jobs/summarize_images.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["summarize-images", *sys.argv[1:]])
