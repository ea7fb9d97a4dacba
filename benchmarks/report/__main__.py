"""``python -m benchmarks.report RESULTS.json --out FOLDER``."""

import sys

from benchmarks.report.tables import main

if __name__ == "__main__":
    sys.exit(main())
