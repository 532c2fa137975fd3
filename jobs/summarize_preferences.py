"""`notellm2 summarize-preferences` as a Ray job.

ray job submit --working-dir . -- python jobs/summarize_preferences.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["summarize-preferences", *sys.argv[1:]])
