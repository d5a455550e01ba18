"""A process with some worlds of an environment that is not in JAX; envs/pool.py starts it and talks to it.

    python -P envs/pool_worker.py envs/crafter_worker.py ARGUMENT...

A script that is run and never imported: importing anything from the package `envs` loads JAX, which is 110 MB and 0.8
seconds more for every process; and -P, for else the folder of the script comes first, and `import crafter` finds
envs/crafter.py. The file that it is given defines the class `Worlds`. On stdin come requests, a pickled tuple of the
name of a method and its arguments, which have an entry for each world; each answer, a pickled tuple of arrays, goes to
stdout. The end of stdin ends the process: that is also what it sees when its parent is killed.
"""

import os
import pickle
import runpy
import signal
import sys


def main():
    # Ctrl-C and SIGTERM reach a whole process group, but they ask the parent, which may want to finish a rollout
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints to stdout must not end up in the answers
    path, *arguments = sys.argv[1:]
    worlds = runpy.run_path(path)["Worlds"](*arguments)
    while True:
        try:
            name, *columns = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(getattr(worlds, name)(*columns), answers)
        answers.flush()


if __name__ == "__main__":
    main()
