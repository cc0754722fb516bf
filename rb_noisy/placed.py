"""`python placed.py CORES COMMAND …`: the command on these cores, at the lowest priority, ended with its parent.

A script of the standard library alone, run by its path: the settings must hold before any library starts its threads.
What the system lacks of the three is left out.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h; kept through exec


def main() -> None:
    cores, *command = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died meanwhile
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
