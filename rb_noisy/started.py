"""`python started.py PATH MODULE …`: `python -m MODULE …`, but with PATH, a `sys.path` in JSON, as its `sys.path`.

`python -m` puts the current folder before it, and a file torch.py or eval.py there, in a downloaded zoo say, would run.
A script of the standard library alone, run by its path.
"""

import json
import runpy
import sys


def main() -> None:
    path, module, *arguments = sys.argv[1:]
    sys.path[:] = json.loads(path)
    sys.argv[:] = ["-m", *arguments]  # as with `python -m`, until the module is found
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
