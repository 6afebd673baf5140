"""The tests.

WORKER is the number of this process of pytest among those that run side by side, from 0.
"""

import os

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
