"""Whether the server in this container answers: python health.py PORT. Exit code 0, or 1. Docker's HEALTHCHECK."""

import os
import sys
import urllib.request

request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/health")
if key := os.environ.get("SERVE_API_KEY"):
    request.add_header("Authorization", f"Bearer {key}")
try:
    urllib.request.urlopen(request, timeout=4).close()
except OSError as error:  # refused, too slow, or an HTTP error
    sys.exit(str(error))
