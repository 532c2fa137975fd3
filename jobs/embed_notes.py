"""`notellm2 embed-notes` as a Ray job.

ray job submit --working-dir . -- python jobs/embed_notes.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["embed-notes", *sys.argv[1:]])
