"""Reads the demo's report and holds it to what the README promises."""

import json
import sys

report = json.load(sys.stdin)
print(report)
if report["steps"] < 500 or report["test_accuracy"] < 0.95 or report["largest_difference"] > 1e-5:
    sys.exit("the demo misses its promise: accuracy >= 0.95 and difference <= 1e-5 after at least 500 steps")
