"""What the peers' workers share: one JSON request a line on stdin, one answer a line on stdout.

A worker runs in the peers' own environment (make bench-venv) and never imports fdjax. Its methods are the requests:
`version()`; `load(path, ...)`, which reads model, examples and batches and warms up; `run()`, which times one round
from the first parameters; `save(path)`, which writes the averaged parameters that the last round gave.
"""

import json
import sys


def serve(worker):
    """Answer until stdin closes; what a library prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer or {}), file=answers, flush=True)


def under(data, prefix):
    """The arrays of an .npz whose names begin with `prefix`/, without it."""
    return {name.removeprefix(f"{prefix}/"): data[name] for name in data.files if name.startswith(f"{prefix}/")}


def layers(params):
    """Names of the layers, convolutions first, each in order: Conv_0, Conv_1, Dense_0."""
    return sorted({name.rsplit("/", 1)[0] for name in params})
