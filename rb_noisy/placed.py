"""`python placed.py PARENT CORES NICE COMMAND …`: the command on these cores, killed with its parent process.

Killed, because whoever does not listen (a stopped process, say) would go on; each command here survives a kill.

NICE is added to the parent's niceness: 19 gives way to everything else, 0 leaves it as it is.

A script of the standard library alone, run by its path: the settings must hold before any library starts its threads.
What the system lacks of them is left out.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h; kept through exec


def main() -> None:
    parent, cores, nice, *command = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    with contextlib.suppress(OSError, AttributeError):
        os.nice(int(nice))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died meanwhile
        sys.exit(1)
    os.environ["RB_NOISY_PARENT"] = parent  # for `placement.end_with_parent`, where the system does not do it
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
