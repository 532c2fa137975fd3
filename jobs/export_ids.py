"""`notellm2 export-ids` as a Ray job.

ray job submit --working-dir . -- python jobs/export_ids.py --config FILE key=value
"""

import sys

from notellm2_ray.cli import main

if __name__ == "__main__":
    main(["export-ids", *sys.argv[1:]])
