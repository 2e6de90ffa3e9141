"""What capturing a step brings: eager, replayed and compiled, as ratios to plain eager backpropagation.

    python benchmarks/capture.py                        tiny networks, and networks bound by arithmetic
    python benchmarks/capture.py --network chain --estimators dfa fdfa

How it is measured: see overhead.py. "Ready after" is the time of the first six steps, tracing and compiling included.
"""

from __future__ import annotations

import overhead

if __name__ == "__main__":
    overhead.main(("eager", "replay", "inductor"), overhead.NETWORKS)
